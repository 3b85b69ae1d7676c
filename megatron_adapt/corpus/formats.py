"""Plain text and parquet as JSON lines, so that everything behind a file's reader knows one format.

Documents of plain text get the key ``text``; the columns of parquet are the keys. Line N of the result is line N of
the text, or row N of the table, so a message that counts lines is right for the file itself.
"""

import re
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from megatron_adapt.errors import ConfigError, DataError

PARQUET_MAGIC = b"PAR1"
_BOM = b"\xef\xbb\xbf"
_ROWS = 1024
_UNWRITABLE = re.compile(rb'["\\\x00-\x1f]')


def convert_paragraphs(data: bytes) -> bytes:
    """Return a document for every run of lines that are not blank."""
    found: list[bytes] = []
    for is_blank, group in groupby(BytesIO(data), bytes.isspace):
        lines = list(group)
        if not is_blank:
            found.append(_write_document(b"".join(lines)))
        found.append(b"\n" * len(lines))
    return b"".join(found)


def convert_file(data: bytes) -> bytes:
    """Return the document that is the whole text."""
    if not data or data.isspace():
        return data
    return _write_document(data) + b"\n" * (data.count(b"\n") + (not data.endswith(b"\n")))


def remove_mark(data: bytes) -> bytes:
    """Remove the byte order mark with which some editors begin a file."""
    return data.removeprefix(_BOM)


def _write_document(data: bytes) -> bytes:
    try:
        return orjson.dumps({"text": data.decode().strip("\r\n")})
    except UnicodeDecodeError:  # passed on: who parses the line says so, or skips it
        return b'{"text":"' + _UNWRITABLE.sub(b"?", data) + b'"}'


def list_row_groups(path: Path) -> list[tuple[int, int]]:
    """Return rows and bytes (uncompressed) of every row group.

    Raises:
        ConfigError: pyarrow is not installed.
        DataError: the file is damaged.
    """
    with path.open("rb") as raw:
        metadata = _open_parquet(path, raw).metadata
    groups = (metadata.row_group(at) for at in range(metadata.num_row_groups))
    return [(group.num_rows, group.total_byte_size) for group in groups]


def convert_row_groups(path: Path, start: int, end: int) -> bytes:
    """Return the rows of the groups ``[start, end)``.

    Raises:
        ConfigError: pyarrow is not installed.
        DataError: the file is damaged.
    """
    lines: list[bytes] = []
    with path.open("rb") as raw:
        file = _open_parquet(path, raw)
        try:
            for batch in file.iter_batches(_ROWS, row_groups=list(range(start, end)), use_threads=False):
                lines += (orjson.dumps(row, str, orjson.OPT_APPEND_NEWLINE) for row in batch.to_pylist())
        except (OSError, ValueError) as error:  # pyarrow's own are of these types
            raise _parquet_error(path, error) from None
    return b"".join(lines)


def _open_parquet(path: Path, raw: BinaryIO) -> Any:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ConfigError(
            f"{path}: parquet needs pyarrow, which is not installed; pip install 'megatron-adapt[data]'"
        ) from None
    try:
        return ParquetFile(raw)
    except (OSError, ValueError) as error:
        raise _parquet_error(path, error) from None


def _parquet_error(path: Path, error: Exception) -> DataError:
    reason = " ".join(str(error).split())
    return DataError(f"{path}: the parquet file is damaged ({reason}); fetch it again")
