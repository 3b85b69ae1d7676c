"""Start and stop the engine: process group, parallel layout, seeds.

NCCL where CUDA is, gloo otherwise, by the same code. A process that no launcher started is a job of one rank.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_adapt.config import Layout
from megatron_adapt.engine import cpu

_TIMEOUT = timedelta(minutes=10)
_MARGIN = timedelta(minutes=5)
_FRESH_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
_logger = logging.getLogger(__name__)


def get_device() -> torch.device:
    """Return the device of this rank."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


@contextmanager
def start_engine(layout: Layout, seed: int, step_timeout_in_mins: float = 0) -> Iterator[None]:
    """Set up the process group and megatron-core's groups; tear both down at the end.

    Args:
        layout: how the model will be spread over the ranks.
        seed: seed of every random generator of the engine.
        step_timeout_in_mins: when a rank that stands still ends itself; the others wait for it a little longer.
    """
    cpu.install()
    quieten_engine()
    # A rank that stands still is to show where (train/watchdog.py) before others fail for having waited.
    timeout = max(_TIMEOUT, timedelta(minutes=step_timeout_in_mins) + _MARGIN)
    _init_process_group(timeout)
    try:
        make_groups(layout, timeout)
        torch.manual_seed(seed)
        model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
        yield
    except BaseException:
        _leave(is_failing=True)
        raise
    _leave(is_failing=False)


def _leave(*, is_failing: bool) -> None:
    parallel_state.destroy_model_parallel()
    if is_failing and dist.get_backend() == "nccl":
        # To destroy is to wait for collectives that ranks have begun; those that this one failed in never end.
        dist.distributed_c10d._abort_process_group()
        return
    dist.destroy_process_group()


def make_groups(layout: Layout, timeout: timedelta = _TIMEOUT) -> None:
    """Make the engine's groups of ranks; those of another layout must have been destroyed."""
    chunks = layout.virtual_pipeline_model_parallel_size
    parallel_state.initialize_model_parallel(
        layout.tensor_model_parallel_size,
        layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        context_parallel_size=layout.context_parallel_size,
        distributed_timeout_minutes=timeout / timedelta(minutes=1),
    )


def _init_process_group(timeout: timedelta) -> None:
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # Batch systems export MASTER_ADDR to every process; a rank only has who was launched as one.
    if "RANK" in os.environ:
        _check_restarts()
        dist.init_process_group(backend, timeout=timeout)
        return
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group(backend, timeout=timeout, store=store, rank=0, world_size=1)


def _check_restarts() -> None:
    """Say what a restart by torchrun needs: it keeps its store, with the addresses of the ranks that are gone."""
    may_restart = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    if may_restart and os.environ.get(_FRESH_STORE, "0") != "1" and os.environ["RANK"] == "0":
        _logger.warning("torchrun --max-restarts: a restart fails to connect without %s=1; set it", _FRESH_STORE)


def quieten_engine() -> None:
    """Silence what the engine says of every optional package."""
    for name in ("megatron.core", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
