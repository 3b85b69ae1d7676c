"""Run the tools of a plan, each as its own process, and note what each took.

A command is a tool with its config, and the record that says whether it is finished: then it is skipped, so that a
plan that was killed continues. Training runs under torchrun.
"""

import logging
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_adapt.data.stage_plans import check_trained
from megatron_adapt.files import is_finished
from megatron_adapt.flags import to_flags
from megatron_adapt.recipe import Recipe
from megatron_adapt.run_folder import is_trained

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Command:
    """One tool call."""

    tool: str
    "Name of the file in tools/."
    config: Any
    "Config of the tool; for training the stage's settings."
    record: Path
    "stage.json that the tool writes when it is finished."
    stage: str = ""
    "Name of the training stage."
    outputs: tuple[Path, ...] = ()
    "Files beside the record that the tool writes; a folder stands and falls with its record."

    def is_finished(self) -> bool:
        """Tell whether the output is there, made by this config from the inputs as they are now."""
        if self.stage:
            return is_trained(self.record.parent, self.config)
        return all(item.is_file() for item in self.outputs) and is_finished(self.record, config=self.config)


@dataclass(frozen=True)
class Cost:
    """What a command took."""

    seconds: float
    peak_mib: float
    "Most memory of its largest process."


def run_commands(commands: list[Command], recipe: Recipe, tools: Path) -> dict[str, Cost]:
    """Run the commands that are not finished, each as its own process.

    Returns:
        What each tool took that ran; of one that ran several times the last.

    Raises:
        CheckpointError: a training stage was finished under other settings or on another plan; nothing is thrown
            away unasked.
        SystemExit: a command failed; its own message stands above, its exit code is passed on.
    """
    costs: dict[str, Cost] = {}
    for number, command in enumerate(commands, start=1):
        title = f"[{number}/{len(commands)}] {command.tool} {command.stage}".rstrip()
        if command.is_finished():
            if command.stage:
                check_trained(recipe, command.stage)
            _logger.info("%s: finished before", title)
            continue
        argv = _make_argv(command, recipe, tools)
        _logger.info("%s: %s", title, shlex.join(argv))
        code, costs[command.tool] = _run(argv, _make_environment(command, recipe))
        if code:
            _logger.error("%s: failed with exit code %d; the lines above say why", title, code)
            raise SystemExit(code)
        if not command.record.is_file():
            _logger.info("%s: stopped before its end, as asked; the same call continues", title)
            raise SystemExit(0)
    return costs


def _run(argv: list[str], environment: dict[str, str]) -> tuple[int, Cost]:
    """Run a command; return its exit code and what it took."""
    start = time.perf_counter()
    with subprocess.Popen(argv, env=environment) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, Cost(time.perf_counter() - start, usage.ru_maxrss / 1024)


def _make_environment(command: Command, recipe: Recipe) -> dict[str, str]:
    """Share the cores between the ranks of a training stage; other tools take them all."""
    if not command.stage:
        return dict(os.environ)
    threads = max(1, (os.cpu_count() or 1) // recipe.train.nproc_per_node)
    return {"OMP_NUM_THREADS": str(threads), **os.environ}


def _make_argv(command: Command, recipe: Recipe, tools: Path) -> list[str]:
    tool = str(tools / f"{command.tool}.py")
    if not command.stage:
        return [sys.executable, tool, *to_flags(command.config)]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(recipe.train.nproc_per_node)]
    return [sys.executable, *launch, tool, "--recipe", str(recipe.work_dir / "recipe.json"), "--stage", command.stage]
