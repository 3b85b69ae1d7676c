"""Run a function on several ranks over gloo and collect what it returns."""

import multiprocessing
import os
import queue
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed import TCPStore


def host_store() -> TCPStore:
    """Host the store in which ranks meet; as long as it lives, no other process can take its port."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def become_rank(rank: int, world_size: int, port: int) -> None:
    """Make this process a rank as torchrun would, which hosts the store itself."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True", OMP_NUM_THREADS="1",
    )  # fmt: skip
    torch.set_num_threads(1)


def _run_rank(function: Callable[..., Any], rank: int, world_size: int, port: int, args: tuple, results: Any) -> None:
    become_rank(rank, world_size, port)
    try:
        results.put((rank, True, function(*args)))
    except BaseException:
        results.put((rank, False, traceback.format_exc()))


def _take_result(results: Any, ranks: list[Any], found: dict[int, Any]) -> tuple[int, bool, Any]:
    """Wait for a result as long as every rank that owes one is alive; how long is for pytest's timeout to say."""
    while True:
        dead = [rank for rank, process in enumerate(ranks) if rank not in found and not process.is_alive()]
        try:
            # What a rank put before it ended may still be on its way.
            return results.get(timeout=10 if dead else 1)
        except queue.Empty:
            if dead:
                raise AssertionError(
                    f"rank {dead[0]} ended with code {ranks[dead[0]].exitcode} and no result"
                ) from None


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Call ``function(*args)`` on every rank (RANK, WORLD_SIZE, MASTER_* are set); return the results by rank.

    The function and its arguments must be importable or picklable. The first traceback of a rank is raised.
    """
    store = host_store()
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [
        context.Process(target=_run_rank, args=(function, rank, world_size, store.port, args, results))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    found: dict[int, Any] = {}
    try:
        while len(found) < world_size:
            rank, succeeded, value = _take_result(results, ranks, found)
            if not succeeded:
                raise AssertionError(f"rank {rank} failed:\n{value}")
            found[rank] = value
    finally:
        for process in ranks:
            if len(found) < world_size:
                process.terminate()
            process.join(timeout=30)
    return [found[rank] for rank in range(world_size)]
