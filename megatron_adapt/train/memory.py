"""Bytes that one rank of a training job holds, counted on tensors without memory.

``measure_rank`` builds the rank's part of the real model, its gradient buffers and its optimizer under a fake process
group (``engine.fake``) and runs micro-batches forward and backward. ``LiveBytes`` sees every operation and adds up
the storages that are alive. What is counted and what is not:

- weights, gradient buffers (fp32, padded for the distributed optimizer), fp32 master weights and their cut over the
  data-parallel ranks: those that the engine makes;
- moments: two values, in their types, per value that the optimizer of this rank steps; it makes them in the first step;
- activations: what lives between the forward and the backward pass of a micro-batch, times the micro-batches that a
  stage of the 1F1B schedule holds at once, ``min(P - p, micro-batches)``; under a virtual pipeline the parts of the
  model take turns, P micro-batches each (``list_in_flight``; Narayanan et al. 2021, arXiv 2104.04473);
- working memory: what a micro-batch takes beyond that at its worst moment, such as a chunk of logits of the loss;
- not counted: copies that attention inside documents makes (``reset_attention_mask``), the copy of one gradient that
  clipping makes, the CUDA context, buffers of NCCL and cuBLAS, and gaps between blocks of the allocator.

All tensor-parallel ranks of a stage hold tensors of the same sizes, and so do all data-parallel ones (the buffers are
padded to be cut evenly), so a stage is measured once.
"""

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core import parallel_state
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from megatron_adapt.config import StageSettings, TrainSettings
from megatron_adapt.engine.fake import start_fake_engine
from megatron_adapt.engine.llama import LlamaModel, build_chunks
from megatron_adapt.engine.trainable import freeze_rest, is_by_layer
from megatron_adapt.shape import LlamaShape
from megatron_adapt.train.optimizer import Trainer, build_trainer


def count_moment_bytes(train: TrainSettings) -> int:
    """Count the bytes that the optimizer keeps of a value between steps, beside its fp32 master."""
    return sum(2 if dtype == "bf16" else 4 for dtype in (train.exp_avg_dtype, train.exp_avg_sq_dtype))


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that are alive, and what collectives carry."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        "Bytes alive now."
        self.peak = 0
        "Most bytes that were alive at once since it was last set."
        self.sent: Counter[tuple[str, str]] = Counter()
        "Bytes of the whole tensor of every collective, by its name and that of its group."
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and look at the tensors that come out."""
        out = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            carried = [item.nbytes for item in tree_iter(args) if isinstance(item, torch.Tensor)]
            group = next(item for item in tree_iter(args) if isinstance(item, torch.ScriptObject))
            name = torch.distributed.ProcessGroup.unbox(group).group_name
            self.sent[func.overloadpacket.__name__, name] += max(carried)
        for item in tree_iter(out):
            if isinstance(item, torch.Tensor) and item.layout == torch.strided:
                self._add(item.untyped_storage())
        return out

    def _add(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = storage.nbytes()
        self.live += self._known[key]
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self._known.pop(key)


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """What one rank of a pipeline stage holds, in bytes."""

    parameters: int
    "Values of the stage over its tensor-parallel ranks, each counted once."
    weights: int
    gradients: int
    optimizer: int
    activations: int
    "Of the micro-batches that the stage holds at once."
    working: int
    sent_by_tensor: int
    "Bytes that this rank sends to its tensor-parallel ranks for one micro-batch, by ring algorithms."
    sent_by_context: int
    "The same to the ranks that share its windows."
    in_flight: int
    "Micro-batches that the stage holds at once; under a virtual pipeline those of its parts, each counted."

    @property
    def total(self) -> int:
        """Bytes at the worst moment of a step."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.working


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained, how, and on how many ranks."""

    shape: LlamaShape
    "With the true vocabulary."
    padded_vocab_size: int
    train: TrainSettings
    stage: StageSettings
    world_size: int
    on_gpu: bool
    new_blocks: tuple[int, ...] = ()
    "Numbers of the blocks that were added to the model."

    @property
    def num_copies(self) -> int:
        """Data-parallel ranks."""
        return self.world_size // self.train.model_parallel_size

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of a data-parallel rank in a step."""
        return self.train.global_batch_size // (self.num_copies * self.train.micro_batch_size)


