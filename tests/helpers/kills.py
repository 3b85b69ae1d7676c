"""Kill a piece of work at seeded moments, start it again, and compare every file with work that was never killed."""

import random
import subprocess
import sys
from pathlib import Path

# Works in a child for every number it is given: the child kills itself (-9) at that system call, 0 for never. ``setup``
# is Python that defines ``work``, a function of one argument, and ``config``, which names the output.
RUNNER = """
import os, signal, sys
from pathlib import Path
from megatron_adapt.checkpoint import slices

slices.SLICE_BYTES, slices.SAVE_BYTES, slices.CHUNK_BYTES = 2000, 8000, 5000
{setup}
EVENTS = {{"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "subprocess.Popen"}}

def work_in_child(moment):
    child = os.fork()
    if not child:
        count = 0
        def tick():
            nonlocal count
            count += 1
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)
        pwrite, fdatasync = os.pwrite, os.fdatasync
        os.pwrite = lambda *args: (tick(), pwrite(*args))[1]
        os.fdatasync = lambda *args: (tick(), fdatasync(*args))[1]
        sys.addaudithook(lambda event, args: tick() if event in EVENTS else None)
        work(config)
        print(count, flush=True)
        os._exit(0)
    return os.waitpid(child, 0)[1]

for moment in map(int, sys.argv[1:]):
    status = work_in_child(moment)
    if status == signal.SIGKILL and not config.output.exists():
        status = work_in_child(0)
    if status not in (0, signal.SIGKILL):
        sys.exit(f"{{moment}}: ended by {{status}}")
    left = [path.name for path in config.output.parent.iterdir() if path.name.startswith("." + config.output.name)]
    if left and status == 0:
        sys.exit(f"{{moment}}: left {{left}}")
    config.output.rename(f"{{config.output}}.{{moment}}")
"""


def run_with_kills(setup: str, *moments: int) -> list[str]:
    """Do the work once per moment, killed there and started again; return how many system calls whole runs made.

    Each output is renamed to ``NAME.moment``.
    """
    command = [sys.executable, "-c", RUNNER.format(setup=setup), *map(str, moments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def read_files(folder: Path) -> dict[Path, bytes]:
    """Return the content of every file below a folder."""
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def check_kills(setup: str, output: Path, num_moments: int, seed: int) -> None:
    """Kill at seeded moments between the first system call and the last, start again, compare every file."""
    (calls,) = run_with_kills(setup, 0)
    expected = read_files(output.with_name(f"{output.name}.0"))
    assert len(expected) > 5
    moments = random.Random(seed).sample(range(1, int(calls) + 1), num_moments)
    whole = run_with_kills(setup, *moments)
    assert len(whole) >= num_moments - 1, "a kill behind the last rename needs no restart"
    for moment in moments:
        assert read_files(output.with_name(f"{output.name}.{moment}")) == expected, moment
