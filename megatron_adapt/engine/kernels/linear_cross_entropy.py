"""Output head and cross entropy in one: hidden states in, loss per token out; the logits never exist as a whole.

megatron-core 0.16 has no such thing: ``cross_entropy_loss_fusion`` (``native``, or that of Transformer Engine) fuses
what comes after the logits, and keeps an fp32 softmax of all tokens until the backward pass. Here a chunk of tokens at
a time goes all the way:

1. logits of the chunk, over the columns of this tensor-parallel rank; columns that pad the vocabulary are not computed;
2. ``normalise``: the logarithm of the sum of exponentials of each row, summed in fp32;
3. ``_combine``: over the tensor-parallel ranks, one all-gather of two numbers a token;
4. ``differentiate``: the gradient with respect to the logits, in their place;
5. ``_Gradients.add``: from it that with respect to hidden states and weight, at once.

Steps 2 and 4, what lies between the matrix products, have two implementations (``softmax``); all else is shared.

The backward pass scales what the forward pass left. That is right where all tokens that bear loss have the same
upstream gradient, as they have in a mean or a sum; ``loss_mask`` names the others, which then cost nothing. For any
other upstream gradient the weight gradient is computed anew: never wrong, but 3 products more.

A weight that a ``DistributedDataParallel`` of megatron-core wraps has an fp32 sum of its gradients, its ``main_grad``.
With ``weight_sums_VH`` each chunk adds to that, as the engine's ``gradient_accumulation_fusion`` does with Apex: no
gradient of [V, H] stands beside it, and none is rounded to bf16 on its way. It is added before the upstream gradient is
known, and so for one of 1; another one is refused.

z-loss (Chowdhery et al. 2022, arXiv 2204.02311, section 5) keeps the logarithm of the sum of exponentials near 0. It
is a second result, so that the loss stays what it is; the forward pass computes the gradient of the sum of both.

Guarantees: sums and gradients of the weight are accumulated in fp32; what needs no gradient (a frozen head, a frozen
body, validation) is not computed.
Memory beyond the gradients: a chunk of logits (``_count_rows``), and below fp32 an fp32 copy of it in torch; without
``weight_sums_VH`` the gradient of the weight is an fp32 sum.

Gradients in the forward pass: Liger Kernel (Hsu et al. 2024, arXiv 2410.10989). Shapes: N tokens, H hidden, V columns
of this rank.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_adapt.engine.kernels.dispatch import Implementation
from megatron_adapt.engine.kernels.softmax import make_softmax

_CHUNK_VALUES = {"cpu": 7 << 20, "cuda": 64 << 20}
"Logits in a chunk, of a small vocabulary. For a GPU enough to fill it, which was not measured."
_MIN_ROWS = 512
"Each chunk reads the whole weight and passes its gradient twice, which fewer tokens do not pay for."
_COLUMN_BLOCK = 2048
"Columns of one product: of the logits on a CPU, and of the weight gradient where it is added to a wider sum."


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
    weight_sums_VH: torch.Tensor | None = None,
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
        weight_sums_VH: to what the weight gradient is added, in the forward pass; that which the backward pass gives is
            sparse and has no values then. fp32 (fp64 for fp64 hidden states).
        z_loss: weight of the squared logarithm of the sum of exponentials.
        kernels: what computes the softmax of a chunk; fp64 hidden states go the torch way.

    Returns:
        [N] losses in nats, and [N] z-losses: ``z_loss * log_sum_exp ** 2``, without a gradient where ``z_loss`` is 0.
        Both fp32 (fp64 for fp64 hidden states). Add them, with the same upstream gradient, to learn from both.

    Raises:
        ValueError: in the backward pass, with ``weight_sums_VH``: the upstream gradient of a token is not 1.
    """
    if loss_mask_N is not None:
        rows = loss_mask_N.nonzero().flatten()
        found = linear_cross_entropy(
            hidden_NH[rows], weight_VH, labels_N[rows], columns, weight_sums_VH=weight_sums_VH, z_loss=z_loss,
            kernels=kernels,
        )  # fmt: skip
        loss_N, z_loss_N = (part.new_zeros(len(labels_N)).index_put((rows,), part) for part in found)
        return loss_N, z_loss_N
    learns = torch.is_grad_enabled()
    task = _Task(
        columns,
        z_loss,
        kernels,
        weight_sums_VH if learns and weight_VH.requires_grad else None,
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
    weight_sums_VH: torch.Tensor | None
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
        sums_VH = ctx.task.weight_sums_VH
        scale = _find_common_value(torch.cat([of_loss_N, of_z_loss_N]) if ctx.task.z_loss else of_loss_N)
        if sums_VH is not None and gradients is not None:
            _settle(sums_VH, scale)
        hidden_NH, weight_VH, labels_N = ctx.saved_tensors
        if gradients is None or scale is None:
            *_, gradients = _go_through(hidden_NH, weight_VH, labels_N, ctx.task, (of_loss_N, of_z_loss_N))
        elif scale != 1:
            gradients = [None if gradient is None else gradient.mul_(scale) for gradient in gradients]
        if sums_VH is not None:
            # The engine's hook asks for a gradient on this device; without values it takes no memory.
            gradients[1] = torch.sparse_coo_tensor(
                labels_N.new_empty(2, 0), weight_VH.new_empty(0), weight_VH.shape, check_invariants=False
            )
        return (*gradients, None, None)


def _find_common_value(upstream_N: torch.Tensor) -> float | None:
    """Return the value that all have, NaN where one is, or None; waits for the device."""
    if not len(upstream_N):
        return 1.0
    low, high = torch.stack(upstream_N.aminmax()).tolist()
    # A rank that alone sees a NaN must not begin products that the others would have to share.
    return float(low) if low == high or math.isnan(low) else None


def _settle(sums_VH: torch.Tensor, scale: float | None) -> None:
    """Accept what was added to sums for an upstream gradient of 1, now that it is known.

    Raises:
        ValueError: it is another one.
    """
    if scale is None or (scale != 1 and math.isfinite(scale)):
        raise ValueError(
            f"linear_cross_entropy: upstream gradient {'that differs by token' if scale is None else scale}, but the"
            " weight gradient was added for 1; weight losses by loss_mask alone, or leave out weight_sums_VH"
        )
    if scale != 1:
        # One rank may see this alone: it shall reach the place where all leave the step out.
        sums_VH.fill_(math.nan)


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
    # By the rows of the weight, padding included: ranks of a group must go through the same chunks.
    rows = _count_rows(len(weight_VH), hidden_NH.device.type, hidden_NH.dtype)
    true_VH = weight_VH[: columns.num_true]
    loss_N = torch.empty(len(hidden_NH), dtype=exact, device=hidden_NH.device)
    z_loss_N = torch.zeros_like(loss_N)
    gradients = _Gradients(hidden_NH, weight_VH, task, exact)
    softmax = make_softmax(task.kernels, hidden_NH, min(rows, len(hidden_NH)), columns.num_true)
    for start in range(0, len(hidden_NH), rows):
        part = slice(start, start + rows)
        own_N = labels_N[part] - columns.first
        chunk_NV = _multiply(hidden_NH[part], true_VH, softmax.logits_NV)
        target_N, own_log_sum_N = softmax.normalise(chunk_NV, own_N)
        log_sum_N, target_N = _combine(own_log_sum_N, target_N, columns.group)
        loss_N[part] = log_sum_N - target_N
        if z_loss:
            z_loss_N[part] = z_loss * log_sum_N**2
        if not (task.of_hidden or task.of_weight):
            continue
        # d loss / d logit = share - [is the target], d z-loss / d logit = 2 z_loss log_sum share
        of_loss_N, of_z_loss_N = (
            (each_N[part] for each_N in upstream) if upstream else (torch.ones_like(loss_N[part]),) * 2
        )
        factor_N = None
        if columns.group is not None or z_loss or upstream is not None:
            factor_N = (own_log_sum_N - log_sum_N).exp() * (of_loss_N + 2 * z_loss * log_sum_N * of_z_loss_N)
            factor_N = factor_N.to(exact)
        gradients.add(part, softmax.differentiate(chunk_NV, factor_N, of_loss_N))
    return loss_N, z_loss_N, gradients.finish()


def _count_rows(num_columns: int, device: str, dtype: torch.dtype) -> int:
    """Return the tokens of a chunk: on a CPU 512 at 131,072 columns."""
    # Below fp32 products cost less, and adding to the fp32 weight gradient more.
    values = _CHUNK_VALUES[device] * (1 if dtype.itemsize >= 4 else 4)
    return max(_MIN_ROWS, values // max(num_columns, 1))


def _multiply(hidden_NH: torch.Tensor, weight_VH: torch.Tensor, room_NV: torch.Tensor) -> torch.Tensor:
    """Return logits in the room that there is for them."""
    chunk_NV = room_NV[: len(hidden_NH)]
    # A CPU computes many columns of few tokens at half the speed of a few columns.
    step = _COLUMN_BLOCK if hidden_NH.device.type == "cpu" else max(len(weight_VH), 1)
    for first in range(0, len(weight_VH), step):
        block = slice(first, first + step)
        torch.mm(hidden_NH, weight_VH[block].t(), out=chunk_NV[:, block])
    return chunk_NV


def _combine(
    own_log_sum_N: torch.Tensor, target_N: torch.Tensor, group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logarithm of the sum of exponentials and logit of the target over the whole vocabulary."""
    if group is None:
        return own_log_sum_N, target_N
    own = torch.cat([own_log_sum_N, target_N.double()])
    gathered = own.new_empty(group.size() * len(own))
    dist.all_gather_into_tensor(gathered, own, group=group)
    log_sums_RN, targets_RN = gathered.view(group.size(), 2, -1).unbind(1)
    return log_sums_RN.logsumexp(0), targets_RN.sum(0)


class _Gradients:
    """Gradients that grow chunk by chunk."""

    def __init__(self, hidden_NH: torch.Tensor, weight_VH: torch.Tensor, task: _Task, exact: torch.dtype) -> None:
        """Make room for what is asked for."""
        self._hidden_NH, self._weight_VH, self._is_lent = hidden_NH, weight_VH, task.weight_sums_VH is not None
        self._true_VH = weight_VH[: task.columns.num_true]
        self._of_hidden_NH = torch.empty_like(hidden_NH) if task.of_hidden else None
        self._of_weight_VH = task.weight_sums_VH
        if task.of_weight and not self._is_lent:
            self._of_weight_VH = torch.zeros_like(weight_VH, dtype=exact)

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
        # By columns: the product that is added has the size of the sum.
        for first in range(0, len(self._true_VH), _COLUMN_BLOCK):
            block_NV = of_logits_NV[:, first : first + _COLUMN_BLOCK]
            sums_VH[first : first + block_NV.shape[1]] += block_NV.t() @ hidden_NH

    def finish(self) -> list[torch.Tensor | None]:
        """Return the gradients of hidden states and weight, in their types; None for one that was added elsewhere."""
        sums_VH, dtype = self._of_weight_VH, self._weight_VH.dtype
        if sums_VH is None or self._is_lent:
            return [self._of_hidden_NH, None]
        if sums_VH.dtype == dtype:
            return [self._of_hidden_NH, sums_VH]
        # Into the front of the same memory: what a block overwrites was read for it or for one before it.
        narrow_VH = sums_VH.flatten().view(dtype)[: sums_VH.numel()].view_as(sums_VH)
        for first in range(0, len(sums_VH), _COLUMN_BLOCK):
            block = slice(first, first + _COLUMN_BLOCK)
            narrow_VH[block] = sums_VH[block].to(dtype)
        return [self._of_hidden_NH, narrow_VH]
