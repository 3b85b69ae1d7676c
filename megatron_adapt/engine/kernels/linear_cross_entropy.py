"""Output head and cross entropy in one: hidden states in, loss per token out; the logits never exist as a whole.

megatron-core 0.16 has no such thing: ``cross_entropy_loss_fusion`` (``native``, or that of Transformer Engine) fuses
what comes after the logits, and keeps an fp32 softmax of all tokens until the backward pass. Here a chunk of tokens at
a time goes all the way:

1. logits of the chunk, over the columns of this tensor-parallel rank; columns that pad the vocabulary are not computed;
2. ``normalise``: the logarithm of the sum of exponentials of each row, summed in fp32;
3. ``_combine``: over the tensor-parallel ranks, one all-gather of two numbers a token;
4. ``differentiate``: the gradient with respect to the logits, in their place;
5. ``_Gradients.add``: from it that with respect to hidden states and weight, at once.

Where so few tokens fit into a chunk that products get slow, it has many tokens and some of the columns
(``_choose_chunk``): steps 1 and 2 go through all columns, and 4 and 5 again, with the logits computed anew. That is a
fourth product beside three.

Steps 2 and 4, what lies between the matrix products, have two implementations (``softmax``); all else is shared.

The backward pass scales what the forward pass left. That is right where all tokens that bear loss have the same
upstream gradient, as they have in a mean or a sum; ``loss_mask`` names the others, which then cost nothing. For any
other upstream gradient the weight gradient is computed anew: never wrong, but 3 products more.

z-loss (Chowdhery et al. 2022, arXiv 2204.02311, section 5) keeps the logarithm of the sum of exponentials near 0. It
is a second result, so that the loss stays what it is; the forward pass computes the gradient of the sum of both.

Measured on two CPU threads in fp32, against the engine's three products of full size (``benchmarks/loss_memory.py``):
131,072 columns took 1.5 times as long with all of them for 56 tokens at a time, since each chunk reads the whole weight
and passes its gradient twice; with some columns for 2048 tokens, and the fourth product, 1.18 times.

Guarantees: sums and gradients of the weight are accumulated in fp32; what needs no gradient (a frozen head, a frozen
body, validation) is not computed.
Memory beyond the gradients: a chunk of logits (``_choose_chunk``), below fp32 the fp32 sum of the weight gradient and
in torch an fp32 copy of the chunk.

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
"Logits in a chunk. On a CPU few enough for its last-level cache; for a GPU enough to fill it, which was not measured."
_MIN_ROWS = 112
"Fewer tokens do not pay for what a chunk reads and writes."
_TALL_ROWS = 2048
"Tokens of a chunk that does not have all columns: measured on a CPU, with a quarter of the values."
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
    # By the rows of the weight, padding included: ranks of a group must go through the same chunks of tokens.
    rows, width = _choose_chunk(len(weight_VH), hidden_NH.device.type, hidden_NH.dtype)
    blocks = [slice(at, min(at + width, columns.num_true)) for at in range(0, max(columns.num_true, 1), width)]
    true_VH = weight_VH[: columns.num_true]
    loss_N = torch.empty(len(hidden_NH), dtype=exact, device=hidden_NH.device)
    z_loss_N = torch.zeros_like(loss_N)
    gradients = _Gradients(hidden_NH, weight_VH, task, exact, is_whole=len(blocks) == 1)
    softmax = make_softmax(task.kernels, hidden_NH, min(rows, len(hidden_NH)), min(width, columns.num_true))
    for start in range(0, len(hidden_NH), rows):
        part = slice(start, start + rows)
        own_N = labels_N[part] - columns.first
        target_N, own_log_sum_N = torch.zeros_like(loss_N[part]), loss_N.new_full((len(own_N),), -torch.inf).double()
        for block in blocks:
            chunk_NV = _multiply(hidden_NH[part], true_VH[block], softmax.logits_NV)
            of_block_N, log_sum_of_block_N = softmax.normalise(chunk_NV, own_N - block.start)
            target_N += of_block_N
            own_log_sum_N = torch.logaddexp(own_log_sum_N, log_sum_of_block_N)
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
        for block in blocks:
            if len(blocks) > 1:
                chunk_NV = _multiply(hidden_NH[part], true_VH[block], softmax.logits_NV)
                softmax.resume(chunk_NV, own_N - block.start, own_log_sum_N)
            gradients.add(part, block, softmax.differentiate(chunk_NV, factor_N, of_loss_N))
    return loss_N, z_loss_N, gradients.finish()


def _choose_chunk(num_columns: int, device: str, dtype: torch.dtype) -> tuple[int, int]:
    """Return the tokens and columns of a chunk: on a CPU in fp32 224 by 32,768, or of 131,072 columns 2048 by 896."""
    # Below fp32 products cost less, and adding to the fp32 weight gradient more.
    values = _CHUNK_VALUES[device] * (1 if dtype.itemsize >= 4 else 4)
    rows = max(1, values // max(num_columns, 1))
    if rows >= _MIN_ROWS:
        return rows, max(num_columns, 1)
    return _TALL_ROWS, max(1, values // (4 * _TALL_ROWS))


def _multiply(hidden_NH: torch.Tensor, weight_VH: torch.Tensor, room_NV: torch.Tensor) -> torch.Tensor:
    """Return logits in the room that there is for them."""
    chunk_NV = room_NV[: len(hidden_NH), : len(weight_VH)]
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

    def __init__(
        self, hidden_NH: torch.Tensor, weight_VH: torch.Tensor, task: _Task, exact: torch.dtype, *, is_whole: bool
    ) -> None:
        """Make room for what is asked for; ``is_whole`` says that a chunk has all columns."""
        self._hidden_NH, self._weight_VH = hidden_NH, weight_VH
        self._true_VH = weight_VH[: task.columns.num_true]
        self._is_whole = is_whole
        self._of_hidden_NH = self._of_weight_VH = None
        if task.of_hidden:
            # A chunk that has all columns writes its rows, others add to them.
            self._of_hidden_NH = torch.empty_like(hidden_NH) if is_whole else torch.zeros_like(hidden_NH, dtype=exact)
        if task.of_weight:
            self._of_weight_VH = torch.zeros_like(weight_VH, dtype=exact)

    def add(self, part: slice, block: slice, of_logits_NV: torch.Tensor) -> None:
        """Add what a chunk gives: some tokens, and a block of columns."""
        if self._of_hidden_NH is not None and self._is_whole:
            torch.mm(of_logits_NV, self._true_VH, out=self._of_hidden_NH[part])
        elif self._of_hidden_NH is not None:
            _add_product(self._of_hidden_NH[part], of_logits_NV, self._true_VH[block])
        if self._of_weight_VH is None:
            return
        # By columns, below fp32: the product that is added has the size of the sum.
        step = len(self._true_VH) if self._of_weight_VH.dtype == of_logits_NV.dtype else _COLUMN_BLOCK
        for first in range(block.start, block.stop, max(step, 1)):
            columns = slice(first, min(first + step, block.stop))
            of_columns_NV = of_logits_NV[:, first - block.start : columns.stop - block.start]
            _add_product(self._of_weight_VH[columns], of_columns_NV.t(), self._hidden_NH[part])

    def finish(self) -> list[torch.Tensor | None]:
        """Return the gradients of hidden states and weight, in their types."""
        of_hidden_NH = None if self._of_hidden_NH is None else self._of_hidden_NH.to(self._hidden_NH.dtype)
        sums_VH, dtype = self._of_weight_VH, self._weight_VH.dtype
        if sums_VH is None or sums_VH.dtype == dtype:
            return [of_hidden_NH, sums_VH]
        # Into the front of the same memory: what a block overwrites was read for it or for one before it.
        narrow_VH = sums_VH.flatten().view(dtype)[: sums_VH.numel()].view_as(sums_VH)
        for first in range(0, len(sums_VH), _COLUMN_BLOCK):
            block = slice(first, first + _COLUMN_BLOCK)
            narrow_VH[block] = sums_VH[block].to(dtype)
        return [of_hidden_NH, narrow_VH]


def _add_product(sums: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add a product to sums that may be of a wider type."""
    if sums.dtype == left.dtype:
        torch.addmm(sums, left, right, out=sums)
    else:
        sums += left @ right
