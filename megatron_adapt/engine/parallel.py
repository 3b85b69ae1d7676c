"""Start and stop the engine: process group, parallel layout, seeds.

NCCL where CUDA is, gloo otherwise, by the same code. A process that no launcher started is a job of one rank.
"""

import logging
import os
import socket
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


def get_device() -> torch.device:
    """Return the device of this rank."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


@contextmanager
def start_engine(layout: Layout, seed: int) -> Iterator[None]:
    """Set up the process group and megatron-core's groups; tear both down at the end.

    Args:
        layout: how the model will be spread over the ranks.
        seed: seed of every random generator of the engine.
    """
    cpu.install()
    quieten_engine()
    _init_process_group()
    try:
        make_groups(layout)
        torch.manual_seed(seed)
        model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def make_groups(layout: Layout) -> None:
    """Make the engine's groups of ranks; those of another layout must have been destroyed."""
    chunks = layout.virtual_pipeline_model_parallel_size
    parallel_state.initialize_model_parallel(
        layout.tensor_model_parallel_size,
        layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        context_parallel_size=layout.context_parallel_size,
    )


def _init_process_group() -> None:
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # Batch systems export MASTER_ADDR to every process; a rank only has who was launched as one.
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=_TIMEOUT)
        return
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{_free_port()}", rank=0, world_size=1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def quieten_engine() -> None:
    """Silence what the engine says of every optional package."""
    for name in ("megatron.core", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
