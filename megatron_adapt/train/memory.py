"""Bytes that one rank of a training job holds, counted on tensors without memory.

``measure_rank`` builds the rank's part of the real model, its gradient buffers and its optimizer under a fake process
group (``engine.fake``) and runs micro-batches forward and backward. ``LiveBytes`` sees every operation and adds up
the storages that are alive. What is counted and what is not:

- weights, gradient buffers (fp32, padded for the distributed optimizer), fp32 master weights and their cut over the
  data-parallel ranks: those that the engine makes;
- moments: two fp32 values per value that the optimizer of this rank steps; the engine makes them in the first step;
- activations: what lives between the forward and the backward pass of a micro-batch, times the micro-batches that a
  stage of the 1F1B schedule holds at once, ``min(P - p, micro-batches)`` (Narayanan et al. 2021, arXiv 2104.04473);
- working memory: what a micro-batch takes beyond that at its worst moment, such as the fp32 logits of the loss;
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
from megatron_adapt.engine.llama import LlamaModel, build_model
from megatron_adapt.engine.parallel import Layout
from megatron_adapt.engine.trainable import freeze_rest
from megatron_adapt.shape import LlamaShape
from megatron_adapt.train.optimizer import Trainer, build_trainer

_BYTES_OF_MOMENTS = 8


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that are alive, and what collectives carry."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        "Bytes alive now."
        self.peak = 0
        "Most bytes that were alive at once since it was last set."
        self.sent: Counter[str] = Counter()
        "Bytes of the whole tensor of every collective, by its name."
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and look at the tensors that come out."""
        out = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            carried = [item.nbytes for item in tree_iter(args) if isinstance(item, torch.Tensor)]
            self.sent[func.overloadpacket.__name__] += max(carried)
        for item in tree_iter(out):
            if isinstance(item, torch.Tensor):
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
    in_flight: int
    "Micro-batches that the stage holds at once."

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

    @property
    def layout(self) -> Layout:
        """The parallel layout of the settings."""
        return Layout.of(self.train)

    @property
    def num_copies(self) -> int:
        """Data-parallel ranks."""
        return self.world_size // self.layout.model_parallel_size

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of a data-parallel rank in a step."""
        return self.train.global_batch_size // (self.num_copies * self.train.micro_batch_size)


def measure_stages(job: Job) -> list[RankMemory]:
    """Measure a rank of every pipeline stage; stages between the first and the last differ in what is in flight."""
    num_stages = job.train.pipeline_model_parallel_size
    between = [measure_rank(job, 1)] if num_stages > 2 else []
    stages = [measure_rank(job, 0), *between * (num_stages - 2)]
    stages += [measure_rank(job, num_stages - 1)] if num_stages > 1 else []
    return [_hold(stage, min(num_stages - at, job.num_micro_batches)) for at, stage in enumerate(stages)]


def _hold(rank: RankMemory, in_flight: int) -> RankMemory:
    """Return a rank that was measured on one micro-batch as one that holds several."""
    return replace(rank, activations=rank.activations * in_flight, in_flight=in_flight)


def measure_rank(job: Job, stage: int) -> RankMemory:
    """Measure a rank of one pipeline stage with one micro-batch.

    Args:
        job: what is trained; layout and batch fit model and ranks (``check_layout``, ``check_launch``).
        stage: number of the pipeline stage, from 0.
    """
    ranks_of_stage = job.world_size // job.train.pipeline_model_parallel_size
    with (
        start_fake_engine(job.layout, rank=stage * ranks_of_stage, world_size=job.world_size, on_gpu=job.on_gpu),
        LiveBytes() as live,
    ):
        model = build_model(
            job.shape,
            padded_vocab_size=job.padded_vocab_size,
            layout=job.layout,
            seq_length=job.train.seq_length,
            bf16=job.train.bf16,
        )
        # The matrices have gradients and moments also where some of their rows do not learn.
        trainable = "embeddings" if job.stage.trainable == "new_rows" else job.stage.trainable
        freeze_rest(model, trainable)
        settings = replace(job.stage, trainable=trainable, objective="language_modeling", distillation_layer=-1)
        trainer = build_trainer(model, job.train, settings, num_steps=10)
        sizes = [_BYTES_OF_MOMENTS * weight.numel() for weight in _list_steps(trainer)]
        moments = [torch.empty(size, dtype=torch.uint8) for size in sizes]
        static = live.live
        _run_micro_batch(job, trainer, live)  # makes what stays: buffers of the engine, tables of rotary embeddings
        live.sent.clear()
        before, live.peak = live.live, live.live
        activations = _run_micro_batch(job, trainer, live)
        storages = {weight.untyped_storage()._cdata: weight.untyped_storage().nbytes() for weight in model.parameters()}
        masters = [weight for weight in _list_steps(trainer) if weight.untyped_storage()._cdata not in storages]
        kept = {master.untyped_storage()._cdata: master.untyped_storage().nbytes() for master in masters}
        del moments  # until here they were alive beside the activations
        return RankMemory(
            parameters=_count_parameters(job, model),
            weights=sum(storages.values()),
            gradients=sum(buffer.grad_data.nbytes for buffer in trainer.model.buffers),
            optimizer=sum(kept.values()) + sum(sizes),
            activations=activations,
            working=live.peak - before - activations + before - static,
            sent_by_tensor=_count_sent(live.sent, job.train.tensor_model_parallel_size),
            in_flight=1,
        )


def _list_steps(trainer: Trainer) -> list[Any]:
    """List the tensors that the optimizer of this rank steps."""
    return [weight for group in trainer.optimizer.param_groups for weight in group["params"]]


def _count_parameters(job: Job, model: LlamaModel) -> int:
    """Count the values of a stage over its tensor-parallel ranks as a checkpoint does, each once."""
    tensor_size = job.train.tensor_model_parallel_size
    return sum(
        weight.numel() * (tensor_size if getattr(weight, "tensor_model_parallel", False) else 1)
        for name, weight in model.named_parameters()
        # The last stage has a copy of a tied embedding.
        if not (job.shape.tied and name == "output_layer.weight")
    )


def _run_micro_batch(job: Job, trainer: Trainer, live: LiveBytes) -> int:
    """Run one micro-batch forward and backward; return the bytes that live in between."""
    before = live.live
    return run_forward_backward(job, trainer.model, lambda: live.live) - before


def run_forward_backward(job: Job, model: Any, look: Callable[[], int] = int) -> int:
    """Run one micro-batch through the part of the model that this rank holds.

    Args:
        job: what is trained.
        model: the model, wrapped or not.
        look: called between the forward and the backward pass.

    Returns:
        What ``look`` returned.
    """
    train, tensor_size = job.train, job.train.tensor_model_parallel_size
    shape_BT = (train.micro_batch_size, train.seq_length)
    ids_BT = torch.zeros(shape_BT, dtype=torch.long)
    labels_BT, positions_BT = torch.zeros_like(ids_BT), torch.arange(train.seq_length).expand(shape_BT)
    if not parallel_state.is_pipeline_first_stage():
        length = train.seq_length // tensor_size if train.sequence_parallel else train.seq_length
        received_TBH = torch.empty(length, train.micro_batch_size, job.shape.hidden_size, dtype=_get_dtype(train))
        getattr(model, "module", model).set_input_tensor([received_TBH.requires_grad_()])
    output = model(ids_BT, positions_BT, None, labels=labels_BT)
    seen = look()
    if parallel_state.is_pipeline_last_stage():
        output.sum().backward()
    else:
        torch.autograd.backward(output, torch.empty_like(output))
    return seen


def _get_dtype(train: TrainSettings) -> torch.dtype:
    return torch.bfloat16 if train.bf16 else torch.float32


def _count_sent(carried: Counter[str], num_ranks: int) -> int:
    """Count the bytes that a rank sends where rings carry tensors of these sizes.

    Source: Thakur, Rabenseifner and Gropp 2005: ``(n - 1) / n`` of the tensor, twice for an all-reduce.
    """
    rounds = sum(size * (2 if name.startswith("allreduce") else 1) for name, size in carried.items())
    return rounds * (num_ranks - 1) // num_ranks
