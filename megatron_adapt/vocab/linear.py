"""Linear maps from the rows of one model to those of another, fitted on tokens that both have.

``y = (x - mean_x) W + mean_y``; what differs is W:

- ``ols``: least squares (arXiv 2407.12869, "embedding space transformation"; Linearized Embedding Transfer). Needs more
  anchors than columns.
- ``ridge``: least squares with a penalty, of the strength that predicts held-out anchors best.
- ``procrustes``: a rotation and one scale: angles stay as they are in the donor.
- ``auto``: of all these, what predicts held-out anchors best.

Anchors may weigh differently: means, squared errors and R2 are then weighted sums.

1. ``fit_map`` reads the anchors twice: means, then X^T X and X^T Y of the centred rows, in fp64. The products of
   a tenth of the anchors, at most 1024, are added last.
2. ``_choose`` fits the candidates without that tenth and compares R2 on it, over at most 256 columns. ``auto`` looks
   first at how well a rotation can fit at all (``bound_rotation``); if least squares predict held-out anchors much
   better than that, it is left out.
3. ``_solve`` by Cholesky; where columns depend on each other by eigenvalues, small ones cut (the least W).
4. ``find_rotation``, in fp32 where it is judged.

fp32 is not enough for squares: real embeddings have condition numbers of 1e4, and X^T X has the square of that.
Costs: two products of anchors x H x H, of X^T X little more than the half, and a solve for ``ols``; ``ridge`` solves
for 256 columns once more for each penalty, ``procrustes`` takes 7 to 9 inverses, ``auto`` both. With 8000 anchors of
width 2048 and twice as many new rows, on one core, ``ols`` takes 1.2, ``ridge`` 1.4 and ``procrustes`` 3 times the
fp64 products, ``auto`` as much as ``ridge`` and 0.6 more where a rotation may win (``benchmarks/fill.py``). Memory of
about five matrices H x H in fp64.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from megatron_adapt.errors import ConfigError
from megatron_adapt.vocab.rotation import bound_rotation, find_rotation, scale_rotation

Estimator = Literal["auto", "ols", "ridge", "procrustes"]
_logger = logging.getLogger(__name__)
_CHUNK_ANCHORS = 2048
_HELD_SHARE, _MAX_HELD = 10, 1024
_JUDGED_COLUMNS = 256
_GRAM_BLOCKS = 4
_PENALTIES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"Of the mean eigenvalue of X^T X."
_SMALLEST_PIVOT = 1e-6  # of the largest: beyond it the squares have no digits left
_SMALLEST_EIGENVALUE = 1e-12  # of the largest
_CLEAR_LEAD = 0.01  # of R2 over what a rotation hardly exceeds; the draw of the held-out anchors moves both


@dataclass(frozen=True, kw_only=True)
class LinearMap:
    """An affine map of rows, in fp64."""

    estimator: str
    penalty: float
    "Of ridge, else 0."
    mean_x: torch.Tensor
    mean_y: torch.Tensor
    weight: torch.Tensor
    "[columns of x, columns of y]"
    r2: float
    "Share of the variance of held-out anchors that the fit without them predicts."

    def apply(self, rows: torch.Tensor) -> torch.Tensor:
        """Map rows [n, columns of x] to [n, columns of y], fp64."""
        return torch.addmm(self.mean_y, rows.double() - self.mean_x, self.weight)


def fit_map(
    read: Callable[[np.ndarray], tuple[torch.Tensor, torch.Tensor]],
    num_anchors: int,
    *,
    estimator: Estimator,
    seed: int,
    where: str,
    weights: np.ndarray | None = None,
) -> LinearMap:
    """Fit a map on anchors.

    Args:
        read: returns the rows x and y, fp64, of the anchors with these numbers.
        num_anchors: how many there are, at least 2.
        estimator: the kind of map.
        seed: draws the held-out anchors.
        where: what is fitted, for messages.
        weights: of the anchors, positive; without them all weigh the same.

    Raises:
        ConfigError: ``ols`` was asked for, and the anchors are not more than the columns.
    """
    held, rest = hold_out(num_anchors, seed)
    shares = np.ones(num_anchors) if weights is None else weights / weights.mean()
    mean_x, mean_y = _read_means(read, shares)
    candidates = _list_candidates(estimator, len(rest), len(mean_x), where)
    gram, cross = (torch.zeros(len(mean_x), len(other), dtype=torch.float64) for other in (mean_x, mean_y))

    def read_centred(numbers: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = read(numbers)
        roots = torch.from_numpy(np.sqrt(shares[numbers]))[:, None]
        return (x - mean_x).mul_(roots), (y - mean_y).mul_(roots)

    def add(numbers: np.ndarray) -> float:
        squares_y = 0.0
        for chunk in _divide(numbers):
            x, y = read_centred(chunk)
            add_squares(gram, x)
            cross.addmm_(x.T, y)
            squares_y += float(y.square().sum())
        return squares_y

    squares_y = add(rest)
    name, penalty, r2 = _choose(candidates, gram, cross, squares_y, len(rest), *read_centred(held))
    add(held)
    weight = _fit(name, penalty, gram, cross)
    _logger.info(
        "%s: %s%s on %d shared tokens, R2 %.3f on %d held out",
        *(where, name, f" {penalty:g}" if penalty else "", num_anchors, r2, len(held)),
    )
    if r2 <= 0:
        _logger.warning("%s: the map predicts held-out rows no better than their mean does; look at the donor", where)
    return LinearMap(estimator=name, penalty=penalty, mean_x=mean_x, mean_y=mean_y, weight=weight, r2=r2)


def hold_out(num_anchors: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of the anchors that are held out, a tenth and at most 1024, and of the others, ascending."""
    order = np.random.default_rng(seed).permutation(num_anchors)
    num_held = min(-(-num_anchors // _HELD_SHARE), _MAX_HELD)
    return np.sort(order[:num_held]), np.sort(order[num_held:])


def _read_means(
    read: Callable[[np.ndarray], tuple[torch.Tensor, torch.Tensor]], shares: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    sums = [torch.zeros(()), torch.zeros(())]
    for chunk in _divide(np.arange(len(shares))):
        sums = [total + torch.from_numpy(shares[chunk]) @ rows for total, rows in zip(sums, read(chunk), strict=True)]
    return sums[0] / shares.sum(), sums[1] / shares.sum()


def add_squares(gram: torch.Tensor, rows: torch.Tensor) -> None:
    """Add X^T X: the blocks right of the diagonal by products, the others as their mirror."""
    width = -(-len(gram) // _GRAM_BLOCKS)
    for start in range(0, len(gram), width):
        stop = start + width
        gram[start:stop, start:].addmm_(rows[:, start:stop].T, rows[:, start:])
        gram[stop:, start:stop] = gram[start:stop, stop:].T


def _divide(numbers: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(numbers), _CHUNK_ANCHORS):
        yield numbers[start : start + _CHUNK_ANCHORS]


def _list_candidates(estimator: Estimator, num_fitted: int, width: int, where: str) -> list[tuple[str, float]]:
    """List kinds of map with their penalties."""
    is_short = num_fitted <= width
    if is_short and estimator == "ols":
        raise ConfigError(
            f"vocab.estimator: ols needs more shared tokens than the donor has columns, and {where} has "
            f"{num_fitted} to fit {width}; use ridge, procrustes or auto"
        )
    if is_short and estimator == "auto":
        said = "%s: only %d shared tokens to fit %d columns, so least squares take a penalty (ridge)"
        _logger.warning(said, where, num_fitted, width)
    kinds = {"ols": [0.0], "ridge": list(_PENALTIES), "procrustes": [0.0]}
    chosen = [kind for kind in kinds if estimator in (kind, "auto") and not (is_short and kind == "ols")]
    return [(kind, penalty) for kind in chosen for penalty in kinds[kind]]


def _choose(
    candidates: list[tuple[str, float]],
    gram: torch.Tensor,
    cross: torch.Tensor,
    squares_y: float,
    num_fitted: int,
    x: torch.Tensor,
    y: torch.Tensor,
) -> tuple[str, float, float]:
    """Return kind, penalty and R2 of the candidate that predicts the held-out y from x best."""
    columns = torch.arange(0, y.shape[1], -(-y.shape[1] // _JUDGED_COLUMNS))
    target = y[:, columns]
    found: list[tuple[float, str, float]] = []
    for name, penalty in candidates:
        if name == "procrustes":
            if found and max(found)[0] > bound_rotation(gram, cross, squares_y, num_fitted) + _CLEAR_LEAD:
                continue
            weight = scale_rotation(find_rotation(cross.float()).double(), gram, cross)[:, columns]
        else:
            weight = _fit(name, penalty, gram, cross[:, columns])
        error = float((target - x @ weight).square().sum() / target.square().sum().clamp(min=1e-300))
        found.append((1 - error, name, penalty))
    # The first of equals: the simplest.
    r2, name, penalty = max(found, key=lambda item: item[0])
    return name, penalty, r2


def _fit(name: str, penalty: float, gram: torch.Tensor, cross: torch.Tensor) -> torch.Tensor:
    if name == "procrustes":
        return scale_rotation(find_rotation(cross), gram, cross)
    return _solve(gram, cross, penalty)


def _solve(gram: torch.Tensor, cross: torch.Tensor, penalty: float) -> torch.Tensor:
    penalised = gram.clone()
    penalised.diagonal().add_(penalty * float(gram.diagonal().mean()))
    root, failed = torch.linalg.cholesky_ex(penalised)
    pivots = root.diagonal()
    if not failed and pivots.min() > _SMALLEST_PIVOT * pivots.max():
        found: torch.Tensor = torch.cholesky_solve(cross, root)
        return found
    return solve_least_norm(penalised, cross)[0]


def solve_least_norm(gram: torch.Tensor, cross: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return the least W of those that bring X W closest to Y, from X^T X and X^T Y, and the rank that X seems to have.

    Singular values of X below 1e-6 of the largest count as zero: the squares hold no more digits of them. Above it W is
    as exact as eps times the square of the condition number: 1e-8 at a condition number of 1e4.
    """
    values, vectors = torch.linalg.eigh(gram)
    rank = int((values > _SMALLEST_EIGENVALUE * values[-1]).sum())
    first = len(values) - rank  # in ascending order
    kept = vectors[:, first:]
    solved: torch.Tensor = kept @ ((kept.T @ cross) / values[first:, None])
    return solved, rank
