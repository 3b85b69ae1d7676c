"""The flags, the table and the last line of every benchmark."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any

_DIGITS = 6


def make_parser(description: str | None, *, default_rounds: int, size: float, unit: str) -> argparse.ArgumentParser:
    """Return a parser with the flags that all benchmarks have: ``--quick``, ``--rounds``, ``--size``."""
    first_line = (description or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=first_line)
    parser.add_argument("--quick", action="store_true", help="less data and fewer rounds: under a minute")
    parser.add_argument("--rounds", type=_read_positive_int, help=f"rounds of the peer and ours ({default_rounds})")
    parser.add_argument("--size", type=_read_positive, help=f"{unit} ({size:g})")
    return parser


def _read_positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _read_positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1; use at least one round")
    return value


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows under their columns: the first to the left, the others to the right; floats with three digits."""
    table = [list(columns), *[[_show(value) for value in row] for row in rows]]
    widths = [max(len(line[at]) for line in table) for at in range(len(columns))]
    for line in table:
        first, *others = [text.rjust(width) for text, width in zip(line, widths, strict=True)]
        print("  ".join([line[0].ljust(len(first)), *others]))


def _show(value: object) -> str:
    if isinstance(value, float) and abs(value) < 1000:
        return f"{value:.3g}"
    return f"{value:,.0f}" if isinstance(value, int | float) else str(value)


def show_ratio(ratio: dict[str, float]) -> str:
    """Write a ratio with the range over the rounds."""
    return f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})"


def print_figures(benchmark: str, packages: Sequence[str], figures: dict[str, Any]) -> None:
    """Print the figures, with versions and the number of cores, as one line of JSON."""
    versions = {"python": sys.version.split()[0], **{name: metadata.version(name) for name in packages}}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(json.dumps(_round({"benchmark": benchmark, "cores": cores, "versions": versions, **figures})))


def _round(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {name: _round(item) for name, item in value.items()}
    return [_round(item) for item in value] if isinstance(value, list | tuple) else value
