"""Plain text and parquet give the documents, and the places, that a reader of the file itself would."""

import datetime
import gzip
import lzma
import re
import sys

import orjson
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_adapt.config import CorpusSettings, PrepareCorpus
from megatron_adapt.corpus.chunks import cut_files, sample_lines
from megatron_adapt.corpus.documents import read_documents, read_texts
from megatron_adapt.corpus.prepare import prepare_corpus
from megatron_adapt.errors import ConfigError, DataError

PACKERS = {"plain": bytes, "gzip": gzip.compress, "xz": lzma.compress, "zstd": zstandard.compress}
_texts = st.lists(st.sampled_from(["a", "bb ccc", "", " \t", "δ\r", "\r", '"\\'])).map("\n".join)


def split_slowly(text: str) -> list[tuple[int, str]]:
    """Paragraphs with the number of their first line."""
    found, inside = [], False
    for number, line in enumerate(text.split("\n"), start=1):
        blank = not line.strip()
        if not blank and inside:
            found[-1] = found[-1][0], f"{found[-1][1]}\n{line}"
        elif not blank:
            found.append((number, line))
        inside = not blank
    return [(number, paragraph.strip("\r\n")) for number, paragraph in found]


@pytest.mark.parametrize("packed", PACKERS)
@settings(max_examples=80, deadline=None)
@given(text=_texts, size=st.integers(1, 30))
def test_paragraphs_are_the_same_however_the_file_is_cut(tmp_path_factory, packed, text, size):
    path = tmp_path_factory.mktemp("text") / "a"
    path.write_bytes(PACKERS[packed](text.encode()))
    expected = split_slowly(text)
    found = list(read_documents([path], "paragraphs"))
    assert found == [(f"{path}:{number}", {"text": paragraph}) for number, paragraph in expected]
    chunks = list(cut_files([path], size, "paragraphs"))
    lines_before = 0
    pieces = []
    for chunk in chunks:
        data = chunk.read()
        if data:
            assert chunk.count_lines_before() == lines_before
        lines = data.split(b"\n")
        pieces += [
            (lines_before + at, orjson.loads(line)["text"]) for at, line in enumerate(lines, start=1) if line.strip()
        ]
        lines_before += data.count(b"\n")
    assert pieces == expected
    assert not chunks or sum(chunk.file_bytes for chunk in chunks) == path.stat().st_size