def measure_stages(job: Job) -> list[RankMemory]:
    """Measure a rank of every pipeline stage; stages between the first and the last differ in what is in flight."""
    num_stages = job.train.pipeline_model_parallel_size
    # Where some layers learn, no two stages need be alike.
    own = range(num_stages) if is_by_layer(job.stage.trainable) else {0, min(1, num_stages - 1), num_stages - 1}
    measured = {stage: measure_rank(job, stage) for stage in own}
    return [measured.get(stage) or _measure_alike(job, measured[1], stage) for stage in range(num_stages)]


def _measure_alike(job: Job, rank: RankMemory, stage: int) -> RankMemory:
    """Return what a stage holds whose layers are those of stage 1, and which has other micro-batches in flight."""
    before, after = (len(list_in_flight(job, number)) for number in (1, stage))
    return replace(rank, activations=rank.activations * after // before, in_flight=after)


def list_in_flight(job: Job, stage: int) -> list[int]:
    """List the part of the model, by number, of every micro-batch that a stage holds before its first backward pass.

    Source: megatron-core 0.16 ``schedules.get_pp_rank_microbatches``: the warm-up, and one forward pass more.
    """
    num_stages, parts = job.train.pipeline_model_parallel_size, job.train.virtual_pipeline_model_parallel_size
    behind = num_stages - stage - 1
    if parts == 1:
        return [0] * min(behind + 1, job.num_micro_batches)
    most = parts * job.num_micro_batches
    held = min(2 * behind + (parts - 1) * num_stages + 1, most)
    return [at // num_stages % parts for at in range(held)]


def measure_rank(job: Job, stage: int) -> RankMemory:
    """Measure a rank of one pipeline stage with one micro-batch.

    Args:
        job: what is trained; layout and batch fit model and ranks (``check_layout``, ``check_launch``).
        stage: number of the pipeline stage, from 0.
    """
    ranks_of_stage = job.world_size // job.train.pipeline_model_parallel_size
    with (
        start_fake_engine(job.train, rank=stage * ranks_of_stage, world_size=job.world_size, on_gpu=job.on_gpu),
        LiveBytes() as live,
    ):
        trainer = _build_trainer(job)
        sizes = [count_moment_bytes(job.train) * weight.numel() for weight in _list_steps(trainer)]
        moments = [torch.empty(size, dtype=torch.uint8) for size in sizes]
        static = live.live
        for model in trainer.models:  # makes what stays: buffers of the engine, tables of rotary embeddings
            _run_micro_batch(job, model, live)
        live.sent.clear()
        before, working, activations = live.live, 0, []
        for model in trainer.models:
            live.peak = live.live
            activations.append(_run_micro_batch(job, model, live))
            working = max(working, live.peak - before - activations[-1])
        weights = [weight for model in trainer.bare_models for weight in model.parameters()]
        storages = {weight.untyped_storage()._cdata: weight.untyped_storage().nbytes() for weight in weights}
        masters = [weight for weight in _list_steps(trainer) if weight.untyped_storage()._cdata not in storages]
        kept = {master.untyped_storage()._cdata: master.untyped_storage().nbytes() for master in masters}
        del moments  # until here they were alive beside the activations
        in_flight = list_in_flight(job, stage)
        return RankMemory(
            parameters=_count_parameters(job, trainer.bare_models),
            weights=sum(storages.values()),
            gradients=sum(buffer.grad_data.nbytes for model in trainer.models for buffer in model.buffers),
            optimizer=sum(kept.values()) + sum(sizes),
            activations=sum(activations[part] for part in in_flight),
            working=working + before - static,
            sent_by_tensor=_count_sent(live.sent, parallel_state.get_tensor_model_parallel_group()),
            sent_by_context=_count_sent(live.sent, parallel_state.get_context_parallel_group()),
            in_flight=len(in_flight),
        )


def _build_trainer(job: Job) -> Trainer:
    """Build what a rank trains with; needs an engine."""
    models = build_chunks(
        job.shape,
        padded_vocab_size=job.padded_vocab_size,
        layout=job.train,
        seq_length=job.train.seq_length,
        bf16=job.train.bf16,
    )
    # The matrices have gradients and moments also where some of their rows do not learn.
    trainable = "embeddings" if job.stage.trainable == "new_rows" else job.stage.trainable
    for model in models:
        freeze_rest(model, trainable, new_blocks=job.new_blocks)
    settings = replace(job.stage, trainable=trainable, objective="language_modeling", distillation_layer=-1)
    return build_trainer(models, job.train, settings, num_steps=10)


def _list_steps(trainer: Trainer) -> list[Any]:
    """List the tensors that the optimizer of this rank steps."""
    return [weight for group in trainer.optimizer.param_groups for weight in group["params"]]


def _count_parameters(job: Job, models: list[LlamaModel]) -> int:
    """Count the values of a stage over its tensor-parallel ranks as a checkpoint does, each once."""
    tensor_size = job.train.tensor_model_parallel_size
    return sum(
        weight.numel() * (tensor_size if getattr(weight, "tensor_model_parallel", False) else 1)
        for model in models
        for name, weight in model.named_parameters()
        # The last stage has a copy of a tied embedding.
        if not (job.shape.tied and name == "output_layer.weight")
    )


def _run_micro_batch(job: Job, model: Any, live: LiveBytes) -> int:
    """Run one micro-batch forward and backward; return the bytes that live in between."""
    before = live.live
    return run_forward_backward(job, model, lambda: live.live) - before


def run_forward_backward(job: Job, model: Any, look: Callable[[], int] = int) -> int:
    """Run one micro-batch through a part of the model that this rank holds.

    Args:
        job: what is trained.
        model: the part, wrapped or not.
        look: called between the forward and the backward pass.

    Returns:
        What ``look`` returned.
    """
    train, bare = job.train, getattr(model, "module", model)
    length = train.seq_length // train.context_parallel_size
    shape_BT = (train.micro_batch_size, length)
    ids_BT = torch.zeros(shape_BT, dtype=torch.long)
    labels_BT, positions_BT = torch.zeros_like(ids_BT), torch.arange(length).expand(shape_BT)
    if not bare.pre_process:
        rows = length // train.tensor_model_parallel_size if train.sequence_parallel else length
        received_TBH = torch.empty(rows, train.micro_batch_size, job.shape.hidden_size, dtype=_get_dtype(train))
        bare.set_input_tensor([received_TBH.requires_grad_()])
    output = model(ids_BT, positions_BT, None, labels=labels_BT)
    seen = look()
    if bare.post_process:
        output.sum().backward()
    elif output.requires_grad:  # not where neither this stage nor one before it learns
        torch.autograd.backward(output, torch.empty_like(output))
    return seen


def _get_dtype(train: TrainSettings) -> torch.dtype:
    return torch.bfloat16 if train.bf16 else torch.float32


def _count_sent(carried: Counter[tuple[str, str]], group: Any) -> int:
    """Count the bytes that a rank sends in a group whose rings carry tensors of these sizes.

    Source: Thakur, Rabenseifner and Gropp 2005: ``(n - 1) / n`` of the tensor, twice for an all-reduce.
    """
    rounds = sum(
        size * (2 if name.startswith("allreduce") else 1)
        for (name, place), size in carried.items()
        if place == group.group_name
    )
    num_ranks = int(group.size())
    return rounds * (num_ranks - 1) // num_ranks
