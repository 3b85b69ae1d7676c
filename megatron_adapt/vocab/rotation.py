"""Orthogonal Procrustes: the scaled rotation that brings X closest to Y, from X^T X and X^T Y.

1. ``find_rotation``: the orthogonal polar factor of X^T Y by Newton's iteration, all products and inverses.
2. ``scale_rotation``: the one scale that fits best.
3. ``bound_rotation``: how well that can fit, without finding it: from the sum of the singular values of X^T Y, which
   ``bound_singular_values`` estimates from above by stochastic Lanczos quadrature.

Costs: 7 to 9 inverses of H x H for the rotation, 48 products of H x H with 16 columns for the bound.
Papers: Higham 1986, Computing the polar decomposition - with applications; Ubaru, Chen and Saad 2017, Fast estimation
of tr(f(A)) via stochastic Lanczos quadrature.
"""

import numpy as np
import torch

_NUM_PROBES, _NUM_LANCZOS = 16, 24  # the sum of 1000 equal singular values to 1 %
_SMALL_STEP = 1e-2  # relative: the next is a thousandth of it, without scaling
_MOST_STEPS = 30  # of Newton's iteration; 9 are usual
_LAST_STEP = {torch.float64: 1e-8, torch.float32: 1e-2}  # the error behind it is about its square


def scale_rotation(rotation: torch.Tensor, gram: torch.Tensor, cross: torch.Tensor) -> torch.Tensor:
    """Scale a rotation as fits best; with fewer columns in y the rotation also projects."""
    rows, columns = cross.shape
    spread = torch.trace(gram) if rows <= columns else (gram @ rotation * rotation).sum()
    return rotation * ((rotation * cross).sum() / spread)


def find_rotation(cross: torch.Tensor) -> torch.Tensor:
    """Return the orthogonal polar factor: U V of the SVD U S V, in the type of ``cross``."""
    rows, columns = cross.shape
    if rows < columns:
        return find_rotation(cross.T).T
    if rows > columns:
        basis, triangle = torch.linalg.qr(cross)
        rotated: torch.Tensor = basis @ find_rotation(triangle)
        return rotated
    rotation = cross / cross.abs().max()
    step = 1.0
    for _ in range(_MOST_STEPS):
        inverse, failed = torch.linalg.inv_ex(rotation)
        scale = 1.0 if step < _SMALL_STEP else _balance(rotation, inverse)
        if failed or not 0 < scale < float("inf"):  # cross is singular
            break
        following = (rotation * (scale / 2)).add_(inverse.T, alpha=0.5 / scale)
        step = float((following - rotation).norm() / following.norm())
        rotation = following
        if step < _LAST_STEP[cross.dtype]:
            return rotation
    left, _, right = torch.linalg.svd(cross, full_matrices=False)
    found: torch.Tensor = left @ right
    return found


def _balance(rows: torch.Tensor, inverse: torch.Tensor) -> float:
    """Return the factor that brings the singular values of a matrix nearest to 1."""
    norms = [torch.linalg.matrix_norm(item, kind) for item in (inverse, rows) for kind in (1, float("inf"))]
    return float((norms[0] * norms[1] / norms[2] / norms[3]) ** 0.25)


def bound_rotation(gram: torch.Tensor, cross: torch.Tensor, squares_y: float, num_anchors: int) -> float:
    """Return what R2 of the best scaled rotation hardly exceeds on anchors that it was not fitted on.

    A rotation of H columns into K has ``H K - H (H + 1) / 2`` free numbers, that is d for each column of Y. Its squared
    error on n anchors is ``1 - d / n`` of the noise, on others ``1 + d / n``.

    Args:
        gram: X^T X.
        cross: X^T Y; with fewer columns in y the rotation also projects, and the answer is 1, which says nothing.
        squares_y: sum of the squares of Y.
        num_anchors: rows of X and Y.
    """
    rows, columns = cross.shape
    if rows > columns:
        return 1.0
    error = 1 - bound_singular_values(cross) ** 2 / max(float(gram.trace()) * squares_y, 1e-300)
    free = rows - rows * (rows + 1) / 2 / columns
    return 1 - error * (num_anchors + free) / (num_anchors - free) if num_anchors > free else 1 - error


def bound_singular_values(matrix: torch.Tensor) -> float:
    """Return what the sum of the singular values of M hardly exceeds.

    It is the trace of the root of M M^T, estimated by Lanczos from random signs: the mean of the probes and two of its
    standard errors. The quadrature itself errs upwards, because the root is concave.
    """
    work = matrix.float() / matrix.abs().max().clamp(min=1e-30)
    signs = torch.from_numpy(np.random.default_rng(0).choice([-1.0, 1.0], (len(work), _NUM_PROBES))).float()
    vectors, before = signs / len(work) ** 0.5, torch.zeros_like(signs)
    diagonal, beside = [], [torch.zeros(_NUM_PROBES)]
    for _ in range(min(_NUM_LANCZOS, len(work))):
        image = work @ (work.T @ vectors) - beside[-1] * before
        diagonal.append((image * vectors).sum(0))
        image -= diagonal[-1] * vectors
        beside.append(image.norm(dim=0))
        # A probe that has reached all there is goes on with zeros, which weigh nothing.
        before, vectors = vectors, image / beside[-1].clamp(min=1e-20)
    tridiagonal = torch.diag_embed(torch.stack(diagonal, -1))
    if len(diagonal) > 1:
        off = torch.diag_embed(torch.stack(beside[1:-1], -1), offset=1)
        tridiagonal += off + off.mT
    values, eigenvectors = torch.linalg.eigh(tridiagonal.double())
    shares = eigenvectors[:, 0].square()
    probes = (values.clamp(min=0).sqrt() * shares).sum(-1)
    highest = float(probes.mean() + 2 * probes.std() / _NUM_PROBES**0.5)
    return highest * len(work) * float(matrix.abs().max())
