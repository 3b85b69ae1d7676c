"""Put the documents of joined files into a random order that a seed decides.

Training does not need it: the windows of a source are read in a random order anyway. It is for programs that read the
files from front to back.

Guarantee: a permutation of the documents, the same for the same seed and number of documents on any machine.
Costs: the ids are written once more; 8 bytes a document of memory, about 3 microseconds a document. Documents are read
from all over the joined file, so it should lie on a disk without a moving head.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from megatron_adapt.data.windows import permute
from megatron_adapt.logs import show_progress

_BLOCK_DOCUMENTS = 1 << 16
_NUM_KEYS = 8


def shuffle_documents(
    ids: Path, table: Path, target_ids: Path, target_table: Path, *, dtype: np.dtype[Any], row: np.dtype[Any], seed: int
) -> None:
    """Write documents and their table in another order.

    Args:
        ids: ids of all documents end to end.
        table: a row for each document, with its number of ``tokens``.
        target_ids: where the ids go.
        target_table: where the rows go.
        dtype: type of an id.
        row: type of a row of the table.
        seed: what decides the order.
    """
    table_D, ids_N = np.memmap(table, row, "r"), np.memmap(ids, dtype, "r").view(np.ndarray)
    starts_D1 = np.concatenate([[0], np.cumsum(table_D["tokens"], dtype=np.int64)])
    digest = hashlib.blake2b(f"documents:{seed}".encode(), digest_size=8 * _NUM_KEYS).digest()
    keys = tuple(np.frombuffer(digest, "<u8").tolist())
    with (
        show_progress("shuffling", len(table_D), "documents") as advance,
        target_ids.open("wb") as ids_file,
        target_table.open("wb") as table_file,
    ):
        for first in range(0, len(table_D), _BLOCK_DOCUMENTS):
            places = np.arange(first, min(first + _BLOCK_DOCUMENTS, len(table_D)), dtype=np.int64)
            chosen = permute(places, len(table_D), keys)
            for start, end in zip(starts_D1[chosen].tolist(), starts_D1[chosen + 1].tolist(), strict=True):
                ids_file.write(ids_N[start:end].data)
            table_file.write(np.ascontiguousarray(table_D[chosen]).data)
            advance(len(places))
