"""Measure a peer and our code so that the load of the machine falls on both.

``run_in_turns`` calls all of them once a round, in alternating order; ratios are taken within a round and their
median is reported, so a neighbour that comes and goes moves both sides of a ratio.
``measure`` reads the kernel's high-water mark of resident memory; what the process held before is reported apart,
because imports are not the work. ``run_fresh`` gives it a new process.

Traps: ``ru_maxrss`` of a child starts at the size of the process that started it, ``VmHWM`` does not. Pages of a
mapped file count as resident while they are mapped; pages of the system's file cache do not.
"""

import contextlib
import ctypes
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
_MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one call cost."""

    seconds: float
    start_mib: float
    "Resident memory when it began."
    extra_mib: float
    "How far the peak rose above that."
    result: Any


def run_in_turns(calls: Mapping[str, Callable[[], float]], num_rounds: int) -> dict[str, list[float]]:
    """Call each function once a round; every second round in reverse order.

    Args:
        calls: functions that do the work and return the seconds it took.
        num_rounds: how many rounds to run.

    Returns:
        The seconds of each function by round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for at in range(num_rounds):
        for name in list(calls)[:: -1 if at % 2 else 1]:
            seconds[name].append(calls[name]())
    return seconds


def make_timed(function: Callable[[], object]) -> Callable[[], float]:
    """Return a function that calls ``function`` and returns the seconds it took."""

    def run() -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    return run


def compare(seconds: Mapping[str, list[float]], peer: str, ours: str) -> dict[str, float]:
    """Return the peer's time over ours, as median, lowest and highest ratio of a round; above 1 ours is faster."""
    ratios = [theirs / own for theirs, own in zip(seconds[peer], seconds[ours], strict=True)]
    return {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}


def start_process() -> ProcessPoolExecutor:
    """Return a process for one worker that imports the running script and does nothing else; a context manager."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def run_fresh(function: Callable[..., Any], *args: Any) -> Any:
    """Return ``function(*args)``, run in a process of its own.

    The function, its arguments and its result must be picklable. An exception of the function is raised here.
    """
    with start_process() as process:
        return process.submit(function, *args).result()


def measure(function: Callable[..., Any], *args: Any) -> Measured:
    """Run ``function(*args)`` here; what it cost is only meaningful in a process that has done little before."""
    start_bytes = _reset_peak()
    start = time.perf_counter()
    result = function(*args)
    seconds = time.perf_counter() - start
    extra_mib = (_read_resident("VmHWM") - start_bytes) / _MIB
    return Measured(seconds=seconds, start_mib=start_bytes / _MIB, extra_mib=extra_mib, result=result)


def _reset_peak() -> int:
    """Start the high-water mark anew where the kernel allows it; return the bytes resident now."""
    with contextlib.suppress(AttributeError):  # glibc only: else memory freed before hides part of what is taken now
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):  # no such file outside Linux, read-only in some containers
        _CLEAR_REFS.write_text(_RESET_PEAK)
    return _read_resident("VmRSS")


def _read_resident(field: str) -> int:
    """Return a size from the process's status, in bytes; outside Linux the high-water mark stands for all."""
    if _STATUS.exists():
        lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
        return int(lines[field].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
