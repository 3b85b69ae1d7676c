"""Gradient buffers, optimizer and learning rate of one stage, all of them megatron-core's."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from numpy.typing import NDArray

from megatron_adapt.config import StageSettings, TrainSettings
from megatron_adapt.engine import adam, reshard
from megatron_adapt.engine.llama import LlamaModel
from megatron_adapt.engine.trainable import FrozenRows, find_frozen_rows, is_by_layer
from megatron_adapt.train.schedule import build_schedule

_MOMENT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Trainer:
    """What one rank trains with: its wrapped model, the optimizer and the schedule."""

    models: list[DistributedDataParallel]
    "The parts of the model on this rank: one, or several under a virtual pipeline."
    optimizer: MegatronOptimizer
    schedule: OptimizerParamScheduler
    frozen_rows: tuple[FrozenRows, ...] = ()
    "Rows that do not learn, of matrices that do."
    by_layer: bool = False
    "Whether the optimizer may know some of the layers alone."

    @property
    def bare_models(self) -> list[LlamaModel]:
        """The parts of the model without their gradient buffers."""
        return [model.module for model in self.models]

    @contextmanager
    def hold_weights(self) -> Iterator[None]:
        """Hold all weights of the last step for as long as the block lasts: to save or to validate.

        Under ``overlap_param_gather`` a rank has only its part of them until the next forward pass gathers the rest.
        """
        gathering = [model for model in self.models if model.ddp_config.overlap_param_gather]
        for model in gathering:
            model.disable_forward_pre_hook(param_sync=True)
        yield
        for model in gathering:
            model.enable_forward_pre_hook()


def build_trainer(
    models: list[LlamaModel],
    train: TrainSettings,
    stage: StageSettings,
    num_steps: int,
    new_ids: NDArray[np.int64] | None = None,
) -> Trainer:
    """Wrap a frozen-as-wanted model and build its optimizer and schedule.

    Args:
        models: the parts on this rank; parameters that do not learn are frozen already.
        train: settings of the run.
        stage: settings of the stage.
        num_steps: optimizer steps of the stage.
        new_ids: for ``trainable = "new_rows"``, the ids whose rows learn.
    """
    frozen_rows: tuple[FrozenRows, ...] = ()
    if stage.trainable == "new_rows":
        assert new_ids is not None
        frozen_rows = tuple(rows for model in models for rows in find_frozen_rows(model, new_ids))
    adam.install(_MOMENT_DTYPES[train.exp_avg_dtype], _MOMENT_DTYPES[train.exp_avg_sq_dtype])
    reshard.install()
    wrapped = _wrap(models, train)
    config = OptimizerConfig(
        optimizer="adam",
        lr=stage.lr,
        min_lr=stage.min_lr,
        decoupled_lr=stage.decoupled_lr,
        decoupled_min_lr=stage.decoupled_min_lr,
        weight_decay=_get_weight_decay(train, stage),
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        adam_eps=train.adam_eps,
        clip_grad=train.clip_grad,
        bf16=train.bf16,
        params_dtype=torch.bfloat16 if train.bf16 else torch.float32,
        use_distributed_optimizer=train.use_distributed_optimizer,
        overlap_param_gather=train.overlap_param_gather,
    )
    optimizer = get_megatron_optimizer(config, wrapped, _list_overrides(config))
    schedule = build_schedule(optimizer, stage, num_steps, config.weight_decay)
    return Trainer(wrapped, optimizer, schedule, frozen_rows, is_by_layer(stage.trainable))


def _list_overrides(config: OptimizerConfig) -> dict[Any, Any]:
    """Return megatron-core's settings of groups of parameters; a group with a rate of its own is marked as such.

    The engine finds the groups of a checkpoint again by this mark among others, and does not set it: unmarked, the
    matrices of the vocabulary and those of the body are one group to it.
    """
    overrides = get_standard_config_overrides(config)
    return {key: {**own, "is_decoupled_lr": True} if "max_lr" in own else own for key, own in overrides.items()}


def _wrap(models: list[LlamaModel], train: TrainSettings) -> list[DistributedDataParallel]:
    """Give the parts of the model gradient buffers, and the engine's schedule what it needs to overlap with them."""
    buffers = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=train.use_distributed_optimizer,
        overlap_grad_reduce=train.overlap_grad_reduce,
        overlap_param_gather=train.overlap_param_gather,
        bucket_size=train.ddp_bucket_size or None,
    )
    config = models[0].config
    # What the parts behind the first one send lies behind their arithmetic anyway, so they have one bucket each.
    wrapped = [
        DistributedDataParallel(config=config, ddp_config=buffers, module=model, disable_bucketing=at > 0)
        for at, model in enumerate(models)
    ]
    for model in wrapped:
        # gloo reduces all of a buffer on every rank; to scatter it as well only costs a copy of the buffer.
        model.force_all_reduce = dist.get_backend() == "gloo"
    if train.overlap_grad_reduce:
        pauses = [model.no_sync for model in wrapped]
        config.no_sync_func = pauses if len(pauses) > 1 else pauses[0]
    return wrapped


def _get_weight_decay(train: TrainSettings, stage: StageSettings) -> float:
    """Return the weight decay of a stage: none where some rows of a matrix learn, or it would move the others."""
    return 0.0 if stage.trainable == "new_rows" else train.weight_decay
