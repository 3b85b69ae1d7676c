"""Read and write documents: JSON lines, plain text or parquet, recognised by content.

Reads: what ``chunks.py`` reads. Writes: ``.jsonl.zst``. Guarantees: documents keep their order; a line that is no
document stops the reader with ``file:line``, and so does a compressed file that ends too early; memory is a megabyte of
text, or the longest document or row group, whatever the file's size.
"""

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import orjson
import zstandard

from megatron_adapt.config.corpus import PlainText
from megatron_adapt.corpus.chunks import cut_files
from megatron_adapt.errors import DataError

try:
    import megatron_adapt._csrc as _csrc
except ImportError:
    _csrc = None

_READ_BYTES = 1 << 20


def read_documents(paths: Iterable[Path], plain_text: PlainText = "none") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every document of the files with its place ``file:line``; blank lines are skipped.

    Args:
        paths: the files.
        plain_text: what a document is in plain text.

    Raises:
        ConfigError: a file is parquet and pyarrow is not installed.
        DataError: a file is missing or damaged, or a line is no JSON object.
    """
    number = 0
    for chunk in cut_files(list(paths), _READ_BYTES, plain_text):
        number = number if chunk.start else 0
        for line in io.BytesIO(chunk.read()):
            number += 1
            if not line.isspace():
                where = f"{chunk.path}:{number}"
                yield where, parse_line(line, where)


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


def find_text(line: bytes, text_key: bytes) -> bytes | None:
    """Return the text of one line in UTF-8, where that needs no closer look; always None without the C++ extension.

    A text that is found is the one that ``parse_line`` and ``get_text`` give, and not of white space alone.
    """
    return None if _csrc is None else _csrc.find_text(line, text_key)


def read_texts(paths: Iterable[Path], text_key: str, plain_text: PlainText = "none") -> Iterator[str]:
    """Yield the text of every document.

    Raises:
        DataError: as ``read_documents``; also a document without ``text_key`` or with a text that is no string.
    """
    for where, document in read_documents(paths, plain_text):
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
