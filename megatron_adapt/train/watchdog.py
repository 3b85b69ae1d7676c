"""Ends a rank that stands still, and says where it stood: stacks of all threads on standard error, exit code 124.

A collective that waits for a lost rank, a file system that does not answer: a job like that costs what a training one
does and says nothing. torchrun sees the exit code, and ends the job or starts it again (``--max-restarts``).

1. ``beat``: something moved. The loop says so before every step and validation, every forward pass by itself
   (``follow``), so that a long validation is no stall. On a GPU a forward pass is queued, not done: the minutes must
   hold a whole step.
2. A thread looks at the clock, and ends the process when the last beat is too old.
3. ``pause``: a save is not watched, for how long a disk takes nobody knows; ranks that wait for others in it give up
   after the time of the process group.

A thread of Python cannot run while another holds the interpreter and never gives it back; none is known that does.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType

import torch

from megatron_adapt.errors import EngineError
from megatron_adapt.train.failure import record_failure

EXIT_CODE = 124
"As timeout(1) has it."
_SECONDS = 60


class Watchdog:
    """Watches this process while it is open."""

    def __init__(self, minutes: float) -> None:
        """Allow ``minutes`` between two beats; 0 watches nothing."""
        self._seconds = minutes * _SECONDS
        self._doing = "the start of the run"
        self._deadline = float("inf")
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        """Begin to watch."""
        if self._seconds:
            self.beat()
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Watch no more."""
        self._closed.set()
        if self._seconds:
            self._thread.join()

    def follow(self, model: torch.nn.Module) -> None:
        """Take every forward pass of ``model`` for a beat."""
        model.register_forward_hook(lambda *_: self.beat())

    def beat(self, doing: str = "") -> None:
        """Count the time anew; ``doing`` is what begins now, if something else does."""
        self._doing = doing or self._doing
        self._deadline = time.monotonic() + self._seconds

    @contextmanager
    def pause(self, doing: str) -> Iterator[None]:
        """Watch nothing while the block runs."""
        self._doing, self._deadline = doing, float("inf")
        yield
        self.beat()

    def _watch(self) -> None:
        left = self._seconds
        # A pause may end, and new minutes begin, while this sleeps: it never sleeps longer than those.
        while not self._closed.wait(min(left, self._seconds)):
            left = self._deadline - time.monotonic()
            if left <= 0:
                self._end_process()

    def _end_process(self) -> None:
        where = f"rank {os.environ.get('RANK', '0')}: {self._doing}"
        error = EngineError(
            f"{where}: nothing moved for {self._seconds / _SECONDS:g} minutes; the stacks above say where each thread "
            "stands; raise train.step_timeout_in_mins if a step may take that long"
        )
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        sys.stderr.write(f"error: {error}\n")
        sys.stderr.flush()
        with suppress(EngineError), record_failure():
            raise error
        os._exit(EXIT_CODE)
