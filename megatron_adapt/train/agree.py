"""What the ranks do as one around a checkpoint: act on the main rank, compare its files, report a failed save.

A rank that meets an error alone leaves the others waiting for it until the process group's time-out. Here every rank
learns of it and raises the same error.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_adapt.checkpoint.intact import SavedFile, find_wrong_content, find_wrong_size, read_record
from megatron_adapt.checkpoint.root import LATEST_FILE, list_steps, name_iteration
from megatron_adapt.errors import AdaptError, CheckpointError

ResultT = TypeVar("ResultT")


def run_on_main(act: Callable[[], ResultT]) -> ResultT:
    """Do something on rank 0 and return what it returns on every rank; every rank calls this, and none goes ahead.

    Raises:
        CheckpointError: it failed, on every rank with the same message.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = act()
        except AdaptError as error:
            outcome[1] = str(error)
        except OSError as error:
            where = error.filename or "the checkpoint"
            outcome[1] = f"{where}: {error.strerror or error}; make room or mend the storage, then start again"
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise CheckpointError(outcome[1])
    result: ResultT = outcome[0]
    return result


@contextmanager
def explain_failure(root: Path, step: int) -> Iterator[None]:
    """Turn the engine's report that ranks could not write into one line.

    Raises:
        CheckpointError: in its place.
    """
    try:
        yield
    except CheckpointException as error:
        # The engine tells rank 0 alone what the failures are.
        found = [f"rank {rank}: {failure[0]}" for rank, failure in sorted(error.failures.items())]
        raise CheckpointError(
            f"{root}: the checkpoint of step {step} could not be written ({'; '.join(found) or 'by another rank'}); "
            "make room or mend the storage, and start again to go on from the checkpoint before"
        ) from None


def check_saved(folder: Path, *, verify: bool, continues: bool = True) -> None:
    """Refuse a checkpoint whose files are not those that were saved; every rank calls this.

    Args:
        folder: the iteration; one without a record of its files passes.
        verify: read all files, each rank its share, and compare them; otherwise compare sizes.
        continues: whether the run is continued from it; otherwise it is where another one ended.

    Raises:
        CheckpointError: a file is missing, cut off or changed; an earlier checkpoint that is whole is named.
    """
    damage, root = _find_damage(folder, verify=verify), folder.parent
    if not damage:
        return
    if not continues:
        raise CheckpointError(f"{damage}; restore the file, or make {root} again")
    for step in reversed(run_on_main(lambda: list_steps(root))):
        earlier = root / name_iteration(step)
        if earlier < folder and not _find_damage(earlier, verify=verify):
            raise CheckpointError(
                f"{damage}; restore the file, or write {step} into {root / LATEST_FILE} to go back to {earlier.name}, "
                "which is whole"
            )
    raise CheckpointError(f"{damage}; restore the file; there is no earlier checkpoint to go back to")


def _find_damage(folder: Path, *, verify: bool) -> str:
    """Return on every rank what is wrong with the files of an iteration; nothing where they are as they were saved."""

    def compare_sizes() -> tuple[dict[str, SavedFile], str]:
        try:
            record = read_record(folder)
        except CheckpointError as error:
            return {}, str(error)
        return record, find_wrong_size(folder, record)

    record, damage = run_on_main(compare_sizes)
    if damage or not verify:
        return damage
    by_size = sorted(record, key=lambda name: (-record[name].num_bytes, name))
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, find_wrong_content(folder, record, by_size[dist.get_rank() :: len(found)]))
    return next(filter(None, found), "")
