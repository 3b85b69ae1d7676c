"""Cosines between many vectors: the nearest, and all that sparsemax gives weight to, without the whole table.

``find_nearest`` and ``weigh_by_sparsemax`` go through the same blocks of 1024 queries and 8192 anchors.

1. ``_multiply``: one product in fp32 gives the cosines of a block.
2. ``_find_above`` lists those at or above a bound that no result can lie below. It looks at the maxima of groups of 32
   first, and into a group only where its maximum reaches the bound.
3. The results so far raise the bound: for the nearest to the last of them; for sparsemax to the threshold of those
   found, since more candidates can only raise it.

Guarantees: exact for the cosines as computed; of equal ones the lowest anchor comes first; vectors of whole numbers
give the same result in any division into blocks.
Costs: the product, and on top, in time of one core at 300 columns and 128,000 anchors, 5 % for the 10 nearest and 13 %
for sparsemax (``benchmarks/fill.py``); memory of a block (32 MiB) and of the candidates of 1024 queries, 16 bytes each.
Vectors that all look alike make every anchor a candidate of sparsemax.
Sources: sparsemax and its threshold by Martins and Astudillo 2016 (arXiv 1602.02068), found by dropping what lies below
the threshold of the rest until nothing does (Michelot 1986).
"""

from collections.abc import Iterator

import numpy as np
import torch

from megatron_adapt.vocab.mixtures import Mixtures

_NUM_QUERIES, _NUM_ANCHORS, _NUM_GROUPED = 1024, 8192, 32
_LEAST = torch.finfo(torch.float32).min


def normalize_rows(rows_ND: torch.Tensor) -> tuple[np.ndarray, torch.Tensor]:
    """Give rows length 1.

    Args:
        rows_ND: vectors, fp32.

    Returns:
        Numbers of the rows that have a direction (finite and not zero), ascending, and these rows.
    """
    # Twice, as the square of a very small or large number is lost.
    largest_N = rows_ND.abs().amax(-1) if rows_ND.shape[1] else torch.zeros(len(rows_ND))
    numbers = (largest_N.isfinite() & (largest_N > 0)).nonzero()[:, 0]
    units_MD = rows_ND[numbers]
    units_MD /= largest_N[numbers, None]
    units_MD /= units_MD.norm(dim=-1, keepdim=True)
    return numbers.numpy(), units_MD


