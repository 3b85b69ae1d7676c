"""The folder of an unfinished run, PREFIX.unfinished, and the list of what is done in it.

Files: ``lock``, held while a job runs; ``manifest.jsonl``; the parts and joined files of ``shards.py``. The first line
of the manifest is the header: everything but the input that decides the output. Every further line is a
``ChunkRow``: a chunk of the input by the hash of its bytes, and what its parts hold. The last line of a whole run is
``{"finished": true}``; then the joined files are moved to their places.

Guarantees: a line is appended only when its parts are written, so a run killed at any moment finds only true lines
(and perhaps half a last one, which is dropped). Two jobs never write into one folder.
"""

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from megatron_adapt.errors import ConfigError

_MANIFEST = "manifest.jsonl"
_LOCK = "lock"
_FINISHED = {"finished": True}


@dataclass(frozen=True, kw_only=True, slots=True)
class PartCounts:
    """What one part holds: the documents of one chunk under one key."""

    documents: int
    sequences: int
    "Rows of the table: sentences, or documents where they are not cut."
    skipped_documents: int
    "Empty ones, left out."
    tokens: int
    bytes: int
    "Of text in UTF-8."
    checksum: int
    "CRC-32 of the part's file."


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkRow:
    """A finished chunk of the input."""

    number: int
    input_hash: str
    lines: int
    parts: tuple[PartCounts, ...]
    "In the order of the keys."
    skipped_lines: tuple[tuple[int, str], ...]
    "Lines of the chunk, from 0, that are no documents, and why."


def unfinished_folder(prefix: Path) -> Path:
    """Return the folder in which a run that writes ``prefix`` keeps what is done."""
    return prefix.with_name(f"{prefix.name}.unfinished")


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Create the folder and hold its lock; a folder in which nothing is done yet is removed at the end.

    Raises:
        ConfigError: another job holds it.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = (folder / _LOCK).open("w")
        except FileNotFoundError:
            continue  # the job that held it has just finished and removed it
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"{folder}: another job is writing this output; wait for it, or name another --output-prefix"
                ) from None
            if not _is_same(lock.fileno(), folder / _LOCK):
                continue
            try:
                yield
            finally:
                if _is_same(lock.fileno(), folder / _LOCK) and len(_read_lines(folder / _MANIFEST)) < 2:
                    remove_folder(folder)
            return


def _is_same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def remove_folder(folder: Path) -> None:
    """Remove the folder, the lock last."""
    clear_folder(folder)
    (folder / _LOCK).unlink()
    with suppress(OSError):  # the next job is in it already
        folder.rmdir()


def clear_folder(folder: Path) -> None:
    """Remove everything but the lock; the manifest first, without which the rest counts as nothing."""
    (folder / _MANIFEST).unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.name != _LOCK:
            path.unlink(missing_ok=True)


class Manifest:
    """The list of finished chunks of one run; made by ``open_manifest``."""

    def __init__(self, folder: Path, header: Mapping[str, Any], rows: dict[int, ChunkRow], is_finished: bool) -> None:
        self.folder = folder
        self.header = header
        self.rows = rows
        "By number of the chunk."
        self.is_finished = is_finished
        "All chunks are done; some files may be in their places already."
        self._file = (folder / _MANIFEST).open("ab")

    def add_row(self, row: ChunkRow) -> None:
        """Append a row; its parts are written."""
        self.rows[row.number] = row
        self._append(asdict(row))

    def finish(self) -> None:
        """Say that all is done, durably."""
        if not self.is_finished:
            self.is_finished = True
            self._append(_FINISHED)
            self.sync()

    def _append(self, value: Mapping[str, Any]) -> None:
        self._file.write(orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE))
        self._file.flush()

    def sync(self) -> None:
        """Wait until all lines are on disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def open_manifest(folder: Path, header: Mapping[str, Any], *, discard: bool) -> Manifest:
    """Open the manifest of a locked folder, or begin it.

    Args:
        folder: the folder.
        header: what decides the output. ``chunk_bytes`` is that of the run that began it.
        discard: begin anew where the header is another.

    Raises:
        ConfigError: the header is another and ``discard`` is off.
    """
    path = folder / _MANIFEST
    lines = _read_lines(path)
    stored = lines[0] if lines else {}
    others = sorted(
        name for name in {*header, *stored} if name != "chunk_bytes" and stored.get(name) != header.get(name)
    )
    if stored and others and not discard:
        raise ConfigError(
            f"{folder}: an unfinished run with another {', '.join(others)} lies there; finish it with the old "
            "settings, or add --overwrite to begin anew"
        )
    if not stored or others:
        clear_folder(folder)
        lines = [dict(header)]
    # Also drops half a last line, behind which nothing may be appended.
    partial = path.with_suffix(".partial")
    partial.write_bytes(b"".join(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE) for line in lines))
    partial.replace(path)
    is_finished = lines[-1] == _FINISHED
    rows = [_read_row(line) for line in (lines[1:-1] if is_finished else lines[1:])]
    return Manifest(folder, lines[0], {row.number: row for row in rows}, is_finished)


def is_finished(folder: Path) -> bool:
    """Tell whether everything is done but the moving of files to their places."""
    return _read_lines(folder / _MANIFEST)[-1:] == [_FINISHED]


def read_header(folder: Path) -> dict[str, Any]:
    """Return the header of an unfinished run; empty where there is none."""
    lines = _read_lines(folder / _MANIFEST)
    return lines[0] if lines else {}


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    found = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            value = orjson.loads(line)
        except orjson.JSONDecodeError:
            break
        if not line.endswith(b"\n") or not isinstance(value, dict):
            break
        found.append(value)
    return found


def _read_row(line: Mapping[str, Any]) -> ChunkRow:
    parts = tuple(PartCounts(**part) for part in line["parts"])
    skipped = tuple((number, reason) for number, reason in line["skipped_lines"])
    return ChunkRow(**{**line, "parts": parts, "skipped_lines": skipped})
