"""Read and write documents: JSON lines, plain, gzip or zstd, recognised by content.

Reads: files of one JSON object a line. Writes: ``.jsonl.zst``. Guarantees: documents keep their order; a line
that is no document stops the reader with ``file:line``, and so does a compressed file that ends too early;
memory is a few blocks and the longest line, whatever the file's size.
"""

import gzip
import io
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import zstandard

from megatron_adapt.errors import DataError

_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_BLOCK_BYTES = 1 << 13  # compressed; repetitive text is a thousand times as long
DAMAGE = (zstandard.ZstdError, zlib.error, EOFError, OSError)
"What reading a damaged or truncated compressed file raises."


class _ZstdStream(io.RawIOBase):
    """Bytes of a zstd file of any number of frames.

    zstandard's own ``stream_reader`` takes the end of a truncated file for the end of its text; this one
    raises ``EOFError`` there.
    """

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._inside_frame = False
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            block = self._frame.unused_data if self._frame.eof else b""
            block = block or self._raw.read(_BLOCK_BYTES)
            if not block:
                if self._inside_frame:
                    raise EOFError("it ends in the middle of a frame")
                return 0
            if self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._ready = memoryview(self._frame.decompress(block))
            self._inside_frame = not self._frame.eof
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def close(self) -> None:
        self._raw.close()
        super().close()


def open_lines(path: Path) -> BinaryIO | gzip.GzipFile:
    """Open a file for reading lines of bytes, decompressing by its first bytes.

    Raises:
        DataError: the file does not exist.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; check the path")
    return decompress(path.open("rb"))


def decompress(raw: BinaryIO) -> BinaryIO | gzip.GzipFile:
    """Return a reader of the text behind an open file: itself, unless its first bytes say gzip or zstd."""
    magic = raw.read(4)
    raw.seek(0)
    if magic.startswith(_GZIP_MAGIC):
        return gzip.open(raw, "rb")
    if magic == _ZSTD_MAGIC:
        return io.BufferedReader(_ZstdStream(raw), 1 << 20)
    return raw


def damage_error(where: str, error: Exception) -> DataError:
    """Return the error of a file that cannot be decompressed to its end; ``DAMAGE`` are the exceptions that tell."""
    return DataError(f"{where}: the compressed file is damaged ({error}); fetch it again")


def read_documents(paths: Iterable[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every document of the files with its place ``file:line``; blank lines are skipped.

    Raises:
        DataError: a file is missing or damaged, or a line is no JSON object.
    """
    for path in paths:
        number = 0
        with open_lines(path) as lines:
            while True:
                try:
                    line = lines.readline()
                except DAMAGE as error:
                    raise damage_error(f"{path}:{number + 1}", error) from None
                if not line:
                    break
                number += 1
                if line.strip():
                    yield f"{path}:{number}", parse_line(line, f"{path}:{number}")


def parse_line(line: bytes, where: str) -> dict[str, Any]:
    """Return the document of one line.

    Raises:
        DataError: the line is no JSON object.
    """
    try:
        document = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise DataError(f"{where}: no valid JSON ({error}); correct or remove the line") from None
    if not isinstance(document, dict):
        raise DataError(f"{where}: a JSON {type(document).__name__}, not an object; write one object a line")
    return document


def read_texts(paths: Iterable[Path], text_key: str) -> Iterator[str]:
    """Yield the text of every document.

    Raises:
        DataError: as ``read_documents``; also a document without ``text_key`` or with a text that is no string.
    """
    for where, document in read_documents(paths):
        yield get_text(document, text_key, where)


def get_text(document: dict[str, Any], text_key: str, where: str) -> str:
    """Return the text of a document.

    Raises:
        DataError: the key is missing or its value is no string.
    """
    if text_key not in document:
        keys = ", ".join(document) or "none"
        raise DataError(f"{where}: no key {text_key!r} (keys: {keys}); name the key of the text")
    text = document[text_key]
    if not isinstance(text, str):
        raise DataError(f"{where}: {text_key!r} is {type(text).__name__}, not a string; correct the line")
    return text


def limit_texts(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    """Yield whole texts until ``max_bytes`` of UTF-8 are reached; 0 yields all."""
    total = 0
    for text in texts:
        yield text
        total += len(text.encode())
        if max_bytes and total >= max_bytes:
            return


class DocumentWriter:
    """Writes documents to one ``.jsonl.zst`` file; use as a context manager."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._stream = zstandard.ZstdCompressor(level=3).stream_writer(self._file)
        self.num_documents = 0

    def write(self, document: dict[str, Any]) -> None:
        """Append one document."""
        self._stream.write(orjson.dumps(document, option=orjson.OPT_APPEND_NEWLINE))
        self.num_documents += 1

    def __enter__(self) -> "DocumentWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()  # type: ignore[no-untyped-call]
        self._file.close()
