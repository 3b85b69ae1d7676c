"""Methods ``mean`` and ``normal``: rows that know nothing of the token, only how the old rows are spread.

- ``mean``: the mean of all old rows (Hewitt 2021, "Initializing New Word Embeddings").
- ``normal``: drawn from N(mu, Sigma) of all old rows (the same). Moments are summed in fp64 over rows that are finite.
  A row depends on seed, matrix and id alone, not on the tokens beside it.

Costs: ``mean`` one read of the matrix. ``normal`` two, and V H^2 multiplications in fp64; memory of two H x H matrices
in fp64 (0.3 GB at width 4096).
"""

from collections.abc import Iterator

import numpy as np
import torch

from megatron_adapt.vocab.rows import BaseRows, Fill, FillSources, divide_ids, read_blocks


def plan_mean(sources: FillSources) -> Fill:
    """Give each token the mean of all old rows."""

    def fill(base: BaseRows) -> Iterator[tuple[list[int], torch.Tensor]]:
        mean_H = base.mean().float()
        for ids in divide_ids(sources.id_map.pieces):
            yield ids, mean_H.repeat(len(ids), 1)

    return fill


def plan_normal(sources: FillSources) -> Fill:
    """Give each token a row drawn from the normal distribution of the old rows."""

    def fill(base: BaseRows) -> Iterator[tuple[list[int], torch.Tensor]]:
        mean_H, root_HH = read_moments(base)
        for ids in divide_ids(sources.id_map.pieces):
            noise_NH = np.stack([_draw(sources.settings.seed, base.is_head, new, len(mean_H)) for new in ids])
            yield ids, torch.addmm(mean_H, torch.from_numpy(noise_NH), root_HH.T).float()

    return fill


def read_moments(base: BaseRows) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean [H] of the old rows and a root R [H, H] of their covariance, R R^T = Sigma, both fp64."""
    mean_H, num_rows = base.mean(), 0
    sigma_HH = torch.zeros(len(mean_H), len(mean_H), dtype=torch.float64)
    for rows_NH in read_blocks(base):
        rows_NH -= mean_H
        sigma_HH.addmm_(rows_NH.T, rows_NH)
        num_rows += len(rows_NH)
    sigma_HH /= max(1, num_rows)
    root_HH, failed = torch.linalg.cholesky_ex(sigma_HH)
    if not failed:
        return mean_H, root_HH
    # Fewer rows than columns, or columns that depend on each other.
    values_H, vectors_HH = torch.linalg.eigh(sigma_HH)
    return mean_H, vectors_HH * values_H.clamp(min=0).sqrt()


def _draw(seed: int, is_head: bool, new: int, width: int) -> np.ndarray:
    bits = np.random.Philox(key=np.array([seed, is_head], np.uint64), counter=np.array([0, new, 0, 0], np.uint64))
    return np.random.Generator(bits).standard_normal(width)
