"""Which checkpoints of a stage stay, and how the others go.

Deletes folders of a checkpoint root. Guarantees: what ``latest_checkpointed_iteration.txt`` names stays, and so does
what is newer than it; a folder has its name only while it is whole - it is renamed to a hidden one before its first
file goes, so a kill leaves no half of a checkpoint behind, only a hidden rest that ``sweep`` removes.
"""

import logging
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_adapt.checkpoint.root import list_steps, name_iteration

_HIDDEN = re.compile(r"\.iter_\d{7,}\.(\w+\.)?(partial|removed)")
"Checkpoints that were being written or deleted."
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay.

    Attributes:
        keep_last: how many up to the latest, itself included; 0 is all.
        save_retain_interval: multiples of it stay for ever; 0 is none.
    """

    keep_last: int = 0
    save_retain_interval: int = 0

    def choose_old(self, steps: Sequence[int], latest: int) -> list[int]:
        """Return the steps whose checkpoints go, of those that there are in ascending order."""
        if not self.keep_last:
            return []
        past = [step for step in steps if step <= latest]
        return [s for s in past[: -self.keep_last] if not self.save_retain_interval or s % self.save_retain_interval]


KEEP_ALL = Retention()


def hide_iteration(root: Path, step: int) -> Path:
    """Take its name from a checkpoint, if there is one; return the hidden folder, which is to be deleted."""
    name = name_iteration(step)
    hidden = root / f".{name}.removed"
    shutil.rmtree(hidden, ignore_errors=True)
    if (root / name).exists():
        (root / name).replace(hidden)
    return hidden


def remove_old(root: Path, latest: int, retention: Retention) -> None:
    """Delete the checkpoints that need not stay; ``latest`` must be named as such already."""
    for step in retention.choose_old(list_steps(root), latest):
        shutil.rmtree(hide_iteration(root, step), ignore_errors=True)
        _logger.info("removed %s: keep_last is %d", root / name_iteration(step), retention.keep_last)


def sweep(root: Path) -> None:
    """Delete what killed launches left of checkpoints that they were writing or deleting."""
    for path in root.iterdir() if root.is_dir() else ():
        if _HIDDEN.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
