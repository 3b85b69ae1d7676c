"""Match the length of new rows to that of the old ones.

The mean of k rows that point anywhere is shorter by about the root of k; a row mapped from another model may be longer.
Input rows are normalised by the first norm of the model, so there length says how slowly a row learns; in the head it
says how large logits grow.

- ``match_median``: every new row as long as the median old row.
- ``match_quantiles``: the new row of rank r among the new as long as the old row of the same rank among the old.
"""

import torch

from megatron_adapt.vocab.rows import BaseRows, read_blocks

_MEASURED_ROWS = 128


def read_norms(base: BaseRows) -> torch.Tensor:
    """Return the lengths of all old rows that are finite and not zero, in ascending order: fp64."""
    norms = torch.cat([rows_NH.norm(dim=-1) for rows_NH in read_blocks(base)])
    return norms[norms > 0].sort().values


def match_median(rows_NH: torch.Tensor, old_norms: torch.Tensor) -> torch.Tensor:
    """Return rows of the median old length: [n, H], fp32."""
    return _resize(rows_NH, old_norms[len(old_norms) // 2].expand(len(rows_NH)))


def match_quantiles(rows_NH: torch.Tensor, old_norms: torch.Tensor) -> torch.Tensor:
    """Return rows with the lengths of old rows, spread over all of these: [n, H], fp32."""
    ranks = measure_norms(rows_NH).argsort(stable=True).argsort()
    # The middle of each of n equal parts of the old rows.
    places = (ranks.double() + 0.5) / len(rows_NH) * len(old_norms)
    return _resize(rows_NH, old_norms[places.long().clamp(max=len(old_norms) - 1)])


def measure_norms(rows_NH: torch.Tensor) -> torch.Tensor:
    """Return the lengths of rows in fp64, a few rows at a time: [n]."""
    starts = range(0, len(rows_NH), _MEASURED_ROWS)
    return torch.cat([rows_NH[start : start + _MEASURED_ROWS].double().norm(dim=-1) for start in starts])


def scale_to_unit(rows_NH: torch.Tensor) -> torch.Tensor:
    """Return rows of length 1, in their type; zeros where a row is zero or not finite."""
    norms_N = torch.linalg.vector_norm(rows_NH, dim=-1, dtype=torch.float64)
    is_unusable_N = ~(norms_N.isfinite() & (norms_N > 0))
    units_NH: torch.Tensor = rows_NH / norms_N.masked_fill_(is_unusable_N, 1).to(rows_NH.dtype)[:, None]
    return units_NH.masked_fill_(is_unusable_N[:, None], 0)


def _resize(rows_NH: torch.Tensor, norms_N: torch.Tensor) -> torch.Tensor:
    return rows_NH * (norms_N / measure_norms(rows_NH)).float()[:, None]
