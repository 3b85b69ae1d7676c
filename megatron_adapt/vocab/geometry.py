"""Where the rows of new tokens lie: how long they are, which are odd, and which old tokens are nearest.

Pure functions of rows (``rows.BaseRows``); what is zero or not finite is counted, and takes part in nothing else.

Costs: each function reads a matrix once; memory of one chunk of 2048 rows in fp32 and, for ``find_nearest``, the rows
asked for: under 0.4 GB at width 4096, whatever the vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from megatron_adapt.vocab.census import Census, Ids
from megatron_adapt.vocab.norms import measure_norms, scale_to_unit
from megatron_adapt.vocab.rows import CHUNK_ROWS, BaseRows, divide_ids

PERCENTS = (1, 5, 25, 50, 75, 95, 99)
NUM_NEAREST = 5
_TINY_PERCENT = 1
_MAX_LISTED = 50


def read_all_norms(rows: BaseRows) -> np.ndarray:
    """Return the length of every row, NaN for one that is not finite: [V], fp64."""
    starts = range(0, rows.num_rows, CHUNK_ROWS)
    found = [measure_norms(rows.read(start, min(start + CHUNK_ROWS, rows.num_rows))) for start in starts]
    norms_V: np.ndarray = torch.cat(found).numpy()
    norms_V[~np.isfinite(norms_V)] = np.nan
    return norms_V


def describe_norms(norms: np.ndarray) -> dict[str, float]:
    """Return the percentiles of lengths, linear between neighbours; of none at all nothing."""
    finite = norms[np.isfinite(norms)]
    return {str(percent): float(np.percentile(finite, percent)) for percent in PERCENTS} if len(finite) else {}


def find_odd_rows(norms_V: np.ndarray, census: Census, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the rows that are not finite or zero, and the new ones shorter than 99 % of the old, with their tokens.

    Args:
        norms_V: length of every row of the model (``read_all_norms``).
        census: which are new.
        names: text of every token.

    Returns:
        Of each kind its ``count`` and ``tokens``, the first 50 of them: ``{id, token, is_new}``.
    """
    new = set(census.new.tolist())
    old = norms_V[census.kept]
    old = old[old > 0]
    tiny = np.percentile(old, _TINY_PERCENT) if len(old) else 0.0
    norms_N = norms_V[census.new]
    kinds = {
        "not_finite": np.flatnonzero(np.isnan(norms_V)),
        "zero": np.flatnonzero(norms_V == 0),
        "tiny": census.new[(norms_N > 0) & (norms_N < tiny)],
    }

    def list_tokens(ids: Ids) -> list[dict[str, Any]]:
        return [{"id": index, "token": names[index], "is_new": index in new} for index in ids[:_MAX_LISTED].tolist()]

    return {kind: {"count": len(ids), "tokens": list_tokens(ids)} for kind, ids in kinds.items()}


def compare_kept(before: BaseRows, after: BaseRows, census: Census) -> dict[str, float | None]:
    """Compare the rows of the tokens that stayed with those of the base.

    Returns:
        ``identical``: the share that is equal in every value. ``mean_cosine``: over those that are finite and not zero
        in both; None without any.
    """
    num_identical, cosines = 0, []
    for at in divide_ids(range(len(census.kept))):
        old_NH = before.gather(census.kept_before[at].tolist())
        now_NH = after.gather(census.kept[at].tolist())
        num_identical += int((old_NH == now_NH).all(-1).sum())
        norms_N = measure_norms(old_NH) * measure_norms(now_NH)
        is_usable_N = norms_N.isfinite() & (norms_N > 0)
        cosines_N = (old_NH.double() * now_NH.double()).sum(-1) / norms_N
        cosines.append(cosines_N[is_usable_N])
    found = torch.cat(cosines)
    return {"identical": num_identical / len(census.kept), "mean_cosine": float(found.mean()) if len(found) else None}


def find_nearest(
    rows: BaseRows, wanted: Sequence[int], candidates: Sequence[int], count: int = NUM_NEAREST
) -> list[list[tuple[int, float]]]:
    """Return the candidates with the largest cosine to each row that is wanted, ties by the lowest id.

    Args:
        rows: the matrix.
        wanted: ids to find neighbours of.
        candidates: ids to choose from, ascending.
        count: how many neighbours; fewer where there are fewer candidates.

    Returns:
        Ids and cosines for each wanted row, the nearest first; none for one that is zero or not finite.
    """
    queries_QH = scale_to_unit(rows.gather(wanted).float())
    best_QK, ids_QK = torch.zeros(len(wanted), 0), torch.zeros(len(wanted), 0, dtype=torch.long)
    for ids in divide_ids(candidates):
        chunk_NH = scale_to_unit(rows.gather(ids).float())
        is_usable_N = chunk_NH.any(-1)
        cosines_QN = (queries_QH @ chunk_NH.T).masked_fill(~is_usable_N, -torch.inf)
        # The lowest ids stand first, and a stable sort leaves them there.
        cosines_QN = torch.cat([best_QK, cosines_QN], 1)
        all_QN = torch.cat([ids_QK, torch.tensor(ids).expand(len(wanted), -1)], 1)
        best_QK, places_QK = (item[:, :count] for item in cosines_QN.sort(dim=1, descending=True, stable=True))
        ids_QK = all_QN.gather(1, places_QK)
    pairs = zip(queries_QH.any(-1).tolist(), ids_QK.tolist(), best_QK.tolist(), strict=True)
    return [
        [(index, cosine) for index, cosine in zip(ids, cosines, strict=True) if is_usable and np.isfinite(cosine)]
        for is_usable, ids, cosines in pairs
    ]


def choose_examples(census: Census, frequency_V: Ids | None, count: int) -> list[int]:
    """Return the new ids that occur most often, ties by the lowest; without frequencies the first."""
    if frequency_V is None:
        return [int(index) for index in census.new[:count]]
    order = np.argsort(-frequency_V[census.new], kind="stable")
    return [int(index) for index in census.new[order[:count]]]
