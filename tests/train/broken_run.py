"""``tools/pretrain.py`` with a fault on one rank, for the tests: ``broken_run.py FAULT MARK FLAGS``.

At the beginning of step 5 rank 1 raises, kills itself, or stands still; once, if MARK is a path.
"""

import os
import runpy
import signal
import sys
import time
from pathlib import Path

STEP = 5


def break_here(fault: str) -> None:
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "stall":
        time.sleep(600)
    raise ZeroDivisionError("the fault of this test")


def main(fault: str, mark: str, *flags: str) -> None:
    from megatron_adapt.train import loop

    train_step = loop.train_step

    def broken_step(trainer, *args, **kwargs):
        if os.environ["RANK"] == "1" and trainer.schedule.num_steps + 1 == STEP and not (mark and Path(mark).exists()):
            if mark:
                Path(mark).touch()
            break_here(fault)
        return train_step(trainer, *args, **kwargs)

    loop.train_step = broken_step
    tool = Path(__file__).parents[2] / "tools" / "pretrain.py"
    sys.argv = [str(tool), *flags]
    runpy.run_path(str(tool), run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
