"""Parts of the output that workers write, and the joining of them.

A worker writes one *part* for every chunk and key: the ids of its documents end to end, then a table of their
sequences (documents, or sentences of them): tokens and those of the prompt (i32 each); -1 in place of the prompt
marks a sequence that goes on with the document of the one before.
``Joiner`` appends the parts, in the order of the chunks, to one file of ids and one table for every key, while the
workers go on; parts that are joined and on disk are deleted. So the disk holds the output once and a little more, and
nothing is left to copy at the end.

Guarantees: a part appears whole (renamed). The place of a part in the joined file follows from the counts in the
manifest, so joining can be interrupted anywhere and repeated: ``Joiner`` cuts the joined files to what is certain.
Parts are deleted only when the joined files and the manifest are on disk, so this holds for a loss of power too.
"""

import os
import zlib
from array import array
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_adapt.data.index import bin_path, idx_path, write_index
from megatron_adapt.data.manifest import ChunkRow, Manifest, PartCounts
from megatron_adapt.data.prompts import prompts_path
from megatron_adapt.data.record import record_path
from megatron_adapt.data.shuffle import shuffle_documents
from megatron_adapt.errors import DataError

_SYNC_BYTES = 64 << 20
"Parts are deleted in groups of at least this size."
_COPY_BYTES = 1 << 20
_SEQUENCE = np.dtype([("tokens", "<i4"), ("prompt", "<i4")])
_CONTINUES = -1


def part_path(folder: Path, number: int, key_at: int) -> Path:
    """Return the file of chunk ``number`` and the key at this place."""
    return folder / f"{number:08d}.{key_at}.part"


