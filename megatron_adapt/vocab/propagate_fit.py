"""The linear map from the vocabulary rows of a base model to those of its instruct model (LEP, arXiv 2412.21140).

With A the base's rows, B the instruct model's and T the matrix that writes each new token as the mean of the old pieces
that spell it, the map is ``D = argmin |T A D - T B|`` (*conversion*), or the same over the tokens that both tokenizers
have (*overlap*). No intercept, no penalty; where rows do not span all columns, the least D.

1. ``list_equations`` says which old rows stand for which new token: the rows of T.
2. ``fit_propagation`` adds up X^T X and X^T Y in fp64, a chunk of tokens at a time, and solves by eigenvalues
   (``linear.solve_least_norm``).

Why squares: the paper's ``lstsq`` takes both matrices whole in fp64, ten gigabytes for 160,000 tokens of width 4096,
and as much again to work in. In fp64 the squares keep 8 digits at a condition number of 1e4, more than the
rows have that are stored; in fp32 they would keep none.
Costs: two products of tokens x H x H (of X^T X little more than the half), then an eigenvalue decomposition; memory of
about six matrices H x H in fp64 (0.8 GB at width 4096) and a chunk of rows.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from megatron_adapt.tokenizer.id_map import IdMap
from megatron_adapt.vocab.linear import add_squares, solve_least_norm
from megatron_adapt.vocab.rows import CHUNK_ROWS

Gather = Callable[[Sequence[int]], torch.Tensor]
"Returns the rows of ids, in that order: [n, H]."
NUM_SQUARES = 6
"Matrices H x H in fp64 that a fit holds at its peak."
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Propagation:
    """The map of rows, fp64."""

    weight_HH: torch.Tensor
    num_equations: int
    rank: int
    error: float
    "Share of the squares of Y that the map does not give."

    def apply(self, rows_NH: torch.Tensor) -> torch.Tensor:
        """Map rows [n, H], fp64."""
        return rows_NH.double() @ self.weight_HH


def list_equations(id_map: IdMap, changed: frozenset[int], *, only_shared: bool) -> list[list[int]]:
    """List, for the new tokens that have any, the old ids whose mean stands for them.

    Args:
        id_map: of the new tokenizer.
        changed: old ids that the instruct model uses for another token.
        only_shared: leave the tokens out that the old tokenizer lacks.
    """
    found = []
    for index in range(id_map.vocab_size):
        old = id_map.old_id(index)
        pieces = [old] if old is not None else [] if only_shared else id_map.pieces[index]
        if pieces and not changed.intersection(pieces):
            found.append(pieces)
    return found


def fit_propagation(base: Gather, instruct: Gather, equations: Sequence[Sequence[int]], where: str) -> Propagation:
    """Fit the map on the means of old rows.

    Args:
        base: rows of the base model.
        instruct: rows of the instruct model, by the same ids.
        equations: the old ids of each mean.
        where: the matrix, for messages.
    """
    width = base(equations[0]).shape[1]
    gram_HH, cross_HH = (torch.zeros(width, width, dtype=torch.float64) for _ in range(2))
    squares = 0.0
    for start in range(0, len(equations), CHUNK_ROWS):
        chunk = equations[start : start + CHUNK_ROWS]
        x_NH, y_NH = _average(base, chunk), _average(instruct, chunk)
        add_squares(gram_HH, x_NH)
        cross_HH.addmm_(x_NH.T, y_NH)
        squares += float(y_NH.square().sum())
    weight_HH, rank = solve_least_norm(gram_HH, cross_HH)
    if rank < width:
        _logger.warning(
            "%s: the rows of %d tokens span %d of %d columns; what adapted rows have beyond them is lost",
            *(where, len(equations), rank, width),
        )
    # |X D - Y|^2, written out.
    left = squares + float(((gram_HH @ weight_HH - 2 * cross_HH) * weight_HH).sum())
    error = max(0.0, left / max(squares, 1e-300))
    _logger.info("%s: fitted on %d tokens, %.2g of the squares is left", where, len(equations), error)
    return Propagation(weight_HH=weight_HH, num_equations=len(equations), rank=rank, error=error)


def _average(gather: Gather, chunk: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return the mean of old rows for each item: [n, H], fp64."""
    flat = [old for some in chunk for old in some]
    used = sorted(set(flat))
    position = {old: at for at, old in enumerate(used)}
    index = torch.tensor([position[old] for old in flat])
    offsets = torch.tensor([0, *accumulate(map(len, chunk))][:-1])
    return torch.nn.functional.embedding_bag(index, gather(used).double(), offsets, mode="mean")
