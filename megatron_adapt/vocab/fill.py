"""Rows for new tokens, computed from the rows of the old ones: the table of methods and what is the same for all.

A method of ``FILL_METHODS`` is a function of ``FillSources``. It plans once, what it reads besides the old rows
included, and returns a ``Fill`` that is run on each matrix. A row of zeros says that the method has none for a token.

1. ``plan_fill`` plans the method of the settings.
2. ``_complete`` gives tokens without a row the mean of their old pieces, or without such the mean of all old rows, and
   logs how many. So every row is finite and, unless the old ones are all zero, not zero.
3. ``_match_norms`` sets the length of the rows (``norms``).

Guarantees: the same settings give the same rows; rows do not depend on how tokens are divided into chunks.
Costs: memory of one chunk of 2048 rows and the old rows they use; with ``norm = "quantile"`` all new rows in fp32
(0.5 GB for 32,000 of width 4096).
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from megatron_adapt.config import VocabSettings
from megatron_adapt.errors import CheckpointError
from megatron_adapt.vocab.align import plan_align
from megatron_adapt.vocab.clp import count_clp_bytes, plan_clp
from megatron_adapt.vocab.focus import plan_focus
from megatron_adapt.vocab.merge_tree import plan_merge_tree
from megatron_adapt.vocab.mixtures import MAX_USED
from megatron_adapt.vocab.norms import match_median, match_quantiles, measure_norms, read_norms
from megatron_adapt.vocab.omp import count_omp_bytes, plan_omp
from megatron_adapt.vocab.rows import CHUNK_ROWS, BaseRows, Fill, FillSources, combine_rows, divide_ids, name_matrix
from megatron_adapt.vocab.similarity import plan_similarity_topk
from megatron_adapt.vocab.spread import plan_mean, plan_normal
from megatron_adapt.vocab.subtoken import plan_subtoken_mean, plan_subtoken_weighted
from megatron_adapt.vocab.transform import plan_linear_transform

_logger = logging.getLogger(__name__)
_NUM_SQUARES = {"normal": 2, "linear_transform": 5}
"Matrices H x H in fp64 that a method holds."
_COUNT_BYTES = {"clp": count_clp_bytes, "omp": count_omp_bytes}
"Memory of the methods that hold others."

FILL_METHODS: dict[str, Callable[[FillSources], Fill]] = {
    "subtoken_mean": plan_subtoken_mean,
    "subtoken_weighted": plan_subtoken_weighted,
    "mean": plan_mean,
    "normal": plan_normal,
    "align": plan_align,
    "merge_tree": plan_merge_tree,
    "similarity_topk": plan_similarity_topk,
    "focus": plan_focus,
    "linear_transform": plan_linear_transform,
    "clp": plan_clp,
    "omp": plan_omp,
}


def plan_fill(sources: FillSources) -> Fill:
    """Return the function that computes the new rows of a matrix; every new id comes exactly once, in order.

    Raises:
        CheckpointError: a donor is damaged or does not fit; later, a matrix whose mean row is not finite.
        ConfigError: the method lacks what it reads.
        DataError: a corpus or a tokenizer is damaged.
    """
    plan = FILL_METHODS[sources.settings.method](sources)

    def fill(base: BaseRows) -> Iterator[tuple[list[int], torch.Tensor]]:
        yield from _match_norms(base, _complete(base, plan(base), sources), sources)

    return fill


def count_fill_bytes(config: VocabSettings, pieces: Mapping[int, Sequence[int]], width: int, itemsize: int) -> int:
    """Return about how many bytes of memory a fill takes for a matrix of ``width`` columns."""
    most = 0
    for ids in divide_ids(pieces):
        num_used = len({old for new in ids for old in pieces[new]})
        # The old rows as they are stored and in fp32; the new ones, those of the chunk before, and one of them cast.
        most = max(most, num_used * (itemsize + 4) + len(ids) * (4 + 4 + itemsize))
    if config.method in ("similarity_topk", "focus"):
        most = max(most, MAX_USED * (itemsize + 4) + CHUNK_ROWS * (4 + 4 + itemsize))
    most += 2 * 4 * len(pieces) * (config.norm == "quantile")
    count = _COUNT_BYTES.get(config.method)
    return most * width + (count(width) if count else _NUM_SQUARES.get(config.method, 0) * 8 * width**2)


def _complete(
    base: BaseRows, rows: Iterator[tuple[list[int], torch.Tensor]], sources: FillSources
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Fill the rows that a method left, and count them."""
    pieces, method = sources.id_map.pieces, sources.settings.method
    mean_H: torch.Tensor | None = None
    num_rows = num_left = num_orphans = 0
    for ids, rows_NH in rows:
        num_rows += len(ids)
        left = _find_unusable(rows_NH)
        if left and method != "subtoken_mean":
            spelt = {ids[at]: pieces[ids[at]] for at in left}
            rows_NH[left] = torch.cat([found for _, found in combine_rows(base, spelt)])
        orphans = _find_unusable(rows_NH) if left else []
        if orphans:
            mean_H = _read_mean(base) if mean_H is None else mean_H
            rows_NH[orphans] = mean_H
        num_left, num_orphans = num_left + len(left), num_orphans + len(orphans)
        yield ids, rows_NH
    if num_left:
        _logger.warning(
            "%s: %d of %d new tokens have no row by %s; %d take the mean of their old pieces, %d, which have none, the "
            "mean of all rows",
            *(name_matrix(base), num_left, num_rows, method, num_left - num_orphans, num_orphans),
        )


def _find_unusable(rows_NH: torch.Tensor) -> list[int]:
    norms_N = measure_norms(rows_NH)
    found: list[int] = (~(norms_N.isfinite() & (norms_N > 0))).nonzero()[:, 0].tolist()
    return found


def _read_mean(base: BaseRows) -> torch.Tensor:
    mean_H = base.mean().float()
    if not mean_H.isfinite().all():
        raise CheckpointError(
            f"{name_matrix(base)}: the mean of its rows is not finite, so nothing can fill new ones; look for NaN with "
            "tools/inspect_checkpoint.py"
        )
    if not mean_H.any():
        _logger.warning("%s: the mean of its rows is zero, and so are new rows; is the model empty?", name_matrix(base))
    return mean_H


def _match_norms(
    base: BaseRows, rows: Iterator[tuple[list[int], torch.Tensor]], sources: FillSources
) -> Iterator[tuple[list[int], torch.Tensor]]:
    if sources.settings.norm == "none" or not sources.id_map.pieces:
        yield from rows
        return
    old_norms = read_norms(base)
    if not len(old_norms):  # an empty model
        yield from rows
        return
    if sources.settings.norm == "median":
        for ids, rows_NH in rows:
            yield ids, match_median(rows_NH, old_norms)
        return
    matched_NH = match_quantiles(torch.cat([rows_NH for _, rows_NH in rows]), old_norms)
    start = 0
    for ids in divide_ids(sources.id_map.pieces):
        yield ids, matched_NH[start : start + len(ids)]
        start += len(ids)
