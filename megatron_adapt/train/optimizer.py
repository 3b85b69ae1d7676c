"""Gradient buffers, optimizer and learning rate of one stage, all of them megatron-core's."""

from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from numpy.typing import NDArray

from megatron_adapt.config import StageSettings, TrainSettings
from megatron_adapt.engine import adam, reshard
from megatron_adapt.engine.llama import LlamaModel
from megatron_adapt.engine.trainable import FrozenRows, find_frozen_rows
from megatron_adapt.train.schedule import build_schedule


@dataclass(frozen=True)
class Trainer:
    """What one rank trains with: its wrapped model, the optimizer and the schedule."""

    model: DistributedDataParallel
    optimizer: MegatronOptimizer
    schedule: OptimizerParamScheduler
    frozen_rows: tuple[FrozenRows, ...] = ()
    "Rows that do not learn, of matrices that do."

    @property
    def bare_model(self) -> LlamaModel:
        """The model without its gradient buffers."""
        model: LlamaModel = self.model.module
        return model


def build_trainer(
    model: LlamaModel,
    train: TrainSettings,
    stage: StageSettings,
    num_steps: int,
    new_ids: NDArray[np.int64] | None = None,
) -> Trainer:
    """Wrap a frozen-as-wanted model and build its optimizer and schedule.

    Args:
        model: the part of this rank; parameters that do not learn are frozen already.
        train: settings of the run.
        stage: settings of the stage.
        num_steps: optimizer steps of the stage.
        new_ids: for ``trainable = "new_rows"``, the ids whose rows learn.
    """
    frozen_rows: tuple[FrozenRows, ...] = ()
    if stage.trainable == "new_rows":
        assert new_ids is not None
        frozen_rows = find_frozen_rows(model, new_ids)
    adam.install()
    reshard.install()
    buffers = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=train.use_distributed_optimizer
    )
    wrapped = DistributedDataParallel(config=model.config, ddp_config=buffers, module=model)
    config = OptimizerConfig(
        optimizer="adam",
        lr=stage.lr,
        min_lr=stage.min_lr,
        weight_decay=_get_weight_decay(train, stage),
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        adam_eps=train.adam_eps,
        clip_grad=train.clip_grad,
        bf16=train.bf16,
        params_dtype=torch.bfloat16 if train.bf16 else torch.float32,
        use_distributed_optimizer=train.use_distributed_optimizer,
    )
    optimizer = get_megatron_optimizer(config, [wrapped])
    return Trainer(wrapped, optimizer, build_schedule(optimizer, stage, num_steps, config.weight_decay), frozen_rows)


def _get_weight_decay(train: TrainSettings, stage: StageSettings) -> float:
    """Return the weight decay of a stage: none where some rows of a matrix learn, or it would move the others."""
    return 0.0 if stage.trainable == "new_rows" else train.weight_decay
