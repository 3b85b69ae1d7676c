"""What happens to a chunk of logits between the products of head and loss: reduced to a number a token, then gradients.

- ``TorchSoftmax`` makes the softmax in place, below fp32 in an fp32 copy of the chunk.
- ``TritonSoftmax`` reads the chunk once in either step, in its own type, and keeps three numbers a token
  (``gpu/linear_cross_entropy.py``).

Shapes: N tokens, V columns of the chunk.
"""

import torch

from megatron_adapt.engine.kernels.dispatch import Implementation


def make_softmax(
    kernels: Implementation, hidden_NH: torch.Tensor, rows: int, num_columns: int
) -> "TorchSoftmax | TritonSoftmax":
    """Return what works on chunks of so many rows and columns.

    fp64 goes the torch way: it is for tests, and no GPU is fast at it.
    """
    exact = torch.promote_types(hidden_NH.dtype, torch.float32)
    if kernels == "triton" and exact == torch.float32:
        return TritonSoftmax(hidden_NH, rows, num_columns)
    return TorchSoftmax(hidden_NH, rows, num_columns)


class TorchSoftmax:
    """What happens to a chunk of logits between the products, in torch: their softmax in place, then its gradient."""

    def __init__(self, hidden_NH: torch.Tensor, rows: int, num_columns: int) -> None:
        """Make room for a chunk of so many rows and columns, in the type of the hidden states."""
        self.logits_NV = hidden_NH.new_empty(rows, num_columns)
        # Made once: a new one would be alive beside the one before.
        exact = torch.promote_types(hidden_NH.dtype, torch.float32)
        is_exact = hidden_NH.dtype == exact
        self._exact_NV = self.logits_NV if is_exact else torch.empty_like(self.logits_NV, dtype=exact)

    def normalise(self, chunk_NV: torch.Tensor, own_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Read the logits of a chunk, the first rows of ``logits_NV``.

        Args:
            chunk_NV: logits.
            own_N: column of the target, outside of V where another rank has it.

        Returns:
            [N] logit of the target, 0 where it is not among V, and [N] logarithm of the sum of exponentials in fp64:
            the difference of those of two ranks is the exponent of a factor, which would show their rounding in fp32.
        """
        self._is_own_N = (own_N >= 0) & (own_N < chunk_NV.shape[1])
        self._own_N1 = own_N.where(self._is_own_N, 0)[:, None]
        is_exact = chunk_NV.dtype == self._exact_NV.dtype
        shares_NV = self._shares_NV = chunk_NV if is_exact else self._exact_NV[: len(own_N)].copy_(chunk_NV)
        if not shares_NV.shape[1]:
            nothing_N = shares_NV.new_full((len(own_N),), -torch.inf, dtype=torch.float64)
            return shares_NV.new_zeros(len(own_N)), nothing_N
        target_N = shares_NV.gather(1, self._own_N1)[:, 0] * self._is_own_N
        highest_N = shares_NV.amax(1)
        # Row by row and value by value, so input and output may be one.
        torch.softmax(shares_NV, 1, out=shares_NV)
        # The highest share is 1 / sum exp(logit - highest).
        return target_N, highest_N - shares_NV.amax(1).double().log()

    def differentiate(
        self, chunk_NV: torch.Tensor, factor_N: torch.Tensor | None, scale_N: torch.Tensor
    ) -> torch.Tensor:
        """Turn the chunk that was read last into gradients, in its memory and type.

        Args:
            chunk_NV: what ``normalise`` was given.
            factor_N: what the share of a column is multiplied by; None for 1.
            scale_N: what is taken off at the target.

        Returns:
            [N, V].
        """
        shares_NV = self._shares_NV
        if factor_N is not None:
            shares_NV.mul_(factor_N[:, None])
        if shares_NV.shape[1]:
            shares_NV.scatter_add_(1, self._own_N1, -(scale_N * self._is_own_N)[:, None])
        return shares_NV if chunk_NV.dtype == shares_NV.dtype else chunk_NV.copy_(shares_NV)


class TritonSoftmax:
    """The same in two kernels, which read the logits in their own type; no fp64."""

    def __init__(self, hidden_NH: torch.Tensor, rows: int, num_columns: int) -> None:
        """Make room for a chunk of so many rows and columns, with a gap behind rows of odd length."""
        from megatron_adapt.engine.kernels.gpu import linear_cross_entropy as gpu

        self._gpu = gpu
        stride = -(-num_columns // gpu.ROW_MULTIPLE) * gpu.ROW_MULTIPLE
        self.logits_NV = hidden_NH.new_empty(rows, stride)[:, :num_columns]

    def normalise(self, chunk_NV: torch.Tensor, own_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Read the logits of a chunk, as ``TorchSoftmax.normalise``."""
        self._own_N = own_N
        self._highest_N, self._sum_N, target_N = self._gpu.normalise(chunk_NV, own_N)
        return target_N, self._highest_N + self._sum_N.double().log()

    def differentiate(
        self, chunk_NV: torch.Tensor, factor_N: torch.Tensor | None, scale_N: torch.Tensor
    ) -> torch.Tensor:
        """Turn the chunk that was read last into gradients, as ``TorchSoftmax.differentiate``."""
        # A share is exp(logit - highest) / sum: what log_sum is rounded by does not enter its exponent.
        factor_N = self._sum_N.reciprocal() if factor_N is None else factor_N / self._sum_N
        self._gpu.differentiate(chunk_NV, self._own_N, self._highest_N, factor_N, scale_N)
        return chunk_NV
