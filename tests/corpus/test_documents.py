import gzip
import lzma
import tracemalloc

import orjson
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_adapt.corpus.documents import DocumentWriter, limit_texts, read_documents, read_texts
from megatron_adapt.errors import DataError

DOCUMENTS = [{"id": "a", "text": "one"}, {"id": "b", "text": "δύο\nline"}, {"id": "c", "text": "三" * 1000}]
DATA = b"".join(orjson.dumps(document) + b"\n" for document in DOCUMENTS)


def compress_frames(data, size):
    compressor = zstandard.ZstdCompressor()
    return b"".join(compressor.compress(data[at : at + size]) for at in range(0, len(data), size))


def frame_ends(data):
    ends, at = set(), 0
    while at < len(data):
        frame = zstandard.ZstdDecompressor().decompressobj()
        frame.decompress(data[at:])
        at = len(data) - len(frame.unused_data)
        ends.add(at)
    return ends


COMPRESSIONS = {
    "plain": lambda data: data,
    "gzip": gzip.compress,
    "xz": lzma.compress,
    "zstd": zstandard.ZstdCompressor().compress,
    "zstd of several frames": lambda data: compress_frames(data, 100),
}


def read(path):
    return [document for _, document in read_documents([path])]


@pytest.mark.parametrize("compress", COMPRESSIONS.values(), ids=COMPRESSIONS)
def test_files_are_recognised_by_content_whatever_their_name(tmp_path, compress):
    path = tmp_path / "corpus.txt"
    path.write_bytes(compress(DATA))
    assert read(path) == DOCUMENTS


def test_places_count_lines_and_blank_ones_too(tmp_path):
    one, two = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    one.write_bytes(b'{"text": "a"}\n\n   \n{"text": "b"}')
    two.write_bytes(b'{"text": "c"}\n')
    assert [where for where, _ in read_documents([one, two])] == [f"{one}:1", f"{one}:4", f"{two}:1"]


@settings(max_examples=30)
@given(st.lists(st.dictionaries(st.text(), st.text() | st.integers(-(2**53), 2**53) | st.none())))
def test_written_documents_read_back_in_order(tmp_path_factory, documents):
    path = tmp_path_factory.mktemp("documents") / "a.jsonl.zst"
    with DocumentWriter(path) as writer:
        for document in documents:
            writer.write(document)
    assert writer.num_documents == len(documents)
    assert read(path) == documents


@pytest.mark.parametrize("kind", ["gzip", "xz", "zstd", "zstd of several frames"])
def test_a_truncated_file_is_an_error_wherever_it_ends(tmp_path, kind):
    whole = COMPRESSIONS[kind](DATA)
    path = tmp_path / "cut"
    ends = frame_ends(whole) if kind == "zstd of several frames" else set()
    for size in [*range(6, len(whole) - 1, 7), len(whole) - 1]:
        if size in ends:  # where a frame ends, a correct file may end
            continue
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"cut:\d+: the compressed file is damaged \(.*\); fetch it again$"):
            read(path)


def test_garbage_inside_a_compressed_file_is_named(tmp_path):
    path = tmp_path / "bad.zst"
    path.write_bytes(COMPRESSIONS["zstd"](DATA) + b"garbage")
    with pytest.raises(DataError, match=r"bad\.zst:\d+: the compressed file is damaged"):
        read(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', r"no valid JSON \(.*\); correct or remove the line$"),
        (b'{"text": "\xff"}', r"no valid JSON \(.*\); correct or remove the line$"),
        (b'["a"]', r"a JSON list, not an object; write one object a line$"),
        (b'"a"', r"a JSON str, not an object; write one object a line$"),
    ],
)
def test_a_line_that_is_no_document_is_named(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(DataError, match=rf"^{path}:2: {message}"):
        read(path)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"id": "a", "body": "x"}, r"no key 'text' \(keys: id, body\); name the key of the text$"),
        ({}, r"no key 'text' \(keys: none\); name the key of the text$"),
        ({"text": 3}, r"'text' is int, not a string; correct the line$"),
        ({"text": None}, r"'text' is NoneType, not a string; correct the line$"),
    ],
)
def test_a_document_without_text_is_named(tmp_path, document, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(orjson.dumps(document))
    with pytest.raises(DataError, match=rf"^{path}:1: {message}"):
        list(read_texts([path], "text"))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.jsonl: no such file; check the path$"):
        read(tmp_path / "gone.jsonl")
    with pytest.raises(DataError, match=r"no such file"):
        read(tmp_path)


def test_texts_are_limited_to_whole_ones():
    texts = ["ab", "δδ", "c"]
    assert list(limit_texts(texts, 0)) == texts
    assert list(limit_texts(texts, 1)) == ["ab"]
    assert list(limit_texts(texts, 2)) == ["ab"]
    assert list(limit_texts(texts, 3)) == ["ab", "δδ"]
    assert list(limit_texts(texts, 7)) == texts


def test_memory_does_not_grow_with_the_file(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    with DocumentWriter(path) as writer:
        for number in range(20_000):
            writer.write({"text": f"{number} " * 200})
    tracemalloc.start()
    assert sum(1 for _ in read_documents([path])) == 20_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 12e6
