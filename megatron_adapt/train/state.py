"""Save a training run and continue it exactly, in megatron-core's ``torch_dist`` format.

Writes ``<root>/iter_NNNNNNN/`` (weights, fp32 masters and moments, step count; readable under any parallel
layout) with ``adapt.json`` (the model), ``plan.json`` and ``training.json`` (what the run reads, and the cursors: where
it stands in each source), and last of all
``latest_checkpointed_iteration.txt``: a run killed during a save continues from the save before.
Where some layers of a stack learn (``by_layer``), the optimizer's keys name the layer; the weights are stacked as ever.
Nothing in a run draws random numbers after its start (there is no dropout, and the data order is computed), so
there is no random state to keep.
"""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy, TorchDistSaveShardedStrategy
from megatron.core.optimizer import MegatronOptimizer

from megatron_adapt.checkpoint.dist import CHECKPOINT_VERSION
from megatron_adapt.checkpoint.root import (
    LATEST_FILE,
    Description,
    find_checkpoint,
    name_iteration,
    read_description,
    write_description,
    write_latest,
)
from megatron_adapt.checkpoint.weights import name_chunks, weights_state_dict
from megatron_adapt.data.batches import Batches
from megatron_adapt.data.plan import BlendPosition, write_plan
from megatron_adapt.engine.adam import align_steps
from megatron_adapt.errors import CheckpointError
from megatron_adapt.files import read_json, to_plain, write_json
from megatron_adapt.run_folder import OLDER_DEFAULTS, PLAN_FILE, TRAINING_FILE
from megatron_adapt.train.optimizer import Trainer
from megatron_adapt.train.schedule import describe_change, describe_schedule

_SETTINGS = ("max_lr", "min_lr", "betas", "eps")
"Settings in the optimizer's groups: those of the recipe hold, not those of the checkpoint."
_logger = logging.getLogger(__name__)


def save_state(
    root: Path, trainer: Trainer, description: Description, training: Mapping[str, Any], position: BlendPosition
) -> None:
    """Save weights and optimizer after ``description.step`` optimizer steps; every rank calls this.

    Args:
        root: folder of the stage's checkpoints.
        trainer: what to save.
        description: the model, and the steps done.
        training: what must be the same when the run is continued: data and settings.
        position: the plan, and where the run stands in its sources.
    """
    name = name_iteration(description.step)
    final, partial = root / name, root / f".{name}.partial"
    if dist.get_rank() == 0:
        for leftover in (final, partial):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    strategy = FullyParallelSaveStrategyWrapper(TorchDistSaveShardedStrategy("torch_dist", 1), _data_parallel_group())
    state = {
        **_sharded_state(trainer, is_loading=False),
        "iteration": description.step,
        "checkpoint_version": CHECKPOINT_VERSION,
    }
    dist_checkpointing.save(state, str(partial), strategy)
    dist.barrier()
    if dist.get_rank() == 0:
        write_description(partial, description)
        schedule = describe_schedule(trainer.schedule)
        write_json(partial / TRAINING_FILE, {**training, "schedule": schedule, "cursors": position.describe()})
        write_plan(partial / PLAN_FILE, position.plan)
        partial.replace(final)
        write_latest(root, description.step)
        _logger.info("saved %s", final)
    dist.barrier()


def load_state(root: Path, trainer: Trainer, training: Mapping[str, Any], batches: Batches | None = None) -> int:
    """Load the last saved state into ``trainer``; every rank calls this.

    Args:
        root: folder of the stage's checkpoints.
        trainer: freshly built; its weights, masters, moments and schedule are overwritten.
        training: what this run reads; the saved run must have read the same.
        batches: which windows make which step; None where all steps take the same number.

    Returns:
        Optimizer steps done; 0 if nothing was saved yet.

    Raises:
        CheckpointError: the state was saved by a run with other data or settings.
    """
    if not (root / LATEST_FILE).is_file():
        return 0
    folder = find_checkpoint(root)
    saved = {**OLDER_DEFAULTS, **read_json(folder / TRAINING_FILE)}
    for name, value in to_plain(training).items():
        # A run of before a setting existed had its default.
        if name in saved and saved[name] != value:
            raise CheckpointError(
                f"{folder}: saved with {name} {saved[name]}, now it is {value}; "
                f"restore the setting or the files, or remove {root} to start the stage again"
            )
    load_trainer(folder, trainer)
    step = read_description(folder).step
    trainer.schedule.step(increment=step if batches is None else batches.count_progress(step))
    _logger.info("continuing after step %d of %s", step, folder)
    # A run of before the schedule was kept says nothing of it.
    changed = describe_change(saved["schedule"], describe_schedule(trainer.schedule)) if "schedule" in saved else ""
    if changed:
        _logger.info("%s", changed)
    return step


def load_trainer(folder: Path, trainer: Trainer) -> None:
    """Load weights, masters and moments; the schedule stays where it is.

    Args:
        folder: iteration that ``save_state`` wrote, of a run that trained the same parameters in the same types.
        trainer: freshly built.
    """
    state = _sharded_state(trainer, is_loading=True)
    strategy = FullyParallelLoadStrategyWrapper(TorchDistLoadShardedStrategy(), _data_parallel_group())
    loaded = dist_checkpointing.load(state, str(folder), strategy)
    for name, model in zip(name_chunks(trainer.bare_models), trainer.bare_models, strict=True):
        model.load_state_dict(loaded[name])
    _load_optimizer(trainer.optimizer, loaded["optimizer"])


def _load_optimizer(optimizer: MegatronOptimizer, saved: Any) -> None:
    asked = [{name: group[name] for name in _SETTINGS} for group in optimizer.param_groups]
    # The engine writes fp32 weights in place, which autograd forbids on a leaf.
    with torch.no_grad():
        optimizer.load_state_dict(saved)
    for group, settings in zip(optimizer.param_groups, asked, strict=True):
        group.update(settings)


def _sharded_state(trainer: Trainer, *, is_loading: bool) -> dict[str, Any]:
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": _data_parallel_group(),
    }
    state: dict[str, Any] = weights_state_dict(trainer.bare_models)
    if not is_loading:
        align_steps(trainer.optimizer)
    # Weights are stacked whatever learns; a stack of which some layers learn has no place for their moments alone.
    known = weights_state_dict(trainer.bare_models, by_layer=True) if trainer.by_layer else state
    state["optimizer"] = trainer.optimizer.sharded_state_dict(known, is_loading=is_loading, metadata=metadata)
    return state


def _data_parallel_group() -> Any:
    return parallel_state.get_data_parallel_group(with_context_parallel=True)