@pytest.mark.parametrize("packed", PACKERS)
def test_a_file_is_a_document_whatever_its_size(tmp_path, packed):
    texts = ["one\n\ntwo\n" * 300_000, "", " \n\n", "last"]
    paths = [tmp_path / f"{at}.txt" for at in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_bytes(PACKERS[packed](text.encode()))
    assert list(read_texts(paths, "text", "file")) == [texts[0].strip("\n"), "last"]
    assert len([chunk for chunk in cut_files(paths, 10, "file") if chunk.read().strip()]) == 2


@pytest.mark.parametrize("plain_text", ["file", "paragraphs"])
def test_json_lines_beside_plain_text_stay_json_lines(tmp_path, plain_text):
    text, lines = tmp_path / "a.txt", tmp_path / "b.txt"
    text.write_text("one")
    lines.write_text('\n{"text": "two"}\n\n{"text": "three"}\n')
    assert list(read_texts([text, lines], "text", plain_text)) == ["one", "two", "three"]


@pytest.mark.parametrize("plain_text", ["file", "paragraphs"])
def test_the_mark_some_editors_begin_with_is_no_text(tmp_path, plain_text):
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfone\r\n")
    assert list(read_texts([tmp_path / "a"], "text", plain_text)) == ["one"]


@pytest.mark.parametrize(("plain_text", "line"), [("file", 1), ("paragraphs", 4)])
def test_invalid_utf_8_is_named_by_its_line(tmp_path, plain_text, line):
    (tmp_path / "a.txt").write_bytes(b'good\n"\\\n\nbad \xff "\\\n')
    with pytest.raises(DataError, match=rf"a\.txt:{line}: no valid JSON \(.*UTF-8.*\); correct or remove the line"):
        list(read_texts([tmp_path / "a.txt"], "text", plain_text))


def test_plain_text_is_not_guessed(tmp_path):
    (tmp_path / "a.txt").write_text("one\n")
    with pytest.raises(DataError, match=r"a\.txt:1: no valid JSON"):
        list(read_texts([tmp_path / "a.txt"], "text"))


# ---------------------------------------------------------------- parquet


def write_parquet(path, rows, group_size):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").Table.from_pylist(rows)
    parquet.write_table(table, path, row_group_size=group_size)
    return path


ROWS = [
    {"id": at, "text": f"text {at}\nδ" * (at % 7), "seen": datetime.datetime(2020, 1, 1), "raw": b"\xff", "tags": ["a"]}
    for at in range(100)
]


@pytest.mark.parametrize("size", [1, 1000, 1 << 20])
def test_rows_of_parquet_are_documents_in_order(tmp_path, size):
    path = write_parquet(tmp_path / "a.jsonl", ROWS, 7)
    assert list(read_texts([path], "text")) == [row["text"] for row in ROWS]
    places = [where for where, _ in read_documents([path])]
    assert places == [f"{path}:{at}" for at in range(1, 101)]
    chunks = list(cut_files([path], size))
    assert len(chunks) == {1: 15, 1 << 20: 1}.get(size, len(chunks))
    documents = [orjson.loads(line) for chunk in chunks for line in chunk.read().splitlines()]
    assert [(item["id"], item["text"], item["tags"]) for item in documents] == [
        (row["id"], row["text"], row["tags"]) for row in ROWS
    ]
    before = 0
    for chunk in chunks:
        assert chunk.count_lines_before() == before
        before += len(chunk.read().splitlines())
    assert sum(chunk.file_bytes for chunk in chunks) == path.stat().st_size


def test_a_row_without_text_is_named(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [*ROWS[:9], {**ROWS[9], "text": None}], 4)
    with pytest.raises(DataError, match=r"a\.parquet:10: 'text' is NoneType, not a string"):
        list(read_texts([path], "text"))


@pytest.mark.parametrize("size", [4, 1000, -1])
def test_damaged_parquet_is_one_line(tmp_path, size):
    path = write_parquet(tmp_path / "a.parquet", ROWS, 10)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DataError, match=r"a\.parquet: the parquet file is damaged \(.*\); fetch it again$"):
        list(read_texts([path], "text"))


def test_parquet_whose_pages_are_damaged_is_one_line(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ROWS, 10)
    data = bytearray(path.read_bytes())
    data[4:600] = bytes(596)
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.parquet: the parquet file is damaged \([^\n]*\); fetch it again$"):
        list(read_texts([path], "text"))


def test_parquet_without_pyarrow_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    message = r"a\.parquet: parquet needs pyarrow, which is not installed; pip install 'megatron-adapt\[data\]'"
    with pytest.raises(ConfigError, match=message):
        list(read_texts([tmp_path / "a.parquet"], "text"))


def test_the_sample_is_of_documents_in_every_format(tmp_path):
    parquet = write_parquet(tmp_path / "a.parquet", ROWS, 50)
    text = tmp_path / "b.txt"
    text.write_text("\n\n".join(f"text {at}" for at in range(1000)))
    for path in (parquet, text):
        found = [orjson.loads(line)["text"] for line in sample_lines([path], 10, "paragraphs")]
        assert 10 <= len(found) <= 12
        assert all(re.match(r"text|$", item) for item in found)


def test_a_corpus_is_prepared_from_a_folder_of_all_formats(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    write_parquet(raw / "1.parquet", [{"text": f"row {at}"} for at in range(50)], 10)
    (raw / "2.txt.xz").write_bytes(lzma.compress(b"\n\n".join(b"paragraph %d" % at for at in range(50))))
    (raw / "3.jsonl.gz").write_bytes(gzip.compress(b"".join(b'{"text": "line %d"}\n' % at for at in range(50))))
    prepared = CorpusSettings(plain_text="paragraphs", valid_share=0.1)
    prepare_corpus(PrepareCorpus(input=(raw,), output=tmp_path / "out", settings=prepared))
    texts = [
        text for part in ("train", "valid") for text in read_texts([tmp_path / f"out/{part}-00000.jsonl.zst"], "text")
    ]
    assert sorted(texts) == sorted(f"{word} {at}" for word in ("row", "paragraph", "line") for at in range(50))
    record = orjson.loads((tmp_path / "out" / "stage.json").read_bytes())
    assert set(record["inputs"]) == {str(raw), *(str(path) for path in raw.iterdir())}
