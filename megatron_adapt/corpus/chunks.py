"""Cut input files into chunks that several processes can read on their own.

A chunk is whole documents of one file, about ``chunk_bytes`` of text, as JSON lines. What is in it depends on the file
and on ``chunk_bytes`` alone: all chunks of all files, one behind another, are the documents of the files in order.

- JSON lines, and plain text whose documents are separated by blank lines, are cut into byte ranges without being read:
  a chunk is what *begins* in its range. Whoever works on it reads it (``Chunk.read``), so one large file keeps all
  processes busy.
- A compressed stream has one reader, ``cut_files`` itself: it puts the text into the chunk (``Chunk.data``), one
  chunk at a time, cut behind the line, or before the blank line, at which ``chunk_bytes`` are reached.
- Parquet is cut into row groups; a text file that is one document is one chunk.

The format is told by the first bytes. Plain text is expected only where ``plain_text`` says what a document is in it;
then every file whose text does not begin with ``{`` is plain text.

Guarantees: memory is one chunk, or the longest document or row group if that is longer; a compressed file that ends
too early is an error with ``file:line``.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path
from typing import Any, BinaryIO, Literal

from megatron_adapt.config.corpus import PlainText
from megatron_adapt.corpus.formats import (
    PARQUET_MAGIC,
    convert_file,
    convert_paragraphs,
    convert_row_groups,
    list_row_groups,
    remove_mark,
)
from megatron_adapt.corpus.packed import DAMAGE, damage_error, decompress
from megatron_adapt.errors import DataError

_BLOCK_BYTES = 1 << 20
_SAMPLE_BYTES = 1 << 20
_PEEK_BYTES = 1 << 10
_LINE_START = re.compile(rb"\n")
_BLANK_LINE_START = re.compile(rb"\n(?=[ \t\r\f\v]*\n)")

Format = Literal["lines", "paragraphs", "file", "parquet"]


@dataclass(frozen=True)
class Chunk:
    """Whole documents of one file."""

    number: int
    "Place among the chunks of all files, from 0."
    path: Path
    format: Format
    start: int
    "Byte of the (decompressed) text at which the range begins; of parquet, the row group."
    end: int
    "The first one behind; the document that begins before it belongs to the chunk as a whole."
    file_bytes: int
    "Bytes of the file on disk that the chunk stands for; their sum is the size of all files."
    data: bytes | None = None
    "The text, where it had to be read to find the chunk."

    def read(self) -> bytes:
        """Return the documents as JSON lines.

        Raises:
            DataError: the file is gone or cannot be read.
        """
        try:
            if self.format == "parquet":
                return convert_row_groups(self.path, self.start, self.end)
            data = self.data
            if data is None:
                with self.path.open("rb") as file:
                    data = _read_range(file, self.start, self.end, self.format)
        except OSError as error:
            raise _read_error(self.path, error) from None
        if self.format == "lines":
            return data
        data = data if self.start else remove_mark(data)
        return convert_paragraphs(data) if self.format == "paragraphs" else convert_file(data)

    def count_lines_before(self) -> int:
        """Return how many lines (of parquet, rows) of the file come before; reads the file up to the chunk."""
        if self.format == "parquet":
            return sum(rows for rows, _ in list_row_groups(self.path)[: self.start])
        if self.start == 0:
            return 0
        with self.path.open("rb") as raw:
            first = self.start if self.data is not None else _find_start(raw, self.start, self.format)
        return _count_newlines(self.path, first)


def _read_range(file: BinaryIO, start: int, end: int, format: Format) -> bytes:
    """Return what begins in ``[start, end)``: lines, or paragraphs and the blank line before them."""
    origin = max(start - 1, 0)
    file.seek(origin)
    data = file.read(end - origin)
    if start and b"\n" not in data:
        return b""
    if not data.endswith(b"\n"):
        data += file.readline()
    if start:
        found = (_LINE_START if format == "lines" else _BLANK_LINE_START).search(data)
        if not found or origin + found.end() >= end:
            return b""
        data = data[found.end() :]
    if format == "paragraphs":
        data += b"".join(_read_on(file))
    return data


def _read_on(file: BinaryIO) -> Iterator[bytes]:
    """Yield lines up to the next blank one."""
    return takewhile(lambda line: not line.isspace(), iter(file.readline, b""))


def _find_start(file: BinaryIO, at: int, format: Format) -> int:
    """Return where the first line, or blank line, begins that begins behind or at ``at``."""
    file.seek(at - 1)
    position = at - 1 + len(file.readline())
    if format == "paragraphs":
        position += sum(map(len, _read_on(file)))
    return position


def _count_newlines(path: Path, num_bytes: int) -> int:
    found = 0
    with path.open("rb") as raw:
        text = decompress(raw)
        while num_bytes > 0 and (block := text.read(min(_BLOCK_BYTES, num_bytes))):
            found += block.count(b"\n")
            num_bytes -= len(block)
    return found


def _read_error(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be read ({error.strerror or error}); check the file")


def cut_files(paths: Sequence[Path], chunk_bytes: int, plain_text: PlainText = "none") -> Iterator[Chunk]:
    """Yield the chunks of all files in order.

    Args:
        paths: files of JSON lines or plain text, perhaps compressed by gzip, zstd or xz, or parquet.
        chunk_bytes: text in a chunk, at least one document.
        plain_text: what a document is in plain text.

    Raises:
        ConfigError: a file is parquet and pyarrow is not installed.
        DataError: a file is missing, cannot be read, or is damaged.
    """
    numbers = count()
    for path in paths:
        yield from _cut_file(path, chunk_bytes, plain_text, numbers)


def _cut_file(path: Path, chunk_bytes: int, plain_text: PlainText, numbers: Iterator[int]) -> Iterator[Chunk]:
    if not path.is_file():
        raise DataError(f"{path}: no such file; check the path")
    try:
        raw = path.open("rb")
    except OSError as error:
        raise _read_error(path, error) from None
    with raw:
        text = decompress(raw)
        format = _find_format(path, text, plain_text)
        if format == "parquet":
            yield from _cut_parquet(path, chunk_bytes, numbers)
            return
        size = path.stat().st_size
        if text is not raw:
            yield from _cut_stream(path, chunk_bytes, numbers, format, raw, text)
            return
        chunk_bytes = chunk_bytes if format != "file" else max(size, 1)
        for start in range(0, size, chunk_bytes):
            end = min(start + chunk_bytes, size)
            yield Chunk(next(numbers), path, format, start, end, end - start)


def _find_format(path: Path, text: Any, plain_text: PlainText) -> Format:
    try:
        beginning = text.peek(_PEEK_BYTES)
    except DAMAGE as error:
        raise damage_error(f"{path}:1", error) from None
    if beginning.startswith(PARQUET_MAGIC):
        return "parquet"
    if plain_text == "none" or beginning.lstrip().startswith(b"{"):
        return "lines"
    return "file" if plain_text == "file" else "paragraphs"


def _cut_parquet(path: Path, chunk_bytes: int, numbers: Iterator[int]) -> Iterator[Chunk]:
    sizes = [num_bytes for _, num_bytes in list_row_groups(path)]
    file_bytes, total = path.stat().st_size, max(sum(sizes), 1)
    start = size = told = 0
    for at, num_bytes in enumerate(sizes, start=1):
        size += num_bytes
        if size >= chunk_bytes or at == len(sizes):
            done = file_bytes * sum(sizes[:at]) // total
            yield Chunk(next(numbers), path, "parquet", start, at, done - told)
            start, size, told = at, 0, done


def _cut_stream(
    path: Path, chunk_bytes: int, numbers: Iterator[int], format: Format, raw: BinaryIO, text: Any
) -> Iterator[Chunk]:
    start = num_lines = consumed = 0
    rest = b""
    chunk_bytes = chunk_bytes if format != "file" else sys.maxsize
    while True:
        data, rest = _read_stream(path, num_lines, chunk_bytes, format, text, rest)
        if not data:
            return
        position = raw.tell()
        yield Chunk(next(numbers), path, format, start, start + len(data), position - consumed, data)
        start, consumed = start + len(data), position
        num_lines += data.count(b"\n")


def _read_stream(
    path: Path, num_lines: int, chunk_bytes: int, format: Format, text: Any, rest: bytes
) -> tuple[bytes, bytes]:
    """Return whole documents of at least ``chunk_bytes``, or what is left, and what was read beyond.

    Args:
        path: of the file.
        num_lines: lines that came before.
        chunk_bytes: where to stop, at the end of a document.
        format: what a document is.
        text: the stream.
        rest: what the call before read beyond.
    """
    blocks = [rest] if rest else []
    missing = chunk_bytes - len(rest)
    try:
        while missing > 0 and (block := text.read1(min(_BLOCK_BYTES, missing))):
            blocks.append(block)
            missing -= len(block)
        if blocks and not blocks[-1].endswith(b"\n"):
            blocks.append(text.readline())
        rest = b""
        while format == "paragraphs" and (rest := text.readline()) and not rest.isspace():
            blocks.append(rest)
    except DAMAGE as error:
        lines = num_lines + sum(block.count(b"\n") for block in blocks)
        raise damage_error(f"{path}:{lines + 1}", error) from None
    return b"".join(blocks), rest


def sample_lines(paths: Sequence[Path], number: int, plain_text: PlainText = "none") -> Iterator[bytes]:
    """Yield about ``number`` documents as JSON lines, spread evenly over the files.

    Of a file that is not plain JSON lines they are spread over its first megabyte, document or row group.
    """
    sizes = [path.stat().st_size for path in paths]
    for path, size in zip(paths, sizes, strict=True):
        num_lines = -(-number * size // max(sum(sizes), 1))
        with suppress(DataError, *DAMAGE), path.open("rb") as raw:  # what is wrong with a file is told by ``cut_files``
            text = decompress(raw)
            if text is raw and _find_format(path, raw, plain_text) == "lines":
                for at in range(num_lines):
                    raw.seek(at * size // num_lines)
                    if at:
                        raw.readline(_SAMPLE_BYTES)
                    yield raw.readline(_SAMPLE_BYTES)
            elif chunk := next(_cut_file(path, _SAMPLE_BYTES, plain_text, count()), None):
                lines = [line for line in chunk.read().splitlines(keepends=True) if not line.isspace()]
                yield from lines[:: max(len(lines) // num_lines, 1)]
