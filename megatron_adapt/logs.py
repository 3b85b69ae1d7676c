"""Console lines, progress and ``metrics.jsonl``; only rank 0 of a job speaks.

A terminal gets rich progress bars, a log file gets a plain line now and then: the same numbers.
"""

import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import orjson

from megatron_adapt.errors import DataError

_LINE_EVERY_SECONDS = 10.0


def is_main_rank() -> bool:
    """Tell whether this process is rank 0 of its job (or no distributed job at all)."""
    return os.environ.get("RANK", "0") == "0"


def setup_logging() -> None:
    """Send the package's log lines to standard error; other ranks only warn. Silences the engine's remarks."""
    handler = logging.StreamHandler(sys.stderr)
    rank = "" if is_main_rank() else f"rank {os.environ['RANK']}: "
    handler.setFormatter(logging.Formatter(f"%(asctime)s {rank}%(message)s", "%H:%M:%S"))
    logger = logging.getLogger("megatron_adapt")
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if is_main_rank() else logging.WARNING)
    # megatron-core announces every optional package it does not find; torch what it will rename one day
    warnings.filterwarnings("ignore", module=r"megatron\.core|torch\.distributed")


class Advance(Protocol):
    """Reports ``amount`` more units of work as done; ``note`` is shown behind the figures."""

    def __call__(self, amount: float = 1, note: str = "") -> None:
        """Advance the bar."""


@contextmanager
def show_progress(what: str, total: float | None, unit: str) -> Iterator[Advance]:
    """Show progress of long work: a bar on a terminal, a line every ten seconds elsewhere.

    Args:
        what: the work, a few words.
        total: units in all, or None when unknown.
        unit: name of a unit in the plural, for example "MB" or "documents".
    """
    if sys.stderr.isatty() and is_main_rank():
        with _show_bar(what, total, unit) as advance:
            yield advance
        return
    state = {"done": 0.0, "next": time.monotonic() + _LINE_EVERY_SECONDS}
    start = time.monotonic()

    def advance_lines(amount: float = 1, note: str = "") -> None:
        state["done"] += amount
        if time.monotonic() < state["next"]:
            return
        state["next"] = time.monotonic() + _LINE_EVERY_SECONDS
        speed = state["done"] / (time.monotonic() - start)
        share = f" of {total:,.0f}" if total else ""
        left = f", {(total - state['done']) / speed:,.0f} s left" if total and speed else ""
        logging.getLogger(__name__).info(
            "%s: %s%s %s, %s %s/s%s%s",
            *(what, f"{state['done']:,.0f}", share, unit, f"{speed:,.1f}", unit, left, note and f"; {note}"),
        )

    yield advance_lines


@contextmanager
def _show_bar(what: str, total: float | None, unit: str) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    count = TextColumn("{task.completed:,.0f} {task.fields[unit]}")
    note_column, speed = TextColumn("{task.fields[note]}"), TextColumn("{task.fields[speed]}")
    columns = (TextColumn("{task.description}"), BarColumn(), count, speed, TimeRemainingColumn(), note_column)
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=total, unit=unit, note="", speed="")

        def advance_bar(amount: float = 1, note: str = "") -> None:
            speed = progress.tasks[task].speed
            progress.update(task, advance=amount, note=note, speed=f"{speed:,.1f} {unit}/s" if speed else "")

        yield advance_bar


class MetricsWriter:
    """Appends one JSON object a line to ``metrics.jsonl``; lines after ``start_step`` are dropped on resume."""

    def __init__(self, path: Path, start_step: int) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in read_metrics(path) if row["step"] <= start_step] if path.exists() else []
        with path.open("wb") as file:
            file.writelines(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in kept)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row and flush it."""
        with self._path.open("ab") as file:
            file.write(orjson.dumps(dict(row), option=orjson.OPT_APPEND_NEWLINE))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read every row of a ``metrics.jsonl``; a last line cut off by a kill is dropped.

    Raises:
        DataError: a line before the last is no JSON.
    """
    rows = []
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(orjson.loads(line))
        except orjson.JSONDecodeError:
            if number < len(lines):
                raise DataError(f"{path}:{number}: no valid JSON; remove the line") from None
    return rows
