"""What a training stage takes in all: steps, time, checkpoints, and the bytes that ranks send each other.

Bytes are those a rank sends, by ring algorithms: ``(n - 1) / n`` of a tensor to gather or reduce-scatter it over n
ranks, twice that to all-reduce it. Of the pipeline's stages the busiest is named.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

from megatron_adapt.config import TrainSettings
from megatron_adapt.data.batches import Batches
from megatron_adapt.train.flops import Device, count_flops, count_learning
from megatron_adapt.train.memory import Job, RankMemory, count_moment_bytes

_SECONDS_OF_A_DAY = 86400


@dataclass(frozen=True, kw_only=True)
class StageCosts:
    """What one training stage takes; bytes, FLOPs and seconds."""

    stage: str
    trainable: str
    world_size: int
    tensor_model_parallel_size: int
    pipeline_model_parallel_size: int
    virtual_pipeline_model_parallel_size: int
    context_parallel_size: int
    sequence_parallel: bool
    num_copies: int
    "Data-parallel ranks."
    parameters: int
    "Values of a checkpoint's weights, rows that pad the vocabulary among them."
    learning: int
    "Of these, those with a gradient buffer."
    vocab_size: int
    padded_vocab_size: int
    ranks: tuple[RankMemory, ...]
    "Memory of a rank of every pipeline stage."
    device_bytes: float
    steps: int
    tokens_per_step: int
    micro_batches: int
    "Of a data-parallel rank in a step."
    bubble: float
    "Share of a step that a pipeline stage waits."
    flops_per_step: float
    days: float | None
    "None where the device has no peak to plan with."
    checkpoint_bytes: int
    save_seconds: float
    num_saves: int
    sent_by_tensor: int
    "Bytes that a rank sends in a step, to its tensor-parallel ranks."
    sent_by_context: int
    "To the ranks that share its windows."
    sent_by_pipeline: int
    sent_by_data: int
    sent_by_tied: int
    "Between first and last stage, which both hold a tied embedding."

    @property
    def worst(self) -> RankMemory:
        """The rank that takes the most."""
        return max(self.ranks, key=lambda rank: rank.total)

    @property
    def fits(self) -> bool:
        """Whether every rank fits into its device."""
        return self.worst.total <= self.device_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {**asdict(self), "peak_bytes": self.worst.total, "fits": self.fits}


def count_costs(
    job: Job, ranks: list[RankMemory], device: Device, *, device_bytes: float, mfu: float, save_speed: float
) -> StageCosts:
    """Count what a training stage takes.

    Args:
        job: the stage in its layout.
        ranks: memory of a rank of every pipeline stage.
        device: data sheet of what a rank runs on.
        device_bytes: memory of a device.
        mfu: share of the peak that is reached.
        save_speed: bytes per second that the whole job writes.
    """
    train, stage, num_stages = job.train, job.stage, job.train.pipeline_model_parallel_size
    num_parts = train.virtual_pipeline_model_parallel_size
    tokens_per_step = train.global_batch_size * train.seq_length
    whole = -(-stage.tokens // tokens_per_step)
    steps = Batches.of(
        stage, num_windows=whole * train.global_batch_size, global_batch_size=train.global_batch_size
    ).num_steps
    learns = stage.trainable, job.new_blocks
    flops = tokens_per_step * count_flops(job.shape, train.seq_length, *learns)
    peak = 1e12 * (device.bf16_tflops if train.bf16 else device.fp32_tflops)
    parameters = sum(rank.parameters for rank in ranks)
    learning = count_learning(job.shape, job.padded_vocab_size, *learns)
    checkpoint_bytes = parameters * (2 if train.bf16 else 4) + learning * count_state_bytes(train)
    by_data, by_tied = count_gradient_traffic(job, max(rank.gradients for rank in ranks))
    return StageCosts(
        stage=stage.name,
        trainable=stage.learning,
        world_size=job.world_size,
        tensor_model_parallel_size=train.tensor_model_parallel_size,
        pipeline_model_parallel_size=num_stages,
        virtual_pipeline_model_parallel_size=train.virtual_pipeline_model_parallel_size,
        context_parallel_size=train.context_parallel_size,
        sequence_parallel=train.sequence_parallel,
        num_copies=job.num_copies,
        parameters=parameters,
        learning=learning,
        vocab_size=job.shape.vocab_size,
        padded_vocab_size=job.padded_vocab_size,
        ranks=tuple(ranks),
        device_bytes=device_bytes,
        steps=steps,
        tokens_per_step=tokens_per_step,
        micro_batches=job.num_micro_batches,
        bubble=(num_stages - 1) / (job.num_micro_batches * num_parts + num_stages - 1),
        flops_per_step=flops,
        days=flops * whole / (job.world_size * peak * mfu) / _SECONDS_OF_A_DAY if peak else None,
        checkpoint_bytes=checkpoint_bytes,
        save_seconds=checkpoint_bytes / save_speed,
        num_saves=math.ceil(steps / train.save_interval),
        sent_by_tensor=job.num_micro_batches * max(rank.sent_by_tensor for rank in ranks),
        sent_by_context=job.num_micro_batches * max(rank.sent_by_context for rank in ranks),
        sent_by_pipeline=count_pipeline_traffic(job),
        sent_by_data=by_data,
        sent_by_tied=by_tied,
    )


def count_state_bytes(train: TrainSettings) -> int:
    """Count the bytes of a checkpoint for a value that learns: fp32 master and two moments.

    The distributed optimizer writes all three in fp32, whatever it keeps; moments of bf16 come back exactly. Without it
    each has its type, and weights in fp32 are their own masters.
    """
    if train.use_distributed_optimizer:
        return 12
    return (4 if train.bf16 else 0) + count_moment_bytes(train)


def count_pipeline_traffic(job: Job) -> int:
    """Count the bytes that the busiest rank sends along the pipeline in a step: hidden states on, gradients back."""
    train = job.train
    length = train.seq_length // train.context_parallel_size
    values = train.micro_batch_size * length * job.shape.hidden_size
    hidden = values * (2 if train.bf16 else 4) // (train.tensor_model_parallel_size if train.sequence_parallel else 1)
    ways = min(2, train.pipeline_model_parallel_size - 1)
    return ways * hidden * job.num_micro_batches * train.virtual_pipeline_model_parallel_size


def count_gradient_traffic(job: Job, gradient_bytes: int) -> tuple[int, int]:
    """Count the bytes that a rank sends in a step to other data-parallel ranks, and for a tied embedding.

    The distributed optimizer reduce-scatters fp32 gradients and gathers weights in their own type; without it
    gradients are all-reduced.
    """
    # Ranks that share a window have gradients of its parts.
    train, copies = job.train, job.num_copies * job.train.context_parallel_size
    weights = gradient_bytes // 4 * (2 if train.bf16 else 4)
    carried = gradient_bytes + (weights if train.use_distributed_optimizer else gradient_bytes)
    embedding = 4 * job.padded_vocab_size * job.shape.hidden_size // train.tensor_model_parallel_size
    is_shared = job.shape.tied and train.pipeline_model_parallel_size > 1
    return carried * (copies - 1) // copies, embedding if is_shared else 0
