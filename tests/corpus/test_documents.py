import gzip
import json
import lzma
import sys
import tracemalloc

import orjson
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_adapt.corpus import documents
from megatron_adapt.corpus.documents import (
    DocumentWriter,
    find_text,
    get_text,
    limit_texts,
    parse_line,
    read_documents,
    read_texts,
)
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


# ---------------------------------------------------------------- the shortcut

needs_csrc = pytest.mark.skipif(documents._csrc is None, reason="the C++ extension is not built")
_VALUES = st.one_of(
    st.text(), st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.just([1])
)
_OBJECTS = st.dictionaries(st.sampled_from(["text", "id", "été", 'a"b', ""]), _VALUES) | st.fixed_dictionaries(
    {"id": st.integers(0, 999), "text": st.text()}
)


def parse(line):
    """The text as the JSON library gives it, or None where it refuses the line."""
    try:
        return get_text(parse_line(line, ""), "text", "").encode()
    except DataError:
        return None


@needs_csrc
@given(_OBJECTS, st.booleans(), st.sampled_from([None, 1]))
@settings(max_examples=500)
def test_a_text_found_at_once_is_the_text_of_the_document(document, is_ascii, indent):
    line = json.dumps(document, ensure_ascii=is_ascii, indent=indent).encode() + b"\n"
    assert find_text(line, b"text") in (None, parse(line))


@needs_csrc
@given(st.text(), st.integers(0, 99), st.integers(0, 99), st.binary(max_size=3))
@settings(max_examples=1000)
def test_no_text_is_found_in_a_line_that_is_refused(text, at, end, other):
    line = json.dumps({"id": 12, "text": text}, ensure_ascii=len(text) % 2 == 0).encode()
    at, end = sorted((at % len(line), end % len(line)))
    line = line[:at] + other + line[end:]
    found = find_text(line, b"text")
    assert found is None or found == parse(line)


@needs_csrc
@pytest.mark.parametrize(
    "line",
    [
        b'{"text": "a"',
        b'{"text": "a"}}',
        b'{"text": "a",}',
        b'{"text": "\x01"}',
        b'{"text": "\\ud800"}',
        b'{"text": "\\ud800\\u0041"}',
        b'{"text": "\\udc00"}',
        b'{"text": "\\x"}',
        b'{"text": "\xc0\xaf"}',
        b'{"text": "\xed\xa0\x80"}',
        b'{"text": "\xf4\x90\x80\x80"}',
        b'{"text": "\xe3\x81"}',
        b'{"id": 01, "text": "a"}',
        b'{"id": 1., "text": "a"}',
        b'{"id": nul, "text": "a"}',
        b'["text"]',
    ],
)
def test_what_is_no_json_is_left_to_the_library_that_says_why(line):
    assert parse(line) is None
    assert find_text(line, b"text") is None


@needs_csrc
def test_every_character_is_found_plain_and_escaped_unless_it_is_white_space():
    characters = [chr(at) for at in range(sys.maxunicode + 1) if not 0xD800 <= at <= 0xDFFF]
    for character in characters[::7] + [character for character in characters if character.isspace()]:
        for line in (orjson.dumps({"text": character}), json.dumps({"text": character}).encode()):
            found = find_text(line, b"text")
            assert found == (None if character.isspace() else found and character.encode())
    marked = ["a" + character for character in characters[::7]]
    assert [find_text(json.dumps({"text": text}).encode(), b"text") for text in marked] == [t.encode() for t in marked]
    assert [find_text(orjson.dumps({"text": text}), b"text") for text in marked] == [t.encode() for t in marked]


@needs_csrc
def test_common_lines_are_found():
    for document in ({"text": '三つ\n\t"x" \\ \U0001f600'}, {"id": "a", "n": -1.5, "x": None, "y": True, "text": "б"}):
        for line in (orjson.dumps(document), json.dumps(document).encode(), json.dumps(document, indent=1).encode()):
            assert find_text(line, b"text") == document["text"].encode()
    assert find_text(b'{"text": "a", "text": "b"}', b"text") is None


def test_without_the_extension_nothing_is_found(monkeypatch):
    monkeypatch.setattr(documents, "_csrc", None)
    assert find_text(b'{"text": "a"}', b"text") is None
