"""When a launch ends before its stage does: a signal, or the minutes it was given; on all ranks after the same step.

Batch systems send SIGTERM or SIGUSR1 some minutes before they kill a job. A signal is noted when it comes and looked at
between two steps, so that a step or a save is never cut; it is enough that one rank gets it. The run then saves and
ends with exit code 0, and the same call goes on from there.
"""

import signal
import time
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from megatron_adapt.engine.parallel import get_device

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_SECONDS = 60


class StopRequest:
    """Notes signals while it is open, and looks at the clock."""

    def __init__(self, exit_duration_in_mins: float) -> None:
        """Begin to count ``exit_duration_in_mins``; 0 is no limit."""
        self._deadline = time.monotonic() + exit_duration_in_mins * _SECONDS if exit_duration_in_mins else float("inf")
        self._reason = ""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        """Take the signals over."""
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._reason = signal.Signals(number).name

    def find_reason(self) -> str:
        """Return why all ranks are to stop now, or nothing; every rank calls this after every step.

        The ranks agree on the first that has a reason.
        """
        own = self._reason or ("the time it was given" if time.monotonic() >= self._deadline else "")
        asked = torch.tensor([bool(own)], dtype=torch.int32, device=get_device())
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return own or ("a signal to another rank" if asked.item() else "")
