"""Output head and cross entropy in one: hidden states in, loss per token out; the logits never exist as a whole.

megatron-core 0.16 has no such thing: ``cross_entropy_loss_fusion`` (``native``, or that of Transformer Engine) fuses
what comes after the logits, and keeps an fp32 softmax of all tokens until the backward pass. Here a chunk of tokens at
a time goes all the way:

1. logits of the chunk, over the columns of this tensor-parallel rank; columns that pad the vocabulary are not computed;
2. ``normalise``: the logarithm of the sum of exponentials of each row, in fp32;
3. ``_combine``: over the tensor-parallel ranks, one all-gather of two numbers a token;
4. ``differentiate``: the gradient with respect to the logits, in their place;
5. ``_Gradients.add``: from it that with respect to hidden states and weight, at once.

Steps 2 and 4, what lies between the matrix products, have two implementations; all else is shared. ``_TorchSoftmax``
makes the softmax in place, below fp32 in an fp32 copy of the chunk. ``_TritonSoftmax`` reads the chunk once in either
step and keeps three numbers a token. fp64 goes the torch way: it is for tests, and no GPU is fast at it.

The backward pass scales what the forward pass left. That is right where all tokens that bear loss have the same
upstream gradient, as they have in a mean or a sum; ``loss_mask`` names the others, which then cost nothing. For any
other upstream gradient the weight gradient is computed anew: never wrong, but 3 products more.

z-loss (Chowdhery et al. 2022, arXiv 2204.02311, section 5) keeps the logarithm of the sum of exponentials near 0. It
is a second result, so that the loss stays what it is; the forward pass computes the gradient of the sum of both.

The alternative, to keep nothing and compute logits again in the backward pass, has 4 matrix products instead of 3. In
sketches on one CPU thread (2048 tokens, 32k columns of 512, fastest of four rounds) it took 1.03 times what the
engine's way takes in fp32 and 0.62 times in bf16, gradients in the forward pass 0.82 and 0.72: where products are as
slow as in fp32 the fourth one is not paid for.

Guarantees: sums and gradients of the weight are accumulated in fp32; what needs no gradient (a frozen head, a frozen
body, validation) is not computed.
Memory beyond the gradients: a chunk of logits (``_count_rows``), below fp32 the fp32 sum of the weight gradient and in
torch an fp32 copy of the chunk.

Gradients in the forward pass: Liger Kernel (Hsu et al. 2024, arXiv 2410.10989). Shapes: N tokens, H hidden, V columns
of this rank.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_adapt.engine.kernels.dispatch import Implementation

_CHUNK_VALUES = {"cpu": 7 << 20, "cuda": 64 << 20}
"Logits in a chunk. On a CPU few enough for its last-level cache; for a GPU enough to fill it, which was not measured."
_MIN_ROWS = 56
"Each chunk reads and writes the whole weight gradient, which fewer tokens do not pay for."
_COLUMN_BLOCK = 4096
"Columns of the weight gradient that are added in one step below fp32."


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns of the vocabulary that a tensor-parallel rank holds."""

    first: int
    "Token id of the first row of this rank's weight."
    num_true: int
    "Rows from the first on that stand for a token; the others are padding."
    group: dist.ProcessGroup | None
    "Ranks that share the vocabulary; None for one that holds all of it."


