"""Saves the checkpoints of a stage as it trains, at once or beside the training.

With ``async_save`` the training waits only for the values to be copied: on a GPU to the memory of the host, on a CPU
to a forked process, which shares the pages until the training writes to them. A process of each rank writes and hashes.
The checkpoint gets its name, and ``latest_checkpointed_iteration.txt`` names it, in the first ``poll`` that finds all
ranks done. All this is megatron-core's ``AsyncCallsQueue``.

Guarantees: one save at a time - a second one waits for the first; when the block ends, all saves are finished; after an
error, which other ranks may not know of, the writing process is ended and its checkpoint never gets its name.
"""

import logging
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil  # type: ignore[import-untyped]
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

from megatron_adapt.checkpoint.root import Description
from megatron_adapt.config import TrainSettings
from megatron_adapt.data.plan import BlendPosition
from megatron_adapt.train.agree import explain_failure
from megatron_adapt.train.optimizer import Trainer
from megatron_adapt.train.retention import Retention
from megatron_adapt.train.state import begin_save, save_state

_logger = logging.getLogger(__name__)


class CheckpointSaver:
    """Saves when told to; use as a context manager on every rank."""

    def __init__(self, root: Path, settings: TrainSettings) -> None:
        """Save below ``root``, as the settings of the run say."""
        self._root, self._is_async = root, settings.async_save
        self._retention = Retention(settings.keep_last, settings.save_retain_interval)
        self._queue = AsyncCallsQueue()
        self._step = 0

    def save(
        self, trainer: Trainer, description: Description, training: Mapping[str, Any], position: BlendPosition
    ) -> None:
        """Save, or begin to; arguments and errors are those of ``save_state``."""
        self._finalize(blocking=True)
        self._step = description.step
        if not self._is_async:
            save_state(self._root, trainer, description, training, position, self._retention)
            return
        request = begin_save(self._root, trainer, description, training, position, self._retention)
        self._queue.schedule_async_request(request)

    def poll(self) -> None:
        """Finish the save that is being written, if all ranks have written it; every rank calls this after a step."""
        self._finalize(blocking=False)

    def _finalize(self, *, blocking: bool) -> None:
        if self._queue.get_num_unfinalized_calls():
            with explain_failure(self._root, self._step):
                self._queue.maybe_finalize_async_calls(blocking=blocking)

    def __enter__(self) -> "CheckpointSaver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finalize(blocking=True)
            return
        # ``AsyncCallsQueue.close`` ends persistent writers alone.
        for call in self._queue.async_calls:
            _kill_tree(call.async_caller.process)
            _logger.warning("%s: the checkpoint of step %d was given up", self._root, self._step)
        self._queue.async_calls.clear()


def _kill_tree(writer: BaseProcess | None) -> None:
    """Kill a process that writes, and those it writes with: these would wait for ever for it to hear of their end."""
    if writer is None or writer.pid is None:
        return
    with suppress(psutil.NoSuchProcess):
        for process in [*psutil.Process(writer.pid).children(recursive=True), psutil.Process(writer.pid)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
    writer.join()
