"""Kill training with -9 at seeded moments of its saves, start it again, and look at every checkpoint in between.

Run as a program, which has imported the engine but not started it, and forks every launch. A moment is the number of a
file operation on a checkpoint, or of a tensor written, counted over all processes of the launch.
"""

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import traceback
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_adapt.checkpoint.intact import find_wrong_content, find_wrong_size, read_record
from megatron_adapt.checkpoint.root import LATEST_FILE, find_checkpoint, list_steps, name_iteration
from megatron_adapt.logs import read_metrics
from megatron_adapt.train import state
from tests.helpers.runs import train_stage
from tests.helpers.spawn import become_rank, host_store

EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}
ROOT = Path(__file__).parents[2]
FORK = get_context("fork")


class Launch(NamedTuple):
    """What a launch left: how it ended, moments it counted, the last step it named as latest, its process group.

    ``renames`` are the moments before a rename: of a small file, a checkpoint or ``latest``.
    """

    status: int
    num_moments: int
    finished: int
    group: int
    renames: list[int]


def kill_saves(recipe: Path, num_ranks: int, num_moments: int, seed: int, *flags: str) -> dict[str, Any]:
    """Do all of it in a process of its own; return what it found."""
    command = [sys.executable, "-m", __name__, str(recipe), str(num_ranks), str(num_moments), str(seed), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def launch(recipe: Path, flags: list[str], num_ranks: int, moment: int = 0) -> Launch:
    """Train in forked processes, killed at ``moment``: all of them, or of one rank the rank without its writers."""
    counter, finished, renames = FORK.Value("q", 0), FORK.Value("q", 0), FORK.Array("q", 999)
    store = host_store()
    leader = os.fork()
    if leader:
        _, status = os.waitpid(leader, 0)
        return Launch(status, counter.value, finished.value, leader, [at for at in renames[:] if at])
    os.setpgid(0, 0)
    leader = os.getpid()

    def tick(event: str) -> None:
        with counter.get_lock():
            counter.value += 1
            is_now = counter.value == moment
            if event == "os.rename":
                renames[renames[:].index(0)] = counter.value
        if is_now:
            os.kill(-leader if num_ranks > 1 else leader, signal.SIGKILL)

    try:
        others = []
        rank = 0
        for other in range(1, num_ranks):
            child = os.fork()
            if not child:
                rank, others = other, []
                break
            others.append(child)
        become_rank(rank, num_ranks, store.port)
        watch(tick, finished)
        train_stage(recipe, "first", *flags)
        failed = [child for child in others if os.waitpid(child, 0)[1]]
        os._exit(len(failed))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def watch(tick: Any, finished: Any) -> None:
    """Tick at every moment of a save, in this process and those it forks."""

    def listen(event: str, args: Any) -> None:
        if event in EVENTS and any("iter_" in str(arg) or LATEST_FILE in str(arg) for arg in args):
            tick(event)

    write_item, write_latest = filesystem_async._write_item, state.write_latest

    @functools.wraps(write_item)  # the engine looks at its parameters
    def write_counted(*args: Any, **kwargs: Any) -> Any:
        tick("write")
        return write_item(*args, **kwargs)

    def write_noted(root: Path, step: int) -> None:
        write_latest(root, step)
        finished.value = step

    filesystem_async._write_item, state.write_latest = write_counted, write_noted
    sys.addaudithook(listen)


def check_root(root: Path, finished: int, keep_last: int) -> None:
    """Check that what is named is there, that what is there is whole, and that nothing finished is gone."""
    latest = root / LATEST_FILE
    assert latest.exists() or not finished
    if latest.exists():
        assert int(latest.read_text()) >= finished
        assert find_checkpoint(root) == root / name_iteration(int(latest.read_text()))
    steps = list_steps(root)
    assert set(range(max(1, finished - keep_last + 1), finished + 1)) <= set(steps), (finished, steps)
    for step in steps:
        folder = root / name_iteration(step)
        record = read_record(folder)
        assert record, folder
        assert not find_wrong_size(folder, record)
        assert not find_wrong_content(folder, record, list(record))


def main(recipe: Path, num_ranks: int, num_moments: int, seed: int, flags: list[str], keep_last: int = 2) -> None:
    """Run once undisturbed, then killed and restarted at each moment."""
    flags = [*flags, "--train.save-interval", "1", "--train.keep-last", str(keep_last)]
    run = recipe.parent / "run"
    root, pristine = run / "checkpoints" / "first", recipe.parent / "pristine"
    shutil.copytree(run, pristine)

    def read_run() -> list[Any]:
        rows = read_metrics(root / "metrics.jsonl")
        return [[row.get(name) for name in ("step", "loss", "grad_norm", "valid_bits_per_byte")] for row in rows]

    undisturbed = launch(recipe, flags, num_ranks)
    assert undisturbed.status == 0
    expected, steps = read_run(), list_steps(root)
    draw, named, others = random.Random(seed), [], num_moments // 2
    moments = draw.sample(undisturbed.renames, others)
    moments += draw.sample(range(1, undisturbed.num_moments + 1), num_moments - others)
    for moment in moments:
        shutil.rmtree(run)
        shutil.copytree(pristine, run)
        killed = launch(recipe, flags, num_ranks, moment)
        named.append(killed.finished)
        check_root(root, killed.finished, keep_last)
        # Of the moments beside a training that goes on, the last ones may not come.
        assert killed.status == signal.SIGKILL or killed.num_moments < moment, (moment, killed)
        again = launch(recipe, flags, num_ranks)
        with suppress(ProcessLookupError):
            os.killpg(killed.group, signal.SIGKILL)
        assert again.status == 0, moment
        check_root(root, again.finished, keep_last)
        assert read_run() == expected, moment
        assert list_steps(root) == steps, moment
    found = {"num_moments": undisturbed.num_moments, "moments": moments, "named": named, "steps": steps}
    sys.stdout.write(f"\n{json.dumps(found)}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:5]), sys.argv[5:])