class PartWriter:
    """Writes one part; a context manager that removes what was not finished."""

    def __init__(self, path: Path, dtype: np.dtype[Any], ending: Sequence[int]) -> None:
        self._path = path
        self._partial = path.with_name(f"{path.name}.{os.getpid()}")
        self._dtype = dtype
        self._ending = np.array(ending, dtype)
        self._table = array("i")
        "Row after row."
        self._num_documents = 0
        self._counts = {"skipped_documents": 0, "tokens": 0, "bytes": 0, "checksum": 0}

    def __enter__(self) -> "PartWriter":
        self._file = self._partial.open("wb")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._partial.unlink(missing_ok=True)

    def add_documents(
        self,
        documents: Sequence[NDArray[Any]],
        prompts: Sequence[int],
        num_bytes: int,
        sentences: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Append documents, each with the ending; those without any id are left out.

        Args:
            documents: their ids, of any type.
            prompts: how many of these are of the prompt.
            num_bytes: bytes of text of all together.
            sentences: ids in each sentence of each document; those without any are left out. None: they are not cut.
        """
        kept = [ids for ids in documents if len(ids)]
        self.skip_documents(len(documents) - len(kept))
        self._counts["bytes"] += num_bytes
        if not kept:
            return
        if sentences is None:
            ending = len(self._ending)
            pairs = ((ids, prompt) for ids, prompt in zip(documents, prompts, strict=True) if len(ids))
            self._table.extend(number for ids, prompt in pairs for number in (len(ids) + ending, prompt))
        else:
            for lengths in sentences:
                self._add_sentences([length for length in lengths if length])
        self._num_documents += len(kept)
        arrays = [array for ids in kept for array in (ids, self._ending)] if len(self._ending) else kept
        ids_N = np.concatenate(arrays, dtype=self._dtype, casting="unsafe")  # ids are below the vocabulary's size
        self._counts["tokens"] += len(ids_N)
        self._write(ids_N)

    def _add_sentences(self, lengths: list[int]) -> None:
        mark = 0
        for at, length in enumerate(lengths, start=1):
            self._table.extend((length + len(self._ending) * (at == len(lengths)), mark))
            mark = _CONTINUES

    def skip_documents(self, number: int) -> None:
        """Count documents that are left out."""
        self._counts["skipped_documents"] += number

    def finish(self) -> PartCounts:
        """Give the part its name."""
        table_S = np.array(self._table, "<i4").view(_SEQUENCE)
        self._write(table_S)
        self._file.close()
        self._partial.replace(self._path)
        return PartCounts(documents=self._num_documents, sequences=len(table_S), **self._counts)

    def _write(self, array: NDArray[Any]) -> None:
        self._file.write(array.data)
        self._counts["checksum"] = zlib.crc32(array.data, self._counts["checksum"])


class Joiner:
    """Appends the parts of finished chunks to the joined files, in order; a context manager.

    Raises:
        DataError: the folder lacks what its manifest says is there.
    """

    def __init__(self, manifest: Manifest, num_keys: int, dtype: np.dtype[Any]) -> None:
        self._manifest = manifest
        self._keys = range(num_keys)
        self._dtype = dtype
        self._next = 0
        "The first chunk that is not joined."
        self._deletable: list[Path] = []
        self._deletable_bytes = 0
        self._syncing: Future[None] | None = None
        "The last group."

    def __enter__(self) -> "Joiner":
        self._next = _recover(self._manifest, self._keys, self._dtype)
        joined = [self._manifest.rows[number] for number in range(self._next)]
        with ExitStack() as stack:
            self._files = [
                [
                    stack.enter_context(_open_at(ids_file(self._manifest.folder, at), tokens * self._dtype.itemsize)),
                    stack.enter_context(
                        _open_at(table_file(self._manifest.folder, at), sequences * _SEQUENCE.itemsize)
                    ),
                ]
                for at in self._keys
                for tokens, sequences in [_sum_parts(joined, at)]
            ]
            self._thread = stack.enter_context(ThreadPoolExecutor(1))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def join(self) -> None:
        """Append all parts whose turn it is."""
        while (row := self._manifest.rows.get(self._next)) is not None:
            for at in self._keys:
                path = part_path(self._manifest.folder, row.number, at)
                num_bytes = row.parts[at].tokens * self._dtype.itemsize
                with path.open("rb") as part:
                    _copy(part, self._files[at][0], num_bytes)
                    _copy(part, self._files[at][1], row.parts[at].sequences * _SEQUENCE.itemsize)
                self._deletable.append(path)
                self._deletable_bytes += num_bytes
            self._next += 1
            if self._deletable_bytes >= _SYNC_BYTES and (self._syncing is None or self._syncing.done()):
                self._start_sync()

    def sync(self) -> None:
        """Bring the joined files to disk and delete their parts."""
        self._start_sync()
        assert self._syncing is not None
        self._syncing.result()

    def _start_sync(self) -> None:
        """Do so with what is joined now, in a thread: the workers need not wait for the disk."""
        if self._syncing is not None:
            self._syncing.result()  # raises what it met
        files = [file for pair in self._files for file in pair]
        for file in files:
            file.flush()
        descriptors = [file.fileno() for file in files]
        self._syncing = self._thread.submit(_sync_joined, descriptors, self._manifest, self._deletable)
        self._deletable, self._deletable_bytes = [], 0


def ids_file(folder: Path, key_at: int) -> Path:
    """Return the joined ids of a key."""
    return folder / f"joined.{key_at}.bin"


def table_file(folder: Path, key_at: int) -> Path:
    """Return the joined table of a key's sequences."""
    return folder / f"joined.{key_at}.table"


def _index_file(folder: Path, key_at: int) -> Path:
    return folder / f"joined.{key_at}.idx"


def _shuffled_ids(folder: Path, key_at: int) -> Path:
    return folder / f"shuffled.{key_at}.bin"


def _shuffled_table(folder: Path, key_at: int) -> Path:
    return folder / f"shuffled.{key_at}.table"


def _prompts_file(folder: Path, key_at: int) -> Path:
    return folder / f"joined.{key_at}.prompts"


def _sum_parts(rows: Sequence[ChunkRow], key_at: int) -> tuple[int, int]:
    """Return tokens and sequences."""
    return sum(row.parts[key_at].tokens for row in rows), sum(row.parts[key_at].sequences for row in rows)


def _open_at(path: Path, size: int) -> BinaryIO:
    """Open a file for appending, cut to ``size``."""
    path.touch()
    found = path.stat().st_size
    if found < size:
        raise DataError(f"{path}: {found} bytes where the manifest counts {size}; remove {path.parent} and begin anew")
    file = path.open("r+b")
    file.truncate(size)
    file.seek(size)
    return file


def _recover(manifest: Manifest, keys: range, dtype: np.dtype[Any]) -> int:
    """Drop the rows whose parts are lost and the files that no row names; return the first chunk that is not joined."""

    def list_parts(number: int) -> list[Path]:
        return [part_path(manifest.folder, number, at) for at in keys]

    # Parts are deleted in order, when they are joined: one that is gone says that its chunk is.
    following = 0
    while following in manifest.rows and not all(path.exists() for path in list_parts(following)):
        following += 1
    for number in [number for number in manifest.rows if number >= following]:
        parts = manifest.rows[number].parts
        if not all(_is_whole(*pair) for pair in zip(list_parts(number), parts, strict=True)):
            del manifest.rows[number]
    known = {path for number in manifest.rows if number >= following for path in list_parts(number)}
    for path in manifest.folder.glob("*.part*"):
        if path not in known:
            path.unlink(missing_ok=True)
    return following


def _is_whole(path: Path, part: PartCounts) -> bool:
    return path.exists() and zlib.crc32(path.read_bytes()) == part.checksum


def _sync_joined(descriptors: Sequence[int], manifest: Manifest, parts: Sequence[Path]) -> None:
    for descriptor in descriptors:
        os.fsync(descriptor)
    manifest.sync()
    for path in parts:
        path.unlink()


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _copy(source: BinaryIO, target: BinaryIO, num_bytes: int) -> None:
    """Append the next bytes of a file to another; a copy inside the kernel is no faster."""
    while num_bytes:
        block = source.read(min(num_bytes, _COPY_BYTES))
        assert block
        target.write(block)
        num_bytes -= len(block)


def _find_documents(table: Path) -> NDArray[np.int64]:
    """Return the first sequence of each document, and the number of sequences."""
    table_S = np.memmap(table, _SEQUENCE, "r")
    return np.append(np.flatnonzero(table_S["prompt"] != _CONTINUES), len(table_S))


def publish(manifest: Manifest, prefixes: Sequence[Path], dtype: np.dtype[Any]) -> None:
    """Move the joined, synced files of a run to their places, ``.idx`` last; shuffled first if the run asks for it.

    May be repeated after it was interrupted. Files of the same name are replaced; between the two renames no ``.idx``
    exists.
    """
    folder, seed = manifest.folder, manifest.header["shuffle_seed"]
    find_ids, find_table = (ids_file, table_file) if seed is None else (_shuffled_ids, _shuffled_table)
    if not manifest.is_finished:
        for at in range(len(prefixes)):
            is_cut = manifest.header["split_sentences"]
            if seed is not None:
                shuffle_documents(
                    ids_file(folder, at),
                    table_file(folder, at),
                    find_ids(folder, at),
                    find_table(folder, at),
                    dtype=dtype,
                    row=_SEQUENCE,
                    seed=seed,
                    documents_D1=_find_documents(table_file(folder, at)) if is_cut else None,
                )
                _sync(find_ids(folder, at))
            table_S = np.memmap(find_table(folder, at), _SEQUENCE, "r")
            documents_D1 = _find_documents(find_table(folder, at)) if is_cut else None
            write_index(_index_file(folder, at), table_S["tokens"], dtype, documents_D1)
            _sync(_index_file(folder, at))
            if not is_cut and table_S["prompt"].any():
                table_S["prompt"].tofile(_prompts_file(folder, at))
                _sync(_prompts_file(folder, at))
        manifest.finish()
    for at, prefix in enumerate(prefixes):
        if find_ids(folder, at).exists():
            record_path(prefix).unlink(missing_ok=True)
            idx_path(prefix).unlink(missing_ok=True)
            prompts_path(prefix).unlink(missing_ok=True)
            find_ids(folder, at).replace(bin_path(prefix))
        if _prompts_file(folder, at).exists():
            _prompts_file(folder, at).replace(prompts_path(prefix))
        if _index_file(folder, at).exists():
            _index_file(folder, at).replace(idx_path(prefix))