def linear_cross_entropy(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_N: torch.Tensor,
    columns: Columns,
    *,
    loss_mask_N: torch.Tensor | None = None,
    z_loss: float = 0.0,
    kernels: Implementation = "torch",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cross entropy and z-loss of every token under ``softmax(hidden @ weight.T)``.

    The gradient of ``hidden_NH`` is that of this rank's columns; the caller sums it over the ranks
    (``copy_to_tensor_model_parallel_region`` or ``gather_from_sequence_parallel_region`` of megatron-core).

    Args:
        hidden_NH: hidden states, the same on all tensor-parallel ranks.
        weight_VH: this rank's rows of the output matrix, padding included.
        labels_N: token ids.
        columns: which columns they are.
        loss_mask_N: False where a token bears no loss: its loss is 0, and nothing is computed for it.
        z_loss: weight of the squared logarithm of the sum of exponentials.
        kernels: what computes the softmax of a chunk; fp64 hidden states go the torch way.

    Returns:
        [N] losses in nats, and [N] z-losses: ``z_loss * log_sum_exp ** 2``, without a gradient where ``z_loss`` is 0.
        Both fp32 (fp64 for fp64 hidden states). Add them, with the same upstream gradient, to learn from both.
    """
    if loss_mask_N is not None:
        rows = loss_mask_N.nonzero().flatten()
        found = linear_cross_entropy(
            hidden_NH[rows], weight_VH, labels_N[rows], columns, z_loss=z_loss, kernels=kernels
        )
        loss_N, z_loss_N = (part.new_zeros(len(labels_N)).index_put((rows,), part) for part in found)
        return loss_N, z_loss_N
    learns = torch.is_grad_enabled()
    task = _Task(
        columns,
        z_loss,
        kernels,
        of_hidden=learns and hidden_NH.requires_grad,
        of_weight=learns and weight_VH.requires_grad,
    )
    loss_N, z_loss_N = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_NH, weight_VH, labels_N, task
    )
    return loss_N, z_loss_N


@dataclass(frozen=True)
class _Task:
    """What is to be computed, and how."""

    columns: Columns
    z_loss: float
    kernels: Implementation
    of_hidden: bool
    "Whether the gradient of the hidden states is asked for."
    of_weight: bool
    "Whether that of the weight is."


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: torch.Tensor, weight_VH: torch.Tensor, labels_N: torch.Tensor, task: _Task
    ) -> tuple[torch.Tensor, torch.Tensor]:
        loss_N, z_loss_N, gradients = _go_through(hidden_NH, weight_VH, labels_N, task)
        ctx.save_for_backward(hidden_NH, weight_VH, labels_N)
        ctx.task, ctx.gradients = task, gradients
        if not task.z_loss:
            ctx.mark_non_differentiable(z_loss_N)
        return loss_N, z_loss_N

    @staticmethod
    def backward(ctx: Any, of_loss_N: torch.Tensor, of_z_loss_N: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # Not saved but handed over: who gets the only reference need not copy [V, H]. A second pass starts anew.
        gradients, ctx.gradients = ctx.gradients, None
        scale = _find_common_value(torch.cat([of_loss_N, of_z_loss_N]) if ctx.task.z_loss else of_loss_N)
        if gradients is None or scale is None:
            hidden_NH, weight_VH, labels_N = ctx.saved_tensors
            *_, gradients = _go_through(hidden_NH, weight_VH, labels_N, ctx.task, (of_loss_N, of_z_loss_N))
        elif scale != 1:
            gradients = [None if gradient is None else gradient.mul_(scale) for gradient in gradients]
        return (*gradients, None, None)


def _find_common_value(upstream_N: torch.Tensor) -> float | None:
    """Return the value that all have, NaN where one is, or None; waits for the device."""
    if not len(upstream_N):
        return 1.0
    low, high = torch.stack(upstream_N.aminmax()).tolist()
    # A rank that alone sees a NaN must not begin products that the others would have to share.
    return float(low) if low == high or math.isnan(low) else None


def _go_through(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_N: torch.Tensor,
    task: _Task,
    upstream: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor | None]]:
    """Return losses, z-losses, and the gradients of the sum of all, or of one weighted by ``upstream``, [N] each."""
    columns, z_loss = task.columns, task.z_loss
    exact = torch.promote_types(hidden_NH.dtype, torch.float32)
    rows = _count_rows(columns.num_true, hidden_NH.device.type, hidden_NH.dtype)
    true_VH = weight_VH[: columns.num_true]
    loss_N = torch.empty(len(hidden_NH), dtype=exact, device=hidden_NH.device)
    z_loss_N = torch.zeros_like(loss_N)
    gradients = _Gradients(hidden_NH, weight_VH, task, exact)
    implement = _TritonSoftmax if task.kernels == "triton" and exact == torch.float32 else _TorchSoftmax
    softmax = implement(hidden_NH, min(rows, len(hidden_NH)), columns.num_true, exact)
    for start in range(0, len(hidden_NH), rows):
        part = slice(start, start + rows)
        own_N = labels_N[part] - columns.first
        chunk_NV = torch.mm(hidden_NH[part], true_VH.t(), out=softmax.logits_NV[: len(own_N)])
        target_N, own_log_sum_N = softmax.normalise(chunk_NV, own_N)
        log_sum_N, target_N = _combine(own_log_sum_N, target_N, columns.group)
        loss_N[part] = log_sum_N - target_N
        if z_loss:
            z_loss_N[part] = z_loss * log_sum_N**2
        if not (task.of_hidden or task.of_weight):
            continue
        # d loss / d logit = share - [is the target], d z-loss / d logit = 2 z_loss log_sum share
        of_loss_N, of_z_loss_N = (
            (each_N[part] for each_N in upstream) if upstream else (torch.ones_like(log_sum_N),) * 2
        )
        factor_N = None
        if columns.group is not None or z_loss or upstream is not None:
            factor_N = (own_log_sum_N - log_sum_N).exp() * (of_loss_N + 2 * z_loss * log_sum_N * of_z_loss_N)
        gradients.add(part, softmax.differentiate(chunk_NV, factor_N, of_loss_N))
    return loss_N, z_loss_N, gradients.finish()


def _count_rows(num_columns: int, device: str, dtype: torch.dtype) -> int:
    """Return the tokens of a chunk: on a CPU at 32k columns 224, below fp32 896."""
    rows = max(_MIN_ROWS, _CHUNK_VALUES[device] // max(num_columns, 1))
    # Below fp32 products cost less, and adding to the fp32 weight gradient more.
    return rows if dtype.itemsize >= 4 else 4 * rows


class _TorchSoftmax:
    """What happens to a chunk of logits between the products, in torch: their softmax in place, then its gradient."""

    def __init__(self, hidden_NH: torch.Tensor, rows: int, num_columns: int, exact: torch.dtype) -> None:
        """Make room for a chunk of so many rows and columns."""
        self.logits_NV = hidden_NH.new_empty(rows, num_columns)
        # Made once: a new one would be alive beside the one before.
        is_exact = hidden_NH.dtype == exact
        self._exact_NV = self.logits_NV if is_exact else torch.empty_like(self.logits_NV, dtype=exact)

    def normalise(self, chunk_NV: torch.Tensor, own_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Read the logits of a chunk, the first rows of ``logits_NV``.

        Args:
            chunk_NV: logits.
            own_N: column of the target, outside of V where another rank has it.

        Returns:
            [N] logit of the target, 0 where another rank has it, and [N] logarithm of the sum of exponentials over
            the columns of this rank.
        """
        self._is_own_N = (own_N >= 0) & (own_N < chunk_NV.shape[1])
        self._own_N1 = own_N.where(self._is_own_N, 0)[:, None]
        is_exact = chunk_NV.dtype == self._exact_NV.dtype
        shares_NV = self._shares_NV = chunk_NV if is_exact else self._exact_NV[: len(own_N)].copy_(chunk_NV)
        if not shares_NV.shape[1]:
            return torch.zeros_like(shares_NV[:, :1].sum(1)), shares_NV.new_full((len(own_N),), -torch.inf)
        target_N = shares_NV.gather(1, self._own_N1)[:, 0] * self._is_own_N
        highest_N1, place_N1 = shares_NV.max(1, keepdim=True)
        # Row by row and value by value, so input and output may be one.
        torch.softmax(shares_NV, 1, out=shares_NV)
        # The share of the highest logit is 1 / sum exp(logit - highest).
        log_sum_N = (highest_N1 - shares_NV.gather(1, place_N1).log())[:, 0]
        return target_N, log_sum_N

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


class _TritonSoftmax:
    """The same in two kernels, which read the logits in their own type; no fp64."""

    def __init__(self, hidden_NH: torch.Tensor, rows: int, num_columns: int, exact: torch.dtype) -> None:
        """Make room for a chunk of so many rows and columns, with a gap behind rows of odd length."""
        from megatron_adapt.engine.kernels.gpu import linear_cross_entropy as gpu

        assert exact == torch.float32
        self._gpu = gpu
        stride = -(-num_columns // gpu.ROW_MULTIPLE) * gpu.ROW_MULTIPLE
        self.logits_NV = hidden_NH.new_empty(rows, stride)[:, :num_columns]

    def normalise(self, chunk_NV: torch.Tensor, own_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Read the logits of a chunk, as ``_TorchSoftmax.normalise``."""
        self._own_N = own_N
        self._highest_N, self._sum_N, target_N = self._gpu.normalise(chunk_NV, own_N)
        return target_N, self._highest_N + self._sum_N.log()

    def differentiate(
        self, chunk_NV: torch.Tensor, factor_N: torch.Tensor | None, scale_N: torch.Tensor
    ) -> torch.Tensor:
        """Turn the chunk that was read last into gradients, as ``_TorchSoftmax.differentiate``."""
        # A share is exp(logit - highest) / sum: what log_sum is rounded by does not enter its exponent.
        factor_N = self._sum_N.reciprocal() if factor_N is None else factor_N / self._sum_N
        self._gpu.differentiate(chunk_NV, self._own_N, self._highest_N, factor_N, scale_N)
        return chunk_NV


def _combine(
    own_log_sum_N: torch.Tensor, target_N: torch.Tensor, group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logarithm of the sum of exponentials and logit of the target over the whole vocabulary."""
    if group is None:
        return own_log_sum_N, target_N
    own = torch.cat([own_log_sum_N, target_N])
    gathered = own.new_empty(group.size() * len(own))
    dist.all_gather_into_tensor(gathered, own, group=group)
    log_sums_RN, targets_RN = gathered.view(group.size(), 2, -1).unbind(1)
    return log_sums_RN.logsumexp(0), targets_RN.sum(0)


class _Gradients:
    """Gradients that grow chunk by chunk."""

    def __init__(
        self,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        task: _Task,
        exact: torch.dtype,
    ) -> None:
        self._hidden_NH, self._weight_VH = hidden_NH, weight_VH
        self._true_VH = weight_VH[: task.columns.num_true]
        self._of_hidden_NH = torch.empty_like(hidden_NH) if task.of_hidden else None
        self._of_weight_VH = torch.zeros_like(weight_VH, dtype=exact) if task.of_weight else None

    def add(self, part: slice, of_logits_NV: torch.Tensor) -> None:
        """Add what a chunk of tokens gives."""
        if self._of_hidden_NH is not None:
            torch.mm(of_logits_NV, self._true_VH, out=self._of_hidden_NH[part])
        sums_VH, hidden_NH = self._of_weight_VH, self._hidden_NH[part]
        if sums_VH is None:
            return
        if sums_VH.dtype == hidden_NH.dtype:
            sums_VH = sums_VH[: len(self._true_VH)]
            torch.addmm(sums_VH, of_logits_NV.t(), hidden_NH, out=sums_VH)
            return
        for first in range(0, len(self._true_VH), _COLUMN_BLOCK):
            block_NV = of_logits_NV[:, first : first + _COLUMN_BLOCK]
            sums_VH[first : first + block_NV.shape[1]] += block_NV.t() @ hidden_NH

    def finish(self) -> list[torch.Tensor | None]:
        """Return the gradients of hidden states and weight, in their types."""
        sums_VH, dtype = self._of_weight_VH, self._weight_VH.dtype
        if sums_VH is None or sums_VH.dtype == dtype:
            return [self._of_hidden_NH, sums_VH]
        # Into the front of the same memory: what a block overwrites was read for it or for one before it.
        narrow_VH = sums_VH.flatten().view(dtype)[: sums_VH.numel()].view_as(sums_VH)
        for first in range(0, len(sums_VH), _COLUMN_BLOCK):
            block = slice(first, first + _COLUMN_BLOCK)
            narrow_VH[block] = sums_VH[block].to(dtype)
        return [self._of_hidden_NH, narrow_VH]
