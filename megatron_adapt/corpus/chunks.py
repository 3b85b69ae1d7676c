"""Cut input files into chunks that several processes can read on their own.

A chunk is a run of whole lines of one file, about ``chunk_bytes`` of text. What is in it depends on the file and on
``chunk_bytes`` alone: all chunks of all files, one behind another, are the lines of the files in order.

- A plain file is cut into byte ranges without being read: a chunk is the lines that *begin* in its range. Whoever
  works on it reads it (``Chunk.read``), so one large file keeps all processes busy.
- A compressed stream has one reader, ``cut_files`` itself: it puts the text into the chunk (``Chunk.data``), one
  chunk at a time, cut behind the line in which ``chunk_bytes`` are reached.

Another format is one more function like ``_cut_plain``: a path and a size to chunks whose ``read`` returns JSON lines.

Guarantees: memory is one chunk, or the longest line if that is longer; a compressed file that ends too early is
an error with ``file:line``.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megatron_adapt.corpus.documents import DAMAGE, damage_error, decompress
from megatron_adapt.errors import DataError

_BLOCK_BYTES = 1 << 20
_SAMPLE_BYTES = 1 << 20


@dataclass(frozen=True)
class Chunk:
    """Whole lines of one file."""

    number: int
    "Place among the chunks of all files, from 0."
    path: Path
    start: int
    "Byte of the (decompressed) text at which the range begins."
    end: int
    "Byte behind its last one; the line that begins before it belongs to the chunk as a whole."
    file_bytes: int
    "Bytes of the file on disk that the chunk stands for; their sum is the size of all files."
    data: bytes | None = None
    "The lines, where they had to be read to find the chunk."

    def read(self) -> bytes:
        """Return the lines.

        Raises:
            DataError: the file is gone or cannot be read.
        """
        if self.data is not None:
            return self.data
        try:
            with self.path.open("rb") as file:
                return _read_range(file, self.start, self.end)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror}); check the file") from None

    def count_lines_before(self) -> int:
        """Return how many lines of the file come before those of the chunk; reads the file up to it."""
        # A range may begin inside a line; that line ends at the first newline from ``start - 1`` on.
        return 0 if self.start == 0 else 1 + _count_newlines(self.path, self.start - 1)


def _read_range(file: BinaryIO, start: int, end: int) -> bytes:
    """Return the lines that begin in ``[start, end)``."""
    if start:
        file.seek(start - 1)
        data = file.read(end - start + 1)
        first = data.find(b"\n") + 1
        if first == 0:
            return b""
        data = data[first:]
        if not data:
            return b""
    else:
        data = file.read(end)
    return data if data.endswith(b"\n") else data + file.readline()


def _count_newlines(path: Path, num_bytes: int) -> int:
    found = 0
    with path.open("rb") as raw:
        text = decompress(raw)
        while num_bytes > 0 and (block := text.read(min(_BLOCK_BYTES, num_bytes))):
            found += block.count(b"\n")
            num_bytes -= len(block)
    return found


def cut_files(paths: Sequence[Path], chunk_bytes: int) -> Iterator[Chunk]:
    """Yield the chunks of all files in order.

    Args:
        paths: plain, gzip or zstd files, told by their first bytes.
        chunk_bytes: text in a chunk, at least one line.

    Raises:
        DataError: a file is missing, cannot be read, or is compressed and damaged.
    """
    number = 0
    for path in paths:
        try:
            raw = path.open("rb")
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); check the file") from None
        with raw:
            text = decompress(raw)
            chunks = (
                _cut_plain(path, number, chunk_bytes)
                if text is raw
                else _cut_stream(path, number, chunk_bytes, raw, text)
            )
            for chunk in chunks:
                yield chunk
                number += 1


def _cut_plain(path: Path, number: int, chunk_bytes: int) -> Iterator[Chunk]:
    size = path.stat().st_size
    for at, start in enumerate(range(0, size, chunk_bytes)):
        end = min(start + chunk_bytes, size)
        yield Chunk(number + at, path, start, end, end - start)


def _cut_stream(path: Path, number: int, chunk_bytes: int, raw: BinaryIO, text: Any) -> Iterator[Chunk]:
    start = num_lines = consumed = 0
    while data := _read_lines(path, num_lines, chunk_bytes, text):
        position = raw.tell()
        yield Chunk(number, path, start, start + len(data), position - consumed, data)
        number, start, consumed = number + 1, start + len(data), position
        num_lines += data.count(b"\n")


def _read_lines(path: Path, num_lines: int, chunk_bytes: int, text: Any) -> bytes:
    """Return whole lines of at least ``chunk_bytes``, or the rest; ``num_lines`` is how many came before."""
    blocks: list[bytes] = []
    missing = chunk_bytes
    try:
        while missing > 0 and (block := text.read1(min(_BLOCK_BYTES, missing))):
            blocks.append(block)
            missing -= len(block)
        if blocks and not blocks[-1].endswith(b"\n"):
            blocks.append(text.readline())
    except DAMAGE as error:
        lines = num_lines + sum(block.count(b"\n") for block in blocks)
        raise damage_error(f"{path}:{lines + 1}", error) from None
    return b"".join(blocks)


def sample_lines(paths: Sequence[Path], number: int) -> Iterator[bytes]:
    """Yield about ``number`` lines, spread evenly over plain files; of a compressed file, over its first megabyte."""
    sizes = [path.stat().st_size for path in paths]
    for path, size in zip(paths, sizes, strict=True):
        num_lines = -(-number * size // max(sum(sizes), 1))
        with suppress(*DAMAGE), path.open("rb") as raw:  # what is wrong with a file is told by ``cut_files``
            text = decompress(raw)
            if text is raw:
                for at in range(num_lines):
                    raw.seek(at * size // num_lines)
                    if at:
                        raw.readline(_SAMPLE_BYTES)
                    yield raw.readline(_SAMPLE_BYTES)
            else:
                lines = text.read(_SAMPLE_BYTES).splitlines(keepends=True)
                yield from lines[:: max(len(lines) // num_lines, 1)]