def find_nearest(
    queries_ND: torch.Tensor, anchors_VD: torch.Tensor, num_neighbors: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the anchors with the largest cosines.

    Args:
        queries_ND: vectors of length 1, fp32.
        anchors_VD: the same.
        num_neighbors: how many to find; all anchors where there are fewer.

    Returns:
        Cosines, falling, and numbers of anchors: [N, num_neighbors] each.
    """
    num_neighbors = min(num_neighbors, len(anchors_VD))
    values = torch.empty(len(queries_ND), num_neighbors)
    numbers = torch.empty(len(queries_ND), num_neighbors, dtype=torch.long)
    for start in range(0, len(queries_ND), _NUM_QUERIES):
        part_ND = queries_ND[start : start + _NUM_QUERIES]
        best: torch.Tensor | None = None
        for first, groups in _multiply(part_ND, anchors_VD):
            bounds = _bound(groups, best, num_neighbors)
            rows, columns, found = _find_above(groups, bounds)
            keys = _spread(rows, _make_keys(found, columns + first), len(part_ND))
            best = keys if best is None else torch.cat([best, keys], 1)
            best = best.topk(min(num_neighbors, best.shape[1]), sorted=True).values
        if best is not None:
            values[start : start + _NUM_QUERIES] = _read_values(best)
            numbers[start : start + _NUM_QUERIES] = _LAST - (best & _LAST)
    return values, numbers


def weigh_by_softmax(cosines_NK: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the softmax of cosines over a temperature, in fp64: weights [N, K] whose rows sum to 1."""
    return torch.softmax(cosines_NK.double() / temperature, -1)


def weigh_by_sparsemax(queries_ND: torch.Tensor, anchors_VD: torch.Tensor) -> Mixtures:
    """Weigh anchors by the sparsemax of their cosines with each query.

    Args:
        queries_ND: vectors of length 1, fp32.
        anchors_VD: the same, at least one.

    Returns:
        For every query the anchors with weight, ascending, and their weights, which sum to 1.
    """
    parts = []
    for start in range(0, len(queries_ND), _NUM_QUERIES):
        part_ND = queries_ND[start : start + _NUM_QUERIES]
        rows, numbers, values = np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
        thresholds: np.ndarray | None = None
        for first, groups in _multiply(part_ND, anchors_VD):
            if thresholds is None:
                maxima = groups.amax(-1)
                thresholds = _find_thresholds(
                    np.repeat(np.arange(len(maxima)), maxima.shape[1]), maxima.double().flatten().numpy(), len(maxima)
                )
            # One rounding down, for the bound is compared in fp32.
            bounds = np.nextafter(thresholds.astype(np.float32), np.float32(_LEAST))
            found = _find_above(groups, torch.from_numpy(bounds))
            rows = np.concatenate([rows, found[0].numpy()])
            numbers = np.concatenate([numbers, found[1].numpy() + first])
            values = np.concatenate([values, found[2].double().numpy()])
            thresholds = _find_thresholds(rows, values, len(part_ND))
            is_above = values > thresholds[rows]
            rows, numbers, values = rows[is_above], numbers[is_above], values[is_above]
        assert thresholds is not None
        order = np.argsort(rows, kind="stable")
        weights = (values - thresholds[rows])[order]
        parts.append(Mixtures.of(np.bincount(rows, minlength=len(part_ND)), numbers[order], weights))
    return Mixtures.join(parts)


def _bound(groups: torch.Tensor, best: torch.Tensor | None, num_neighbors: int) -> torch.Tensor:
    """Return for each row a value that ``num_neighbors`` anchors are known to reach, or the least there is."""
    if best is not None and best.shape[1] == num_neighbors:
        return _read_values(best[:, -1])
    maxima = groups.amax(-1)
    if best is None and maxima.shape[1] >= num_neighbors:
        return maxima.topk(num_neighbors).values[:, -1]
    return torch.full((len(groups),), _LEAST)


def _multiply(queries_ND: torch.Tensor, anchors_VD: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the first anchor of each block and its cosines [N, groups, 32]; -inf fills the last group.

    The next block overwrites the last.
    """
    width = min(_NUM_ANCHORS, -(-len(anchors_VD) // _NUM_GROUPED) * _NUM_GROUPED)
    block = torch.empty(len(queries_ND), width)
    for first in range(0, len(anchors_VD), _NUM_ANCHORS):
        part_VD = anchors_VD[first : first + _NUM_ANCHORS]
        torch.mm(queries_ND, part_VD.T, out=block[:, : len(part_VD)])
        used = block[:, : -(-len(part_VD) // _NUM_GROUPED) * _NUM_GROUPED]
        used[:, len(part_VD) :] = -torch.inf
        yield first, used.view(len(used), -1, _NUM_GROUPED)


def _find_above(groups: torch.Tensor, bounds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return rows, columns and values of what is at least the bound of its row; rows ascend, and columns in each."""
    hits, at = (groups.amax(-1) >= bounds[:, None]).nonzero(as_tuple=True)
    members = groups[hits, at]
    inside, offsets = (members >= bounds[hits, None]).nonzero(as_tuple=True)
    return hits[inside], at[inside] * groups.shape[2] + offsets, members[inside, offsets]


def _find_thresholds(rows: np.ndarray, values: np.ndarray, num_rows: int) -> np.ndarray:
    """Return the threshold of sparsemax of each row, fp64; every row must have a value."""
    while True:
        counts = np.bincount(rows, minlength=num_rows)
        thresholds: np.ndarray = (np.bincount(rows, values, minlength=num_rows) - 1) / counts
        is_above = values > thresholds[rows]
        if is_above.all():
            return thresholds
        rows, values = rows[is_above], values[is_above]


# Values and numbers in one integer each, which sorts by falling value, then by rising number.
_LAST = (1 << 32) - 1
_NONE = torch.iinfo(torch.int64).min


def _make_keys(values: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    bits = (values + 0.0).view(torch.int32).long()  # no -0.0
    return (torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) << 32) | (_LAST - numbers)


def _read_values(keys: torch.Tensor) -> torch.Tensor:
    bits = keys >> 32
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).int().view(torch.float32)


def _spread(rows: torch.Tensor, keys: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Put keys into the lines of a table that is as wide as the longest: [num_rows, longest]."""
    counts = torch.bincount(rows, minlength=num_rows)
    table = torch.full((num_rows, int(counts.max())), _NONE)
    table[rows, torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]] = keys
    return table
