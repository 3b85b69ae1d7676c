import gzip
import lzma
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_adapt.corpus.chunks import cut_files, sample_lines
from megatron_adapt.errors import DataError

PACKERS = {
    "plain": lambda data: data,
    "gzip": gzip.compress,
    "xz": lzma.compress,
    "zstd": lambda data: zstandard.compress(data[:40]) + zstandard.compress(data[40:]),
}
# Not the first bytes of another format.
_lines = st.lists(st.binary(max_size=40).map(lambda line: b"{" + line.replace(b"\n", b"") + b"\n"), max_size=30)


def write(folder: Path, name: str, data: bytes, packed: str = "plain") -> Path:
    path = folder / name
    path.write_bytes(PACKERS[packed](data))
    return path


@pytest.mark.parametrize("packed", PACKERS)
@settings(max_examples=60, deadline=None)
@given(first=_lines, second=_lines, size=st.integers(1, 200), ends=st.booleans())
def test_chunks_are_the_lines_of_the_files_in_order(tmp_path_factory, packed, first, second, size, ends):
    folder = tmp_path_factory.mktemp("chunks")
    texts = [b"".join(first), b"".join(second)]
    if not ends:
        texts = [text.removesuffix(b"\n") for text in texts]
    paths = [write(folder, f"{at}", text, packed) for at, text in enumerate(texts)]
    chunks = list(cut_files(paths, size))
    assert [chunk.number for chunk in chunks] == list(range(len(chunks)))
    for path, text in zip(paths, texts, strict=True):
        own = [chunk for chunk in chunks if chunk.path == path]
        contents = [chunk.read() for chunk in own]
        assert b"".join(contents) == text
        assert all(content.endswith(b"\n") for content in list(filter(None, contents))[:-1])
        if text:
            assert sum(chunk.file_bytes for chunk in own) == path.stat().st_size
        before = 0
        for chunk, content in zip(own, contents, strict=True):
            if content:
                assert chunk.count_lines_before() == before
            before += content.count(b"\n")


def test_a_plain_file_is_cut_without_being_read(tmp_path):
    path = tmp_path / "hole"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    chunks = cut_files([path], 1 << 30)
    assert sum(1 for _ in chunks) == 1024


@pytest.mark.parametrize("packed", PACKERS)
def test_a_line_longer_than_a_chunk_is_whole_and_read_once(tmp_path, packed):
    lines = [b"a\n", b"b" * 10_000 + b"\n", b"c\n"]
    chunks = cut_files([write(tmp_path, "x", b"".join(lines), packed)], 100)
    contents = [content for chunk in chunks if (content := chunk.read())]
    assert b"".join(contents) == b"".join(lines)
    assert max(map(len, contents)) <= 10_003 + 100


@pytest.mark.parametrize(("packed", "cut"), [("gzip", 9), ("xz", 20), ("zstd", 3)])
def test_a_truncated_file_is_damaged_at_a_line(tmp_path, packed, cut):
    data = b"".join(b'{"text": "%d"}\n' % (at * 7919 % 1000) for at in range(50_000))
    path = write(tmp_path, "x.packed", data, packed)
    path.write_bytes(path.read_bytes()[:-cut])
    contents: list[bytes] = []
    with pytest.raises(DataError, match=r"x\.packed:\d+: the compressed file is damaged .*; fetch it again") as caught:
        contents.extend(chunk.read() for chunk in cut_files([path], 1000))
    line = int(str(caught.value).split("x.packed:")[1].split(":")[0])
    assert line > 30_000
    assert line > b"".join(contents).count(b"\n")
    assert data.startswith(b"".join(contents))


def test_a_file_that_is_gone_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone: no such file; check the path"):
        list(cut_files([tmp_path / "gone"], 10))
    path = write(tmp_path, "x", b"a\n")
    (chunk,) = cut_files([path], 10)
    path.unlink()
    with pytest.raises(DataError, match=r"x: cannot be read \(No such file or directory\); check the file"):
        chunk.read()


@pytest.mark.parametrize("packed", PACKERS)
def test_the_sample_is_spread_over_the_files(tmp_path, packed):
    lines = [b"%05d\n" % at for at in range(10_000)]
    paths = [
        write(tmp_path, "a", b"".join(lines[:5000]), packed),
        write(tmp_path, "b", b"".join(lines[5000:]), packed),
        write(tmp_path, "empty", b"", packed),
    ]
    found = [int(line) for line in sample_lines(paths, 20)]
    assert 20 <= len(found) <= 24
    assert found == sorted(found)
    assert max(b - a for a, b in zip([0, *found], [*found, 10_000], strict=True)) < 1200
