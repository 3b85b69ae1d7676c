"""Tokenised documents on disk in megatron-core's format: PREFIX.bin and PREFIX.idx.

``.bin`` holds the ids of all documents end to end. ``.idx``, little endian: 9 bytes ``MMIDIDX``, version (u64, 1),
type code (u8), number of sequences (u64), length of the last table (u64); then per sequence its length (i32) and its
first byte in ``.bin`` (i64), then the sequence at which each document begins, with the end appended (i64).
A sequence is a document, or a sentence of one (``preprocess_data --split-sentences``).

Guarantees: megatron-core's ``IndexedDataset`` reads the files back equal; they appear whole: ``.idx`` last, and
a ``.bin`` without it counts as nothing. Ids are ``uint16`` below a vocabulary of 65500, else ``int32``, as there.

Costs: writing keeps 4 bytes a sequence in memory, 12 where they are sentences; reading maps both files and touches the
lengths once.
Source of the format: megatron-core 0.16 ``core/datasets/indexed_dataset.py``.
"""

import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_adapt.errors import DataError
from megatron_adapt.files import replace_file

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_CODES: dict[int, np.dtype[Any]] = {4: np.dtype("<i4"), 8: np.dtype("<u2")}
_BLOCK_SEQUENCES = 1 << 20
_REMEDY = "tokenise the corpus again with tools/preprocess_data.py"


def bin_path(prefix: Path) -> Path:
    """Return the file of ids; ``with_suffix`` would lose a dot in the prefix."""
    return prefix.with_name(f"{prefix.name}.bin")


def idx_path(prefix: Path) -> Path:
    """Return the file of lengths and places."""
    return prefix.with_name(f"{prefix.name}.idx")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the type of an id on disk, as megatron-core's ``DType.optimal_dtype``."""
    return _CODES[8] if vocab_size < 65500 else _CODES[4]


class TokensWriter:
    """Appends documents to a ``.bin`` and collects their lengths; made by ``write_tokens``."""

    def __init__(self, file: BinaryIO, dtype: np.dtype[Any]) -> None:
        self._file = file
        self._lengths: list[NDArray[np.int32]] = []
        self._firsts: list[NDArray[np.int64]] = []
        self.dtype = dtype
        self.num_tokens = 0
        self.num_sequences = 0

    def add_documents(
        self, ids_N: NDArray[Any], lengths_S: NDArray[np.int32], firsts_D: NDArray[np.int64] | None = None
    ) -> None:
        """Append documents of S sequences.

        Args:
            ids_N: their ids end to end, of the writer's type.
            lengths_S: ids in each sequence; the sum is N.
            firsts_D: first of these sequences of each document, in all calls or none; None: each is a document.
        """
        assert ids_N.dtype == self.dtype
        assert int(lengths_S.sum(dtype=np.int64)) == len(ids_N)
        self._file.write(np.ascontiguousarray(ids_N).data)
        self._lengths.append(lengths_S.astype(np.int32))
        if firsts_D is not None:
            self._firsts.append(firsts_D + self.num_sequences)
        self.num_tokens += len(ids_N)
        self.num_sequences += len(lengths_S)

    def write_index(self, path: Path) -> None:
        """Write the index of all documents so far."""
        documents_D1 = np.concatenate([*self._firsts, [self.num_sequences]]) if self._firsts else None
        write_index(path, np.concatenate([np.empty(0, np.int32), *self._lengths]), self.dtype, documents_D1)


@contextmanager
def write_tokens(prefix: Path, vocab_size: int) -> Iterator[TokensWriter]:
    """Yield a writer; both files appear when the block ends without an exception.

    Files of the same name are replaced; between the two renames no ``.idx`` exists.
    """
    dtype = token_dtype(vocab_size)
    with replace_file(idx_path(prefix)) as idx, replace_file(bin_path(prefix)) as data:
        with data.open("wb") as file:
            writer = TokensWriter(file, dtype)
            yield writer
        writer.write_index(idx)
        idx_path(prefix).unlink(missing_ok=True)


def write_index(
    path: Path, lengths_S: NDArray[np.int32], dtype: np.dtype[Any], documents_D1: NDArray[np.int64] | None = None
) -> None:
    """Write an index.

    Args:
        path: the file.
        lengths_S: tokens of each sequence; may be a mapped file of any size.
        dtype: type of an id.
        documents_D1: first sequence of each document, and the number of sequences; None: each is a document.
    """
    code = next(code for code, known in _CODES.items() if known == dtype)
    num_sequences = len(lengths_S)
    num_starts = num_sequences + 1 if documents_D1 is None else len(documents_D1)
    blocks = [lengths_S[at : at + _BLOCK_SEQUENCES] for at in range(0, num_sequences, _BLOCK_SEQUENCES)]
    with path.open("wb") as file:
        file.write(_HEADER.pack(_MAGIC, _VERSION, code, num_sequences, num_starts))
        for block in blocks:
            file.write(block.astype("<i4").data)
        start = 0
        for block in blocks:
            ends = start + np.cumsum(block, dtype=np.int64)
            file.write(((ends - block) * dtype.itemsize).astype("<i8").data)
            start = int(ends[-1])
        for at in range(0, num_starts, _BLOCK_SEQUENCES):
            end = min(at + _BLOCK_SEQUENCES, num_starts)
            places = np.arange(at, end) if documents_D1 is None else documents_D1[at:end]
            file.write(places.astype("<i8").data)


