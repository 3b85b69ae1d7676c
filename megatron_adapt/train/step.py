"""One optimizer step and one validation, over micro-batches and the pipeline.

Shapes: B windows of a micro-batch, T positions. Losses are summed over tokens and divided by their number once,
over the whole job, so that masked positions weigh nothing and the layout changes nothing.

Every rank reads the windows, so every pipeline stage finds the documents in its micro-batch by itself
(``reset_at``); nothing but hidden states travels between stages.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_batch_on_this_cp_rank
from numpy.typing import NDArray

from megatron_adapt.engine.attention import pack_documents
from megatron_adapt.engine.llama import LlamaModel
from megatron_adapt.engine.parallel import get_device
from megatron_adapt.train.distill import Distillation, compare_hidden_states
from megatron_adapt.train.documents import find_documents
from megatron_adapt.train.finite import MicroBatchLosses, step_if_finite
from megatron_adapt.train.optimizer import Trainer
from megatron_adapt.train.schedule import read_rates
from megatron_adapt.train.tally import BatchSources, sum_by_source


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did."""

    loss: float
    "Mean loss per token that bears loss: nats, or squared difference of hidden states."
    grad_norm: float
    "Norm of the gradient before clipping."
    learning_rate: float
    decoupled_learning_rate: float | None = None
    "That of the vocabulary matrices where it is one of their own; ``learning_rate`` is that of the others."
    num_left_out: int = 0
    "Positions without a loss because the teacher of token distillation ends before them."
    by_source: tuple[float, ...] = ()
    "Losses (nats) of each source, then their bytes of text; empty where that was not asked for."
    is_skipped: bool = False
    "Whether nothing moved but the schedule, because loss or gradient is not finite."
    non_finite: tuple[int, ...] = ()
    "Windows of the batch, from 0, in micro-batches whose loss is not finite."


def train_step(
    trainer: Trainer,
    windows: NDArray[np.int64],
    micro_batch_size: int,
    *,
    loss_mask: NDArray[np.bool_] | None = None,
    reset_at: int | None = None,
    distillation: Distillation | None = None,
    sources: BatchSources | None = None,
    progress: int = 1,
) -> StepReport:
    """Do one optimizer step on a global batch; where loss or gradient is not finite only the schedule moves.

    Args:
        trainer: model, optimizer and schedule of this rank.
        windows: [global batch, T + 1] token ids, the same on every rank; each takes its data-parallel part.
        micro_batch_size: windows in one forward pass.
        loss_mask: [global batch, T], False where a target bears no loss; None where all do.
        reset_at: end-of-document id behind which attention starts anew; None where it spans documents.
        distillation: compare hidden states with those of the old pieces; None predicts the next token.
        sources: where the windows are from, to sum losses and bytes per source; not with ``distillation``.
        progress: how far the schedule of the learning rate goes, in what it counts.
    """
    for model in trainer.models:
        model.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    if loss_mask is None:
        loss_mask = np.ones_like(windows[:, 1:], dtype=bool)
    forward = partial(_forward_step, None, reset_at, sources=sources)
    if distillation is not None:
        forward = partial(_forward_distillation, distillation, reset_at)
    losses = MicroBatchLosses()
    sums = _run_schedule(
        trainer.models, losses.watch(forward), windows, loss_mask, micro_batch_size, learn=True, sources=sources
    ).cpu()
    trainer.schedule.step(increment=progress)
    for rows in trainer.frozen_rows:
        rows.zero_gradient()
    # A batch without a new token has nothing to distil.
    num_tokens = sums[1] if distillation is None else sums[1].clamp(min=1)
    loss = float(sums[0] / num_tokens)
    grad_norm, is_skipped = step_if_finite(trainer.optimizer, loss)
    return StepReport(
        loss,
        grad_norm,
        *read_rates(trainer.optimizer),
        num_left_out=int(sums[2]),
        by_source=() if is_skipped else tuple(sums[3:].tolist()),
        is_skipped=is_skipped,
        non_finite=losses.find_non_finite(len(windows), micro_batch_size) if is_skipped else (),
    )


def measure_bits_per_byte(
    models: Sequence[torch.nn.Module],
    windows: NDArray[np.int64],
    token_bytes_V: torch.Tensor,
    micro_batch_size: int,
    *,
    reset_at: int | None = None,
) -> float:
    """Return the loss on validation windows in bits per byte of text.

    Tokens that stand for no text (special tokens) count neither as loss nor as bytes.

    Args:
        models: parts of the wrapped model on this rank.
        windows: [number, T + 1] token ids.
        token_bytes_V: bytes of text of every token id.
        micro_batch_size: windows in one forward pass.
        reset_at: end-of-document id behind which attention starts anew; None where it spans documents.
    """
    # The interleaved schedule of several parts sends micro-batches in groups of one per pipeline stage.
    group = parallel_state.get_pipeline_model_parallel_world_size() if len(models) > 1 else 1
    per_pass = micro_batch_size * parallel_state.get_data_parallel_world_size() * group
    missing = -len(windows) % per_pass
    padded = np.concatenate([windows, np.repeat(windows[:1], missing, axis=0)])
    loss_mask = np.ones_like(padded[:, 1:], dtype=bool)
    loss_mask[len(windows) :] = False
    forward = partial(_forward_step, token_bytes_V, reset_at)
    for model in models:
        model.eval()
    with torch.no_grad():
        sums = _run_schedule(models, forward, padded, loss_mask, micro_batch_size, learn=False)
    for model in models:
        model.train()
    return float(sums[0] / sums[1]) / math.log(2)


