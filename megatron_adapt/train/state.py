"""Save a training run and continue it exactly, in megatron-core's ``torch_dist`` format.

Writes ``<root>/iter_NNNNNNN/`` (weights, fp32 masters and moments, step count; readable under any parallel
layout) with ``adapt.json``, and last of all ``latest_checkpointed_iteration.txt``: a run killed during a save
continues from the save before.
Nothing in a run draws random numbers after its start (there is no dropout, and the data order is computed), so
there is no random state to keep.
"""

import logging
import shutil
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

from megatron_adapt.checkpoint.dist import find_checkpoint, read_description
from megatron_adapt.checkpoint.weights import weights_state_dict
from megatron_adapt.errors import CheckpointError
from megatron_adapt.files import write_json
from megatron_adapt.train.optimizer import Trainer

LATEST_FILE = "latest_checkpointed_iteration.txt"
_logger = logging.getLogger(__name__)


def save_state(root: Path, step: int, trainer: Trainer, description: dict[str, Any]) -> None:
    """Save weights and optimizer after ``step`` optimizer steps; every rank calls this.

    Args:
        root: folder of the stage's checkpoints.
        step: optimizer steps done.
        trainer: what to save.
        description: content of ``adapt.json`` but for the step.
    """
    final, partial = root / f"iter_{step:07d}", root / f".iter_{step:07d}.partial"
    if dist.get_rank() == 0:
        for leftover in (final, partial):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    strategy = FullyParallelSaveStrategyWrapper(TorchDistSaveShardedStrategy("torch_dist", 1), _data_parallel_group())
    state = {**_sharded_state(trainer, is_loading=False), "iteration": step, "checkpoint_version": 3.0}
    dist_checkpointing.save(state, str(partial), strategy)
    dist.barrier()
    if dist.get_rank() == 0:
        write_json(partial / "adapt.json", {**description, "step": step})
        partial.replace(final)
        (root / f".{LATEST_FILE}").write_text(str(step))
        (root / f".{LATEST_FILE}").replace(root / LATEST_FILE)
        _logger.info("saved %s", final)
    dist.barrier()


def load_state(root: Path, trainer: Trainer, description: dict[str, Any]) -> int:
    """Load the last saved state into ``trainer``; every rank calls this.

    Args:
        root: folder of the stage's checkpoints.
        trainer: freshly built; its weights, masters, moments and schedule are overwritten.
        description: what this run would write; the saved one must agree.

    Returns:
        Optimizer steps done; 0 if nothing was saved yet.

    Raises:
        CheckpointError: the state was saved by a run with another model, tokenizer, plan or data.
    """
    if not (root / LATEST_FILE).is_file():
        return 0
    folder = find_checkpoint(root)
    saved = read_description(folder)
    for name, value in description.items():
        if saved.get(name) != value:
            raise CheckpointError(
                f"{folder}: saved with {name} {_shorten(saved.get(name))}, now it is {_shorten(value)}; "
                f"restore the setting, or remove {root} to start the stage again"
            )
    state = _sharded_state(trainer, is_loading=True)
    strategy = FullyParallelLoadStrategyWrapper(TorchDistLoadShardedStrategy(), _data_parallel_group())
    loaded = dist_checkpointing.load(state, str(folder), strategy)
    trainer.bare_model.load_state_dict(loaded["model"], strict=False)
    # The engine writes fp32 weights in place, which autograd forbids on a leaf.
    with torch.no_grad():
        trainer.optimizer.load_state_dict(loaded["optimizer"])
    step: int = saved["step"]
    trainer.schedule.step(increment=step)
    _logger.info("continuing after step %d of %s", step, folder)
    return step


def _sharded_state(trainer: Trainer, *, is_loading: bool) -> dict[str, Any]:
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": _data_parallel_group(),
    }
    state = weights_state_dict([trainer.bare_model])
    state["optimizer"] = trainer.optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)
    return state


def _data_parallel_group() -> dist.ProcessGroup:
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def _shorten(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