@dataclass(frozen=True)
class TokensFile:
    """A mapped PREFIX.bin and PREFIX.idx."""

    prefix: Path
    tokens_N: NDArray[Any]
    "All ids end to end, mapped from disk; uint16 or int32."
    pointers_S: NDArray[np.int64]
    "First byte of each sequence in the .bin."
    documents_D1: NDArray[np.int64]
    "First sequence of each document, and the number of sequences."
    mapped: mmap.mmap
    "The .bin."

    @property
    def num_tokens(self) -> int:
        """Tokens in all documents."""
        return len(self.tokens_N)

    @property
    def num_documents(self) -> int:
        """Documents, empty ones included."""
        return len(self.documents_D1) - 1

    @property
    def num_sequences(self) -> int:
        """Sequences in all documents."""
        return len(self.pointers_S)

    def sequence_starts(self) -> NDArray[np.int64]:
        """Return the first token of each sequence and the number of tokens, ``[S + 1]``."""
        return np.append(self.pointers_S // self.tokens_N.itemsize, self.num_tokens)

    def starts(self) -> NDArray[np.int64]:
        """Return the first token of each document and the number of tokens: prefix sums of lengths, ``[D + 1]``."""
        starts_D1: NDArray[np.int64] = self.sequence_starts()[self.documents_D1]
        return starts_D1

    def lengths(self) -> NDArray[np.int64]:
        """Return the tokens in each document, ``[D]``."""
        return np.diff(self.starts())

    def expect_random_reads(self) -> None:
        """Ask the kernel not to read ahead: around a short slice it would fetch many times its size."""
        self.mapped.madvise(mmap.MADV_RANDOM)

    def prefetch(self, starts_N: NDArray[np.int64], count: int) -> None:
        """Ask the kernel to fetch slices of ``count`` tokens from ``starts_N`` into the file cache, all at once."""
        for start in (starts_N * self.tokens_N.itemsize).tolist():
            page = start // mmap.PAGESIZE * mmap.PAGESIZE
            size = min(start + count * self.tokens_N.itemsize, len(self.mapped)) - page
            self.mapped.madvise(mmap.MADV_WILLNEED, page, size)


def check_size(prefix: Path, num_tokens: int) -> None:
    """Compare the size of a ``.bin`` with the number of tokens its record names, without opening it.

    Raises:
        DataError: a file is missing, or has another size.
    """
    _require_files(prefix)
    size = bin_path(prefix).stat().st_size
    if size not in {num_tokens * dtype.itemsize for dtype in _CODES.values()}:
        raise DataError(f"{bin_path(prefix)}: {size} bytes are not {num_tokens} tokens; a file was changed: {_REMEDY}")


def read_tokens(prefix: Path) -> TokensFile:
    """Map the files of ``prefix``.

    Raises:
        DataError: a file is missing, is of another format, or the two do not belong together.
    """
    _require_files(prefix)
    path = idx_path(prefix)
    dtype, num_sequences, num_starts = _read_header(path)
    places = np.frombuffer(_map(path), np.uint8)
    ends = np.cumsum([_HEADER.size, 4 * num_sequences, 8 * num_sequences, 8 * num_starts])
    if num_sequences == 0:
        raise DataError(f"{path}: holds no documents; {_REMEDY}")
    if len(places) < ends[-1]:
        raise DataError(f"{path}: {len(places)} bytes instead of {ends[-1]}, the file is cut off; {_REMEDY}")
    lengths_S = places[ends[0] : ends[1]].view("<i4")
    pointers_S = places[ends[1] : ends[2]].view("<i8")
    documents_D1 = places[ends[2] : ends[3]].view("<i8")
    num_tokens = int(lengths_S.sum(dtype=np.int64))
    expected = num_tokens * dtype.itemsize
    if pointers_S[0] != 0 or pointers_S[-1] + int(lengths_S[-1]) * dtype.itemsize != expected:
        raise DataError(f"{path}: lengths and places of the documents do not agree; {_REMEDY}")
    if num_starts < 2 or documents_D1[0] != 0 or documents_D1[-1] != num_sequences:
        raise DataError(f"{path}: its documents do not cover its {num_sequences} sequences; {_REMEDY}")
    size = bin_path(prefix).stat().st_size
    if size != expected:
        raise DataError(
            f"{bin_path(prefix)}: {size} bytes where {path.name} describes {expected}; the files do not belong "
            f"together or one is cut off: {_REMEDY}"
        )
    if num_tokens == 0:
        raise DataError(f"{bin_path(prefix)}: holds no tokens; {_REMEDY}")
    mapped = _map(bin_path(prefix))
    return TokensFile(prefix, np.frombuffer(mapped, dtype), pointers_S, documents_D1, mapped)


def _require_files(prefix: Path) -> None:
    for path in (idx_path(prefix), bin_path(prefix)):
        if not path.is_file():
            raise DataError(f"{path}: no such file; check the prefix or {_REMEDY}")


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _read_header(path: Path) -> tuple[np.dtype[Any], int, int]:
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise DataError(f"{path}: no megatron-core index (it does not begin with MMIDIDX); check the prefix")
    _, version, code, num_sequences, num_starts = _HEADER.unpack(header)
    if version != _VERSION:
        raise DataError(f"{path}: version {version} of the format is unknown; {_REMEDY}")
    if code not in _CODES:
        raise DataError(f"{path}: type code {code} is neither 4 (int32) nor 8 (uint16); {_REMEDY}")
    return _CODES[code], num_sequences, num_starts
