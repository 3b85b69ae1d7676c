"""Output head and cross entropy in one: hidden states in, loss per token out; the logits never exist as a whole.

megatron-core 0.16 has no such thing: ``cross_entropy_loss_fusion`` (``native``, or that of Transformer Engine) fuses
what comes after the logits, and keeps an fp32 softmax of all tokens until the backward pass. Here a chunk of tokens at
a time goes all the way:

1. logits of the chunk, over the columns of this tensor-parallel rank; columns that pad the vocabulary are not computed;
2. their softmax in fp32, in place, and from it the logarithm of the sum of exponentials;
3. ``_combine``: over the tensor-parallel ranks, one all-gather of two numbers a token;
4. ``_Gradients.add``: the gradient of the chunk's losses, with respect to hidden states and weight, at once.

The backward pass scales what the forward pass left. That is right where all tokens that bear loss have the same
upstream gradient, as they have in a mean or a sum; ``loss_mask`` names the others, which then cost nothing. For any
other upstream gradient the weight gradient is computed anew: never wrong, but 3 products more.

The alternative, to keep nothing and compute logits again in the backward pass, has 4 matrix products instead of 3. In
sketches on one CPU thread (2048 tokens, 32k columns of 512, fastest of four rounds) it took 1.03 times what the
engine's way takes in fp32 and 0.62 times in bf16, gradients in the forward pass 0.82 and 0.72: where products are as
slow as in fp32 the fourth one is not paid for.

Guarantees: sums and gradients of the weight are accumulated in fp32; what needs no gradient (a frozen head, a frozen
body, validation) is not computed.
Memory beyond the gradients: a chunk of logits (``_count_rows``), and below fp32 the fp32 sum of the weight gradient.

Gradients in the forward pass: Liger Kernel (Hsu et al. 2024, arXiv 2410.10989). Shapes: N tokens, H hidden, V columns
of this rank.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

_CHUNK_VALUES = {"cpu": 8 << 20, "cuda": 64 << 20}
"Logits in a chunk. On a CPU few enough for its last-level cache; for a GPU enough to fill it, which was not measured."
_MIN_ROWS = 64
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
) -> torch.Tensor:
    """Return the cross entropy of every token under ``softmax(hidden @ weight.T)``.

    The gradient of ``hidden_NH`` is that of this rank's columns; the caller sums it over the ranks
    (``copy_to_tensor_model_parallel_region`` or ``gather_from_sequence_parallel_region`` of megatron-core).

    Args:
        hidden_NH: hidden states, the same on all tensor-parallel ranks.
        weight_VH: this rank's rows of the output matrix, padding included.
        labels_N: token ids.
        columns: which columns they are.
        loss_mask_N: False where a token bears no loss: its loss is 0, and nothing is computed for it.
        z_loss: weight of the squared logarithm of the sum of exponentials, which is added to the loss (Chowdhery et
            al. 2022, arXiv 2204.02311, section 5).

    Returns:
        [N] losses in nats, fp32 (fp64 for fp64 hidden states).
    """
    if loss_mask_N is not None:
        rows = loss_mask_N.nonzero().flatten()
        loss = linear_cross_entropy(hidden_NH[rows], weight_VH, labels_N[rows], columns, z_loss=z_loss)
        return loss.new_zeros(len(labels_N)).index_put((rows,), loss)
    learns = torch.is_grad_enabled()
    wanted = _Wanted(learns and hidden_NH.requires_grad, learns and weight_VH.requires_grad)
    loss_N: torch.Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_NH, weight_VH, labels_N, columns, z_loss, wanted
    )
    return loss_N


@dataclass(frozen=True)
class _Wanted:
    """Which gradients are to be computed."""

    of_hidden: bool
    of_weight: bool


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        labels_N: torch.Tensor,
        columns: Columns,
        z_loss: float,
        wanted: _Wanted,
    ) -> torch.Tensor:
        loss_N, gradients = _go_through(hidden_NH, weight_VH, labels_N, columns, z_loss, wanted)
        ctx.save_for_backward(hidden_NH, weight_VH, labels_N)
        ctx.rest = columns, z_loss, wanted
        ctx.gradients = gradients
        return loss_N

    @staticmethod
    def backward(ctx: Any, upstream_N: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # Not saved but handed over: who gets the only reference need not copy [V, H]. A second pass starts anew.
        gradients, ctx.gradients = ctx.gradients, None
        scale = _find_common_value(upstream_N)
        if gradients is None or scale is None:
            hidden_NH, weight_VH, labels_N = ctx.saved_tensors
            columns, z_loss, wanted = ctx.rest
            _, gradients = _go_through(hidden_NH, weight_VH, labels_N, columns, z_loss, wanted, upstream_N)
        elif scale != 1:
            gradients = [None if gradient is None else gradient.mul_(scale) for gradient in gradients]
        return (*gradients, None, None, None, None)


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
    columns: Columns,
    z_loss: float,
    wanted: _Wanted,
    upstream_N: torch.Tensor | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """Return losses, and the gradients of their sum, or of their sum weighted by ``upstream_N``."""
    exact = torch.promote_types(hidden_NH.dtype, torch.float32)
    rows = _count_rows(columns.num_true, hidden_NH.device.type, hidden_NH.dtype)
    true_VH = weight_VH[: columns.num_true]
    loss_N = torch.empty(len(hidden_NH), dtype=exact, device=hidden_NH.device)
    gradients = _Gradients(hidden_NH, weight_VH, columns, wanted, exact)
    logits_NV = hidden_NH.new_empty(min(rows, len(hidden_NH)), columns.num_true)
    # Made once: a new one would be alive beside the one before.
    exact_NV = logits_NV if logits_NV.dtype == exact else torch.empty_like(logits_NV, dtype=exact)
    for start in range(0, len(hidden_NH), rows):
        part = slice(start, start + rows)
        own_N = labels_N[part] - columns.first
        is_own_N = (own_N >= 0) & (own_N < columns.num_true)
        own_N = own_N.where(is_own_N, 0)[:, None]
        chunk_NV = torch.mm(hidden_NH[part], true_VH.t(), out=logits_NV[: len(own_N)])
        shares_NV = chunk_NV if chunk_NV.dtype == exact else exact_NV[: len(own_N)].copy_(chunk_NV)
        target_N, own_log_sum_N = _normalise(shares_NV, own_N, is_own_N)
        log_sum_N, target_N = _combine(own_log_sum_N, target_N, columns.group)
        loss_N[part] = log_sum_N - target_N + z_loss * log_sum_N**2
        if not (wanted.of_hidden or wanted.of_weight):
            continue
        # d loss / d logit = share * (1 + 2 z_loss log_sum) - [is the target]
        scale_N = torch.ones_like(log_sum_N) if upstream_N is None else upstream_N[part]
        if columns.group is not None or z_loss or upstream_N is not None:
            factor_N = (own_log_sum_N - log_sum_N).exp() * (1 + 2 * z_loss * log_sum_N) * scale_N
            shares_NV.mul_(factor_N[:, None])
        if columns.num_true:
            shares_NV.scatter_add_(1, own_N, -(scale_N * is_own_N)[:, None])
        gradients.add(part, chunk_NV.copy_(shares_NV) if chunk_NV.dtype != exact else shares_NV)
    return loss_N, gradients.finish()


def _count_rows(num_columns: int, device: str, dtype: torch.dtype) -> int:
    """Return the tokens of a chunk: on a CPU at 32k columns 256, below fp32 1024."""
    rows = max(_MIN_ROWS, _CHUNK_VALUES[device] // max(num_columns, 1))
    # Below fp32 products cost less, and adding to the fp32 weight gradient more.
    return rows if dtype.itemsize >= 4 else 4 * rows


def _normalise(
    logits_NV: torch.Tensor, own_N1: torch.Tensor, is_own_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn logits into their softmax over the columns of this rank, in place.

    Returns:
        [N] logit of the target, 0 where another rank has it, and [N] logarithm of the sum of exponentials.
    """
    if not logits_NV.shape[1]:
        return torch.zeros_like(logits_NV[:, :1].sum(1)), logits_NV.new_full((len(logits_NV),), -torch.inf)
    target_N = logits_NV.gather(1, own_N1)[:, 0] * is_own_N
    highest_N1, place_N1 = logits_NV.max(1, keepdim=True)
    # Row by row and value by value, so input and output may be one.
    torch.softmax(logits_NV, 1, out=logits_NV)
    # The share of the highest logit is 1 / sum exp(logit - highest).
    log_sum_N = (highest_N1 - logits_NV.gather(1, place_N1).log())[:, 0]
    return target_N, log_sum_N


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
        columns: Columns,
        wanted: _Wanted,
        exact: torch.dtype,
    ) -> None:
        self._hidden_NH, self._weight_VH = hidden_NH, weight_VH
        self._true_VH = weight_VH[: columns.num_true]
        self._of_hidden_NH = torch.empty_like(hidden_NH) if wanted.of_hidden else None
        self._of_weight_VH = torch.zeros_like(weight_VH, dtype=exact) if wanted.of_weight else None

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
