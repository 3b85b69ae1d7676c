"""Rows for new tokens, computed from the rows of the old ones.

``FILL_METHODS`` is the table of methods; each is one function of the form ``FillMethod``. A method yields rows in
fp32, a few thousand at a time, and knows nothing of files or of input and head: the caller runs it on each matrix.

- ``subtoken_mean``: the mean of the rows of the old pieces that spelt the token before it was one (as in Swallow,
  Fujii et al. 2024, arXiv 2404.17790). A piece that occurs twice counts twice.
- ``mean``: the mean of all old rows (Hewitt 2021, "Initializing New Word Embeddings").
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, islice
from typing import Protocol

import torch

_logger = logging.getLogger(__name__)
_CHUNK_TOKENS = 2048


class BaseRows(Protocol):
    """The old rows of one matrix, [V, H] in the type of the model."""

    @property
    def num_rows(self) -> int:
        """V, the old vocabulary."""

    def gather(self, ids: Sequence[int]) -> torch.Tensor:
        """Return the rows of ``ids``, in that order: [len(ids), H]."""

    def mean(self) -> torch.Tensor:
        """Return the mean of all rows: [H], fp64."""


class FillMethod(Protocol):
    """Computes the rows of new tokens."""

    def __call__(self, base: BaseRows, pieces: Mapping[int, Sequence[int]]) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Yield new ids and their rows.

        Args:
            base: the old rows.
            pieces: new id to the old ids that spelt the token, possibly none.

        Yields:
            n ids and their rows [n, H] in fp32; every id of ``pieces`` comes exactly once, in order.
        """


def fill_subtoken_mean(base: BaseRows, pieces: Mapping[int, Sequence[int]]) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Give each token the mean of the rows of its old pieces, accumulated in fp32; without pieces, that of all rows."""
    mean_H = base.mean().float()
    num_orphans = 0
    for ids in _divide(pieces):
        rows_NH = _average_pieces(base, [pieces[new] for new in ids])
        orphans = [at for at, new in enumerate(ids) if not pieces[new]]
        rows_NH[orphans] = mean_H
        num_orphans += len(orphans)
        yield ids, rows_NH
    if num_orphans:
        _logger.warning("%d new tokens have no old pieces; they take the mean of all rows", num_orphans)


def _average_pieces(base: BaseRows, pieces: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return the mean of the old rows of each token's pieces: [len(pieces), H] in fp32, zero where there are none."""
    flat = [old for olds in pieces for old in olds]
    used = sorted(set(flat))
    position = {old: at for at, old in enumerate(used)}
    ends = list(accumulate(len(olds) for olds in pieces))
    offsets = torch.tensor([0, *ends[:-1]])
    index = torch.tensor([position[old] for old in flat], dtype=torch.long)
    gathered_VH = base.gather(used).float()
    return torch.nn.functional.embedding_bag(index, gathered_VH, offsets, mode="mean")


def fill_mean(base: BaseRows, pieces: Mapping[int, Sequence[int]]) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Give each token the mean of all old rows."""
    mean_H = base.mean().float()
    for ids in _divide(pieces):
        yield ids, mean_H.repeat(len(ids), 1)


def count_fill_bytes(pieces: Mapping[int, Sequence[int]], width: int, itemsize: int) -> int:
    """Return about how many bytes of memory ``FILL_METHODS`` take for a matrix of ``width`` columns."""
    most = 0
    for ids in _divide(pieces):
        num_used = len({old for new in ids for old in pieces[new]})
        # The old rows as they are stored and in fp32; the new ones, those of the chunk before, and one of them cast.
        most = max(most, num_used * (itemsize + 4) + len(ids) * (4 + 4 + itemsize))
    return most * width


def _divide(pieces: Mapping[int, Sequence[int]]) -> Iterator[list[int]]:
    """Yield the new ids in chunks."""
    ids = iter(pieces)
    while chunk := list(islice(ids, _CHUNK_TOKENS)):
        yield chunk


FILL_METHODS: dict[str, FillMethod] = {
    "subtoken_mean": fill_subtoken_mean,
    "mean": fill_mean,
}
