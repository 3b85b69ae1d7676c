"""Put the documents of joined files into a random order that a seed decides.

Training does not need it: the windows of a source are read in a random order anyway. It is for programs that read the
files from front to back.

Guarantee: a permutation of the documents, the same for the same seed and number of documents on any machine.
Costs: the ids are written once more; 8 bytes a sequence of memory, about 3 microseconds a document. Documents are read
from all over the joined file, so it should lie on a disk without a moving head.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_adapt.data.windows import permute
from megatron_adapt.logs import show_progress

_BLOCK_DOCUMENTS = 1 << 16
_NUM_KEYS = 8


def shuffle_documents(
    ids: Path,
    table: Path,
    target_ids: Path,
    target_table: Path,
    *,
    dtype: np.dtype[Any],
    row: np.dtype[Any],
    seed: int,
    documents_D1: NDArray[np.int64] | None = None,
) -> None:
    """Write documents and their table in another order.

    Args:
        ids: ids of all documents end to end.
        table: a row for each sequence, with its number of ``tokens``.
        target_ids: where the ids go.
        target_table: where the rows go.
        dtype: type of an id.
        row: type of a row of the table.
        seed: what decides the order.
        documents_D1: first row of each document, and the number of rows; None: each is a document.
    """
    table_S, ids_N = np.memmap(table, row, "r"), np.memmap(ids, dtype, "r").view(np.ndarray)
    starts_S1 = np.concatenate([[0], np.cumsum(table_S["tokens"], dtype=np.int64)])
    num_documents = len(table_S) if documents_D1 is None else len(documents_D1) - 1
    digest = hashlib.blake2b(f"documents:{seed}".encode(), digest_size=8 * _NUM_KEYS).digest()
    keys = tuple(np.frombuffer(digest, "<u8").tolist())
    with (
        show_progress("shuffling", num_documents, "documents") as advance,
        target_ids.open("wb") as ids_file,
        target_table.open("wb") as table_file,
    ):
        for first in range(0, num_documents, _BLOCK_DOCUMENTS):
            places = np.arange(first, min(first + _BLOCK_DOCUMENTS, num_documents), dtype=np.int64)
            rows = firsts = permute(places, num_documents, keys)
            lasts = firsts + 1
            if documents_D1 is not None:
                firsts, lasts = documents_D1[firsts], documents_D1[lasts]
                rows = np.concatenate([np.arange(*pair) for pair in zip(firsts.tolist(), lasts.tolist(), strict=True)])
            for start, end in zip(starts_S1[firsts].tolist(), starts_S1[lasts].tolist(), strict=True):
                ids_file.write(ids_N[start:end].data)
            table_file.write(np.ascontiguousarray(table_S[rows]).data)
            advance(len(places))
