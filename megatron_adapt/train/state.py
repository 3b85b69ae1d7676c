"""Save a training run and continue it exactly, in megatron-core's ``torch_dist`` format.

Writes ``<root>/iter_NNNNNNN/`` (weights, fp32 masters and moments, step count; readable under any parallel
layout) with ``adapt.json`` (the model), ``plan.json`` and ``training.json`` (what the run reads, and the cursors: where
it stands in each source), ``files.json`` (what its files are), and last of all
``latest_checkpointed_iteration.txt``: a run killed during a save continues from the save before. All this stands in a
hidden folder until it is complete.
Where some layers of a stack learn (``by_layer``), the optimizer's keys name the layer; the weights are stacked as ever.
Nothing in a run draws random numbers after its start (there is no dropout, and the data order is computed), so
there is no random state to keep.
"""

import functools
import logging
import secrets
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy, TorchDistSaveShardedStrategy
from megatron.core.optimizer import MegatronOptimizer

from megatron_adapt.checkpoint.dist import CHECKPOINT_VERSION
from megatron_adapt.checkpoint.intact import record_files, sum_own_files
from megatron_adapt.checkpoint.root import (
    LATEST_FILE,
    Description,
    find_checkpoint,
    name_iteration,
    read_description,
    write_description,
    write_latest,
)
from megatron_adapt.checkpoint.weights import fill, name_chunks, weights_state_dict
from megatron_adapt.data.batches import Batches
from megatron_adapt.data.plan import BlendPosition, write_plan
from megatron_adapt.engine import results
from megatron_adapt.engine.adam import align_steps
from megatron_adapt.errors import CheckpointError
from megatron_adapt.files import read_json, write_json
from megatron_adapt.run_folder import PLAN_FILE, TRAINING_FILE, find_change
from megatron_adapt.train.agree import check_saved, explain_failure, run_on_main
from megatron_adapt.train.optimizer import Trainer
from megatron_adapt.train.retention import KEEP_ALL, Retention, hide_iteration, remove_old, sweep
from megatron_adapt.train.schedule import describe_change, describe_schedule

_SETTINGS = ("max_lr", "min_lr", "betas", "eps")
"Settings in the optimizer's groups: those of the recipe hold, not those of the checkpoint."
_logger = logging.getLogger(__name__)


def save_state(
    root: Path,
    trainer: Trainer,
    description: Description,
    training: Mapping[str, Any],
    position: BlendPosition,
    retention: Retention = KEEP_ALL,
) -> None:
    """Save weights and optimizer after ``description.step`` optimizer steps; every rank calls this.

    Args:
        root: folder of the stage's checkpoints.
        trainer: what to save.
        description: the model, and the steps done.
        training: what must be the same when the run is continued: data and settings.
        position: the plan, and where the run stands in its sources.
        retention: which checkpoints stay.

    Raises:
        CheckpointError: a rank could not write; the checkpoint before stays the latest.
    """
    request = begin_save(root, trainer, description, training, position, retention)
    with explain_failure(root, description.step):
        request.execute_sync()


def begin_save(
    root: Path,
    trainer: Trainer,
    description: Description,
    training: Mapping[str, Any],
    position: BlendPosition,
    retention: Retention = KEEP_ALL,
) -> AsyncRequest:
    """Begin a save as ``save_state`` makes it; every rank calls this, and gives the request to the engine's queue.

    What it writes are the values at the time it is scheduled. What is left to do when all ranks have written is the
    last of its finalising functions.
    """
    results.install()
    name = name_iteration(description.step)
    # A writer that outlives a killed rank must not meet the folder of the next attempt.
    partial: Path = run_on_main(lambda: _make_partial(root, f".{name}.{secrets.token_hex(4)}.partial"))
    strategy = FullyParallelSaveStrategyWrapper(TorchDistSaveShardedStrategy("torch_dist", 1), _data_parallel_group())
    state = {
        **_sharded_state(trainer, is_loading=False),
        "iteration": description.step,
        "checkpoint_version": CHECKPOINT_VERSION,
    }
    request = dist_checkpointing.save(state, str(partial), strategy, async_sharded_save=True)
    if request.async_fn is not None:
        request = request._replace(async_fn=functools.partial(_write_and_sum, request.async_fn, partial))

    schedule = describe_schedule(trainer.schedule)

    def finish() -> None:
        write_description(partial, description)
        write_json(partial / TRAINING_FILE, {**training, "schedule": schedule, "cursors": position.describe()})
        write_plan(partial / PLAN_FILE, position.plan)
        record_files(partial)
        replaced = hide_iteration(root, description.step)
        partial.replace(root / name)
        write_latest(root, description.step)
        _logger.info("saved %s", root / name)
        shutil.rmtree(replaced, ignore_errors=True)
        remove_old(root, description.step, retention)

    request.add_finalize_fn(lambda: run_on_main(finish))
    return request


def _make_partial(root: Path, name: str) -> Path:
    (root / name).mkdir(parents=True)
    return root / name


def _write_and_sum(write: Callable[..., None], folder: Path, rank: int, *args: Any) -> None:
    """Write what the engine planned for this rank, and hash it; in a process of its own where the save is one."""
    write(rank, *args)
    # Without room for the sums there was none for the values, which the engine reports for all ranks.
    with suppress(OSError):
        sum_own_files(folder, rank)


def load_state(
    root: Path,
    trainer: Trainer,
    training: Mapping[str, Any],
    batches: Batches | None = None,
    *,
    verify: bool = False,
) -> int:
    """Load the last saved state into ``trainer``; every rank calls this.

    Args:
        root: folder of the stage's checkpoints.
        trainer: freshly built; its weights, masters, moments and schedule are overwritten.
        training: what this run reads; the saved run must have read the same.
        batches: which windows make which step; None where all steps take the same number.
        verify: compare the content of the files with what was saved, not their sizes alone.

    Returns:
        Optimizer steps done; 0 if nothing was saved yet.

    Raises:
        CheckpointError: the state was saved by a run with other data or settings, or its files are damaged.
    """
    run_on_main(lambda: sweep(root))
    if not (root / LATEST_FILE).is_file():
        return 0
    folder = find_checkpoint(root)
    check_saved(folder, verify=verify)
    saved = read_json(folder / TRAINING_FILE)
    if change := find_change(saved, training):
        name, before, now = change
        raise CheckpointError(
            f"{folder}: saved with {name} {before}, now it is {now}; "
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
        fill(model, loaded[name])
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