def _run_schedule(
    models: Sequence[torch.nn.Module],
    forward: Callable[..., tuple[torch.Tensor, Any]],
    windows: NDArray[np.int64],
    loss_mask: NDArray[np.bool_],
    micro_batch_size: int,
    *,
    learn: bool,
    sources: BatchSources | None = None,
) -> torch.Tensor:
    """Send all micro-batches of this rank through the pipeline.

    Returns:
        Sums over the job: losses, weights, positions left out; with ``sources``, losses and bytes of each.
    """
    own = _take_data_parallel_part(windows, micro_batch_size)
    own_mask = _take_data_parallel_part(loss_mask, micro_batch_size)
    own_sources, num_sums = _take_sources(sources, len(windows), micro_batch_size)
    # Each part of the model takes every micro-batch by itself.
    batches = [zip(own, own_mask, own_sources, strict=True) for _ in models]
    reports = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=batches if len(models) > 1 else batches[0],
        model=list(models),
        num_microbatches=len(own),
        seq_length=windows.shape[1] - 1,
        micro_batch_size=micro_batch_size,
        forward_only=not learn,
        # The engine's hooks know it of the model, what it calls at the end does not.
        force_all_reduce=learn and models[0].force_all_reduce,
    )
    sums = torch.zeros(num_sums, dtype=torch.float64, device=get_device())
    for report in reports:  # only the last pipeline stage has any
        sums += report["sums"]
    dist.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    dist.broadcast(
        sums,
        src=parallel_state.get_pipeline_model_parallel_last_rank(),
        group=parallel_state.get_pipeline_model_parallel_group(),
    )
    return sums


def _take_data_parallel_part(rows: NDArray[Any], micro_batch_size: int) -> NDArray[Any]:
    """Cut [global batch, ...] into [micro-batches of this rank, micro batch, ...]."""
    size, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    part: NDArray[Any] = rows.reshape(-1, size, micro_batch_size, *rows.shape[1:])[:, rank]
    return part


def _take_sources(sources: BatchSources | None, num_windows: int, micro_batch_size: int) -> tuple[torch.Tensor, int]:
    """Return the sources of the windows of this rank, on its device, and how many sums a step has."""
    numbers = np.zeros(num_windows, dtype=np.int64) if sources is None else sources.sources_B
    own = torch.from_numpy(_take_data_parallel_part(numbers, micro_batch_size))
    return own.to(get_device()), 3 if sources is None else 3 + 2 * sources.num_sources


def _forward_step(
    token_bytes_V: torch.Tensor | None,
    reset_at: int | None,
    batches: Iterator[tuple[NDArray[np.int64], NDArray[np.bool_], torch.Tensor]],
    model: LlamaModel,
    *,
    sources: BatchSources | None = None,
) -> tuple[torch.Tensor, Any]:
    windows, loss_mask, sources_B = next(batches)
    ids = torch.from_numpy(windows).to(get_device())
    inputs_BT, labels_BT = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    positions_BT = torch.arange(inputs_BT.shape[1], device=ids.device).expand_as(inputs_BT)
    weights_BT = torch.from_numpy(loss_mask).to(ids.device).float()
    if token_bytes_V is not None:
        weights_BT = weights_BT * token_bytes_V[labels_BT]
    inputs_BT, labels_BT, positions_BT, weights_BT = _take_context_part(inputs_BT, labels_BT, positions_BT, weights_BT)
    documents = None
    if reset_at is not None:
        cu_seqlens = find_documents(windows[:, :-1], reset_at)
        documents = pack_documents(torch.from_numpy(cu_seqlens), inputs_BT.shape[1])
    masked_BT = None if token_bytes_V is None and loss_mask.all() else weights_BT > 0
    output = model(inputs_BT, positions_BT, None, labels=labels_BT, loss_mask=masked_BT, packed_seq_params=documents)
    count = None
    if sources is not None:
        bytes_BT = sources.token_bytes_V[labels_BT]
        count = partial(sum_by_source, bytes_BT=bytes_BT, sources_B=sources_B, num_sources=sources.num_sources)
    return output, partial(_sum_loss, weights_BT, count=count)


def _take_context_part(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Cut tensors [B, T] into what this rank has of a window that several ranks share."""
    part: dict[int, torch.Tensor] = get_batch_on_this_cp_rank(dict(enumerate(tensors)))
    return [part[at].contiguous() for at in range(len(tensors))]


def _forward_distillation(
    distillation: Distillation,
    reset_at: int | None,
    batches: Iterator[tuple[NDArray[np.int64], NDArray[np.bool_], torch.Tensor]],
    model: Any,
) -> tuple[torch.Tensor, Any]:
    windows, loss_mask, _ = next(batches)
    ids_BT = np.ascontiguousarray(windows[:, :-1])
    loss_BT, counts_BT, is_left_out_BT = compare_hidden_states(distillation, model.module, ids_BT, reset_at)
    weights_BT = torch.from_numpy(loss_mask & counts_BT).to(loss_BT.device).float()
    return loss_BT, partial(_sum_loss, weights_BT, num_left_out=int((loss_mask & is_left_out_BT).sum()))


def _sum_loss(
    weights_BT: torch.Tensor,
    loss_BT: torch.Tensor,
    *,
    num_left_out: int = 0,
    count: Callable[..., torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    counted_BT = weights_BT > 0
    loss = (loss_BT * counted_BT).sum()
    # The engine divides the loss tensor in place later on, so the report must not share its memory.
    sums = torch.stack([loss.detach().double(), weights_BT.sum().double(), loss.new_tensor(num_left_out).double()])
    if count is not None:
        sums = torch.cat([sums, count(loss_BT, counted_BT)])
    return loss, counted_BT.sum().int(), {"sums": sums}
