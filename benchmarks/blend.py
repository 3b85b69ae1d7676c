"""The order of blended sources: megatron-core's build_blending_indices against our interleave, C++ and Python.

1. ``draw_counts``: unequal sources, the largest about a thousand times the smallest.
2. ``run_in_turns``: each builds the whole order once a round; the Python twin only some of it, timed per window.
3. ``find_deviation``: over all prefixes and sources, how far the windows read are from the share asked.

The peer also writes each window's number inside its source (8 bytes); ours needs no such array, and is uint16.

``python benchmarks/blend.py [--quick] [--size WINDOWS]``
"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
from measuring.report import make_parser, print_figures, print_table, show_ratio
from measuring.rounds import compare, make_timed, run_in_turns
from megatron.core.datasets import helpers_cpp
from numpy.typing import NDArray

from megatron_adapt.data.blend import interleave, interleave_twin
from megatron_adapt.errors import EngineError
from megatron_adapt.flags import run_tool

NUM_SOURCES = (2, 10, 100)
NUM_WINDOWS, QUICK_WINDOWS = 10_000_000, 1_000_000
TWIN_WINDOWS = 200_000
ROUNDS, QUICK_ROUNDS = 9, 3


def draw_counts(num_sources: int, num_windows: int) -> list[int]:
    """Draw how many windows each source has; they add up to ``num_windows``."""
    weights = np.exp2(np.random.default_rng(num_sources).uniform(0, 10, num_sources))
    counts = np.floor(weights / weights.sum() * num_windows).astype(np.int64)
    counts[: num_windows - int(counts.sum())] += 1
    return [int(count) for count in counts]


def order_by_engine(counts: Sequence[int]) -> NDArray[np.int16]:
    """Order the windows as megatron-core's BlendedDataset does for given weights."""
    total = sum(counts)
    order, numbers = np.empty(total, np.int16), np.empty(total, np.int64)
    weights = np.array(counts, np.float64) / total
    helpers_cpp.build_blending_indices(order, numbers, weights, len(counts), total, False)
    return order


def find_deviation(order: NDArray[Any], counts: Sequence[int]) -> float:
    """Return the largest distance, in windows, of any source from its share after any step.

    Exact, then rounded down to a millionth, so that less than one window is never shown as one.
    """
    total = sum(counts)
    steps = np.arange(1, total + 1, dtype=np.int64)
    worst = 0
    for source, count in enumerate(counts):
        read = np.cumsum(order == source, dtype=np.int64)
        worst = max(worst, int(np.abs(read * total - steps * count).max()))
    return worst * 10**6 // total / 10**6


def find_shortfall(order: NDArray[Any], counts: Sequence[int]) -> int:
    """Return the largest difference between the windows a source was asked for and those it got in the end."""
    return int(np.abs(np.bincount(order, minlength=len(counts)) - np.array(counts)).max())


def measure_sources(num_sources: int, num_windows: int, num_rounds: int) -> dict[str, Any]:
    """Measure one number of sources.

    Raises:
        EngineError: the C++ order is not that of its twin.
    """
    counts = draw_counts(num_sources, num_windows)
    few = draw_counts(num_sources, min(num_windows, TWIN_WINDOWS))
    if not np.array_equal(interleave(few), interleave_twin(few)):
        raise EngineError(f"blend: C++ and Python order {num_sources} sources differently; mend that before measuring")
    calls: dict[str, Callable[[], float]] = {
        "megatron_core": make_timed(lambda: order_by_engine(counts)),
        "ours": make_timed(lambda: interleave(counts)),
        "twin": make_timed(lambda: interleave_twin(few)),
    }
    run_in_turns({name: calls[name] for name in ("megatron_core", "ours")}, 1)
    seconds = run_in_turns(calls, num_rounds)
    per_window = {
        name: [value / (sum(few) if name == "twin" else num_windows) for value in values]
        for name, values in seconds.items()
    }
    orders = {"megatron_core": order_by_engine(counts), "ours": interleave(counts)}
    return {
        "sources": num_sources,
        "nanoseconds_per_window": {name: 1e9 * float(np.median(values)) for name, values in per_window.items()},
        "time_ratio": compare(per_window, "megatron_core", "ours"),
        "twin_ratio": compare(per_window, "twin", "ours"),
        "worst_deviation_windows": {name: find_deviation(order, counts) for name, order in orders.items()},
        "worst_shortfall_windows": {name: find_shortfall(order, counts) for name, order in orders.items()},
    }


def run(num_windows: int, num_rounds: int) -> None:
    """Measure all numbers of sources and print them.

    Raises:
        EngineError: the C++ extension is not built, so there is nothing to compare.
    """
    if find_spec("megatron_adapt._csrc") is None:
        raise EngineError("blend: megatron_adapt._csrc is not built; install the package with a C++ compiler")
    figures = [measure_sources(number, num_windows, num_rounds) for number in NUM_SOURCES]
    print(
        f"Order of {num_windows:,} windows: time per window; worst deviation from the share after any step, in windows"
    )
    print_table(
        (
            "sources",
            "peer ns",
            "ours ns",
            "twin ns",
            "time ratio (range)",
            "twin ratio (range)",
            "peer deviation",
            "ours",
        ),
        [
            (
                found["sources"],
                *found["nanoseconds_per_window"].values(),
                show_ratio(found["time_ratio"]),
                show_ratio(found["twin_ratio"]),
                *(f"{value:.6f}" for value in found["worst_deviation_windows"].values()),
            )
            for found in figures
        ],
    )
    shared = {"windows": num_windows, "rounds": num_rounds, "cases": figures}
    print_figures("blend", ("numpy", "megatron-core"), shared)


if __name__ == "__main__":
    parser = make_parser(__doc__, default_rounds=ROUNDS, size=NUM_WINDOWS, unit="windows in all")
    arguments = parser.parse_args()
    rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS)
    run_tool(run, int(arguments.size or (QUICK_WINDOWS if arguments.quick else NUM_WINDOWS)), rounds)
