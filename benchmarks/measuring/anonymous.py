"""Peak memory of a call beyond mapped files, seen from outside.

``VmHWM`` counts the pages of mapped files; ``RssAnon`` does not, but the kernel keeps no high-water mark of it. So the
process that does the work is watched from here, every two milliseconds: a peak shorter than that can be missed.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from measuring.rounds import start_process
from megatron_adapt.errors import EngineError

_PAUSE_SECONDS = 0.002
_MIB = 1 << 10  # the kernel counts KiB


class Watched(NamedTuple):
    """What a call returned and took."""

    result: Any
    extra_mib: float
    "How far anonymous memory rose above what the process held before."


def run_watched(function: Callable[..., Any], *args: Any) -> Watched:
    """Run ``function(*args)`` in a process of its own, after its imports, and watch its memory.

    Raises:
        EngineError: the kernel does not tell the memory of a process (outside Linux).
    """
    with start_process() as process:
        status = Path(f"/proc/{process.submit(os.getpid).result()}/status")
        if not status.exists():
            raise EngineError(f"{status}: no such file; memory beyond mapped files can only be watched on Linux")
        start = peak = _read_anonymous(status)
        future = process.submit(function, *args)
        while not future.done():
            peak = max(peak, _read_anonymous(status))
            time.sleep(_PAUSE_SECONDS)
        return Watched(future.result(), (max(peak, _read_anonymous(status)) - start) / _MIB)


def _read_anonymous(status: Path) -> int:
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(lines["RssAnon"].split()[0])
