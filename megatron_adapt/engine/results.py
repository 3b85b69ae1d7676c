"""How the process that writes a checkpoint tells its rank what it wrote: by a file that both have open.

megatron-core 0.16 keeps a queue in a server process of each rank. Spawning it costs the first save of a launch 3 s, and
a rank that is killed with -9 leaves it behind for ever, 280 MB each. The writer is forked, so a file without a name
does: it holds any length, where a pipe would block the writer that its rank is waiting for.
"""

import pickle
import queue
import tempfile
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async


class ResultFile:
    """One value, from a process to the one it was forked from; what the engine asks of a queue."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()

    def put(self, value: Any) -> None:
        """Leave the value; the file takes the place of an earlier one."""
        self._file.seek(0)
        pickle.dump(value, self._file)
        self._file.flush()

    def get_nowait(self) -> Any:
        """Return the value.

        Raises:
            queue.Empty: there is none; the writer has died.
        """
        self._file.seek(0)
        try:
            return pickle.load(self._file)
        except (EOFError, pickle.UnpicklingError):
            raise queue.Empty from None


def install() -> None:
    """Give every save of the engine a file of its own. Safe to call again."""
    filesystem_async._get_write_results_queue = ResultFile
