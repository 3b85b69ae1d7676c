"""Text of plain, gzip, zstd and xz files, told by their first bytes; one that ends too early is an error."""

import gzip
import io
import lzma
import zlib
from typing import Any, BinaryIO

import zstandard

from megatron_adapt.errors import DataError

_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_XZ_MAGIC = b"\xfd7zXZ\x00"
_BLOCK_BYTES = 1 << 13  # compressed; repetitive text is a thousand times as long
DAMAGE = (zstandard.ZstdError, zlib.error, lzma.LZMAError, EOFError, OSError)
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


def decompress(raw: BinaryIO) -> Any:
    """Return a reader of the text behind an open file: itself, unless its first bytes say gzip, zstd or xz."""
    magic = raw.read(len(_XZ_MAGIC))
    raw.seek(0)
    if magic.startswith(_GZIP_MAGIC):
        return gzip.open(raw, "rb")
    if magic.startswith(_ZSTD_MAGIC):
        return io.BufferedReader(_ZstdStream(raw), 1 << 20)
    if magic == _XZ_MAGIC:
        return lzma.open(raw, "rb")
    return raw


def damage_error(where: str, error: Exception) -> DataError:
    """Return the error of a file that cannot be decompressed to its end; ``DAMAGE`` are the exceptions that tell."""
    return DataError(f"{where}: the compressed file is damaged ({error}); fetch it again")
