"""Weighted old ids for many new ones, in arrays, and the rows they make.

A mixture of a few hundred thousand entries takes 12 bytes for each; as lists of Python it would take 80.
``combine_mixtures`` adds up at most 8192 distinct old rows at a time: at width 4096, old rows in bf16, 0.2 GB.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_adapt.vocab.rows import CHUNK_ROWS, BaseRows, combine_rows

MAX_USED = 8192
"Distinct old rows that are held at a time, or those of one mixture where it has more."


@dataclass(frozen=True, kw_only=True)
class Mixtures:
    """N mixtures: numbers and weights [sum of their lengths], one after the other."""

    starts: np.ndarray
    "Where each begins, and where the last ends: [N + 1], int64."
    numbers: np.ndarray
    "int32"
    weights: np.ndarray
    "fp32; those of a mixture sum to 1."

    @classmethod
    def of(cls, lengths: np.ndarray, numbers: np.ndarray, weights: np.ndarray) -> "Mixtures":
        """Return mixtures of these lengths."""
        starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        return cls(starts=starts, numbers=numbers.astype(np.int32), weights=weights.astype(np.float32))

    @classmethod
    def join(cls, parts: Sequence["Mixtures"]) -> "Mixtures":
        """Return the mixtures of all parts, in order."""
        lengths, numbers, weights = (
            np.concatenate([np.zeros(0, kind), *(getattr(part, name) for part in parts)])
            for name, kind in (("lengths", np.int64), ("numbers", np.int32), ("weights", np.float32))
        )
        return cls.of(lengths, numbers, weights)

    @property
    def lengths(self) -> np.ndarray:
        """How many entries each mixture has: [N]."""
        return np.diff(self.starts)

    def rename(self, ids: np.ndarray) -> "Mixtures":
        """Return mixtures of ``ids[number]`` in place of each number."""
        return Mixtures(starts=self.starts, numbers=ids[self.numbers].astype(np.int32), weights=self.weights)

    def spread(self, places: np.ndarray, num_places: int) -> "Mixtures":
        """Return ``num_places`` mixtures: these at ``places``, which ascend, and empty ones elsewhere."""
        lengths = np.zeros(num_places, np.int64)
        lengths[places] = self.lengths
        return Mixtures.of(lengths, self.numbers, self.weights)


def combine_mixtures(
    base: BaseRows, ids: Sequence[int], mixtures: Mixtures
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Yield the weighted sum of old rows for each new id, accumulated in fp32.

    Args:
        base: the old rows.
        ids: the new ids.
        mixtures: their old ids; an empty one gives a row of zeros.

    Yields:
        n ids and their rows [n, H] in fp32; every id comes exactly once, in order.
    """
    for start, stop in _divide(mixtures):
        cuts = list(zip(mixtures.starts[start:stop], mixtures.starts[start + 1 : stop + 1], strict=True))
        olds = {new: mixtures.numbers[a:b].tolist() for new, (a, b) in zip(ids[start:stop], cuts, strict=True)}
        shares = {new: mixtures.weights[a:b].tolist() for new, (a, b) in zip(ids[start:stop], cuts, strict=True)}
        yield from combine_rows(base, olds, shares)


def _divide(mixtures: Mixtures) -> Iterator[tuple[int, int]]:
    used: set[int] = set()
    start, num_mixtures = 0, len(mixtures.starts) - 1
    for at in range(num_mixtures):
        added = set(mixtures.numbers[mixtures.starts[at] : mixtures.starts[at + 1]].tolist()) - used
        if at - start == CHUNK_ROWS or (at > start and len(used) + len(added) > MAX_USED):
            yield start, at
            start, used = at, set()
            added = set(mixtures.numbers[mixtures.starts[at] : mixtures.starts[at + 1]].tolist())
        used |= added
    if start < num_mixtures:
        yield start, num_mixtures
