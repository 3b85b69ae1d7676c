"""From token files to the first batch of a blend: megatron-core's cold builder against ours; order, memory, shares.

Per number of sources, of equally many documents and shares up to a thousand times apart:
1. ``start_peer``, ``start_ours``: in a new process, after imports, with the files dropped from the file cache: from
   nothing to the first batch. The peer builds and saves its index files (``BlendedMegatronDatasetBuilder``); ours makes
   the plan, opens the files and reads. Then the time of a window in training order, and of a resume in mid-run.
2. ``measure_order``: the order alone, against ``build_blending_indices`` and the Python twin.
3. ``find_deviation``: over all prefixes and sources, how far the windows read are from the share asked; for ours also
   with equal shares and with 0.999 against 0.001 for all others.

Memory is what the process takes beyond mapped files (``measuring/anonymous.py``). The ``.bin`` files are holes.

``python benchmarks/blend.py [--quick] [--size WINDOWS] [--folder DIR]``; 25 million windows: ``--size 25e6 --rounds 1``
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from measuring.anonymous import run_watched
from measuring.disk import count_bytes, drop_from_cache
from measuring.report import make_parser, print_figures, print_table, show_ratio
from measuring.rounds import compare, make_timed, run_in_turns
from measuring.sources import VOCAB_SIZE, write_sources
from megatron.core.datasets import helpers_cpp
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from numpy.typing import NDArray

from megatron_adapt.data.blend import interleave, interleave_twin, rank_windows, whole_weights
from megatron_adapt.data.dataset import BlendedWindows
from megatron_adapt.data.plan import make_plan
from megatron_adapt.data.record import read_record
from megatron_adapt.errors import EngineError
from megatron_adapt.flags import run_tool

NUM_SOURCES, QUICK_SOURCES = (2, 10, 100, 1000), (2, 10)
NUM_WINDOWS, QUICK_WINDOWS = 1_000_000, 100_000
SEQ_LENGTH = 4096
DOCUMENTS_PER_WINDOW = 0.8
LEAST_DOCUMENTS = 100
"Of a source, so that each has some windows."
ORDER_WINDOWS, TWIN_WINDOWS = 1_000_000, 200_000
BATCH = 64
READ_BATCHES, LOCATE_BATCHES = 4, 100
ROUNDS, QUICK_ROUNDS = 3, 2
SEED = 1


def draw_counts(num_sources: int, num_windows: int) -> list[int]:
    """Draw how many windows each source has; they add up to ``num_windows``."""
    weights = np.exp2(np.random.default_rng(num_sources).uniform(0, 10, num_sources))
    counts = np.floor(weights / weights.sum() * num_windows).astype(np.int64)
    counts[: num_windows - int(counts.sum())] += 1
    return [int(count) for count in counts]


# ---------------------------------------------------------------- from nothing to the first batch


class Started(NamedTuple):
    """What a start took."""

    seconds: float
    "Until the first batch is there."
    plan_seconds: float
    "Of these, to make the plan."
    read_us: float
    "Microseconds to read a window, from the middle of the run on, where files and pages are met for the first time."
    locate_us: float
    "Microseconds to find its source and place, in sources that are open."
    resume_seconds: float
    "To find the middle of the run."


class Tokenizer(NamedTuple):
    """What the peer's builder asks of a tokenizer."""

    vocab_size: int = VOCAB_SIZE
    eod: int = -1
    pad: int = -1
    unique_identifiers: tuple[str, ...] = ()


def start_peer(prefixes: dict[str, Path], counts: list[int], folder: Path) -> Started:
    """Build the peer's blend as rank 0 of one does, read a batch, then more from the middle."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    start = time.perf_counter()
    config = GPTDatasetConfig(
        random_seed=SEED,
        sequence_length=SEQ_LENGTH,
        blend=([str(prefix) for prefix in prefixes.values()], [float(count) for count in counts]),
        split="1,0,0",
        path_to_cache=str(folder),
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    blend = BlendedMegatronDatasetBuilder(GPTDataset, [sum(counts), 0, 0], lambda: True, config).build()[0]
    run_through(blend.__getitem__, range(BATCH))
    seconds = time.perf_counter() - start
    middle = sum(counts) // 2
    read = run_through(blend.__getitem__, range(middle, middle + BATCH * READ_BATCHES))
    return Started(
        seconds=seconds,
        plan_seconds=0.0,
        read_us=1e6 * read / (BATCH * READ_BATCHES),
        locate_us=0.0,
        resume_seconds=0.0,
    )


def start_ours(prefixes: dict[str, Path], counts: list[int], folder: Path) -> Started:
    """Make a plan, open our blend, read a batch, then more from the middle."""
    start = time.perf_counter()
    plan = make_plan(
        {name: Fraction(count) for name, count in zip(prefixes, counts, strict=True)},
        sum(counts) * SEQ_LENGTH,
        {name: read_record(prefix).tokens for name, prefix in prefixes.items()},
        seq_length=SEQ_LENGTH,
        global_batch_size=BATCH,
        seed=SEED,
    )
    plan_seconds = time.perf_counter() - start
    blend = BlendedWindows(plan, prefixes)
    blend.read_windows(0, BATCH)
    seconds = time.perf_counter() - start
    places = [len(blend) // 2 + BATCH * at for at in range(LOCATE_BATCHES)]
    resume = run_through(lambda place: blend.locate(place, 0), places[:1])
    read = run_through(lambda place: blend.read_windows(place, BATCH), places[:READ_BATCHES])
    run_through(lambda place: blend.locate(place, BATCH), places)  # opens what is met for the first time
    blend.locate(places[0], 0)
    locate = run_through(lambda place: blend.locate(place, BATCH), places)
    return Started(
        seconds=seconds,
        plan_seconds=plan_seconds,
        read_us=1e6 * read / (BATCH * READ_BATCHES),
        locate_us=1e6 * locate / (BATCH * LOCATE_BATCHES),
        resume_seconds=resume,
    )


def run_through(read: Callable[[int], object], places: Sequence[int]) -> float:
    """Read all places and keep nothing; return the seconds."""
    start = time.perf_counter()
    for place in places:
        read(place)
    return time.perf_counter() - start


START = {"megatron_core": start_peer, "ours": start_ours}


def measure_start(num_sources: int, num_windows: int, num_rounds: int, folder: Path) -> dict[str, Any]:
    """Start both cold, in turns."""
    counts = draw_counts(num_sources, num_windows)
    tokens = folder / "tokens"
    tokens.mkdir()
    num_documents = max(int(DOCUMENTS_PER_WINDOW * num_windows), LEAST_DOCUMENTS * num_sources)
    prefixes = write_sources(tokens, num_sources, num_documents)
    started: dict[str, list[Started]] = {name: [] for name in START}
    extra: dict[str, list[float]] = {name: [] for name in START}
    written: dict[str, int] = {}
    deviation: dict[str, float] = {}

    def make_start(name: str) -> Callable[[], float]:
        def start() -> float:
            with tempfile.TemporaryDirectory(dir=folder) as cache:
                drop_from_cache(tokens)
                before = count_bytes(folder)
                watched = run_watched(START[name], prefixes, counts, Path(cache))
                written[name] = count_bytes(folder) - before
                for path in Path(cache).glob("*-dataset_index.npy"):
                    deviation[name] = find_deviation(np.load(path), counts)
            started[name].append(watched.result)
            extra[name].append(watched.extra_mib)
            return float(watched.result.seconds)

        return start

    seconds = run_in_turns({name: make_start(name) for name in START}, num_rounds)
    deviation["ours"] = find_deviation(interleave(counts, [0] * num_sources, num_windows), counts)
    return {
        "sources": num_sources,
        "documents": num_documents,
        "seconds": {name: median(values) for name, values in seconds.items()},
        "plan_seconds": median(item.plan_seconds for item in started["ours"]),
        "resume_seconds": median(item.resume_seconds for item in started["ours"]),
        "time_ratio": compare(seconds, "megatron_core", "ours"),
        "extra_mib": {name: median(values) for name, values in extra.items()},
        "memory_ratio": compare(extra, "megatron_core", "ours"),
        "written_mib": {name: value / (1 << 20) for name, value in written.items()},
        "read_microseconds": {name: median(item.read_us for item in items) for name, items in started.items()},
        "locate_microseconds": median(item.locate_us for item in started["ours"]),
        "worst_deviation_windows": deviation,
    }


# ---------------------------------------------------------------- the order alone


def order_by_engine(counts: Sequence[int]) -> NDArray[np.int16]:
    """Order the windows as megatron-core's BlendedDataset does for given weights."""
    total = sum(counts)
    order, numbers = np.empty(total, np.int16), np.empty(total, np.int64)
    weights = np.array(counts, np.float64) / total
    helpers_cpp.build_blending_indices(order, numbers, weights, len(counts), total, False)
    return order


def measure_order(num_sources: int, num_windows: int, num_rounds: int) -> dict[str, Any]:
    """Time the order of one number of sources.

    Raises:
        EngineError: the C++ order is not that of its twin.
    """
    counts, start = draw_counts(num_sources, num_windows), [0] * num_sources
    num_few = min(num_windows, TWIN_WINDOWS)
    if not np.array_equal(interleave(counts, start, num_few), interleave_twin(counts, start, num_few)):
        raise EngineError(f"blend: C++ and Python order {num_sources} sources differently; mend that before measuring")
    calls: dict[str, Callable[[], float]] = {
        "megatron_core": make_timed(lambda: order_by_engine(counts)),
        "ours": make_timed(lambda: interleave(counts, start, num_windows)),
        "twin": make_timed(lambda: interleave_twin(counts, start, num_few)),
    }
    seconds = run_in_turns(calls, num_rounds)
    per_window = {
        name: [value / (num_few if name == "twin" else num_windows) for value in values]
        for name, values in seconds.items()
    }
    return {
        "order_nanoseconds": {name: 1e9 * median(values) for name, values in per_window.items()},
        "order_ratio": compare(per_window, "megatron_core", "ours"),
        "twin_ratio": compare(per_window, "twin", "ours"),
    }


# ---------------------------------------------------------------- shares


def find_deviation(order: NDArray[Any], weights: Sequence[int]) -> float:
    """Return the largest distance, in windows, of any source from its share after any step.

    Exact, then rounded down to a millionth, so that less than one window is never shown as one. A source is furthest
    from its share just before and just after it is read, and at the end.
    """
    total, weights_K = sum(weights), np.array(weights, np.int64)
    had_K, worst = np.zeros(len(weights), np.int64), 0
    for first in range(0, len(order), ORDER_WINDOWS):
        sources = np.asarray(order[first : first + ORDER_WINDOWS]).astype(np.int64)
        weights_N, steps_N = weights_K[sources], np.arange(first, first + len(sources))
        before_N = (had_K[sources] + rank_windows(sources)) * total - steps_N * weights_N
        worst = max(worst, int(abs(before_N).max()), int(abs(before_N + total - weights_N).max()))
        had_K += np.bincount(sources, minlength=len(weights))
    worst = max(worst, int(abs(had_K * total - len(order) * weights_K).max()))
    return worst * 10**6 // total / 10**6


def find_deviations(num_sources: int, num_windows: int) -> dict[str, Any]:
    """Return how far our order is from equal and from extremely unequal shares."""
    deviations: dict[str, Any] = {"sources": num_sources}
    for name, largest in (("equal", 1), ("unequal", 999 * (num_sources - 1))):
        weights = whole_weights([Fraction(largest), *[Fraction(1)] * (num_sources - 1)])
        deviations[name] = find_deviation(interleave(weights, [0] * num_sources, num_windows), weights)
    return deviations


# ---------------------------------------------------------------- report


def run(num_windows: int, num_rounds: int, all_sources: Sequence[int], folder: Path | None) -> None:
    """Measure all numbers of sources and print them.

    Raises:
        EngineError: the C++ extension is not built, so there is nothing to compare.
    """
    if find_spec("megatron_adapt._csrc") is None:
        raise EngineError("blend: megatron_adapt._csrc is not built; install the package with a C++ compiler")
    cases = []
    for number in all_sources:
        with tempfile.TemporaryDirectory(dir=folder) as work:
            found = measure_start(number, num_windows, num_rounds, Path(work))
        cases.append({**found, **measure_order(number, min(num_windows, ORDER_WINDOWS), num_rounds)})
    deviations = [find_deviations(number, num_windows) for number in all_sources]
    print(f"From token files to the first batch of a run of {num_windows:,} windows of {SEQ_LENGTH}")
    print_starts(cases)
    print("Order alone, nanoseconds a window")
    print_orders(cases)
    print("Our order: worst deviation from the share after any step of the run, in windows")
    print_table(
        ("sources", "equal", "0.999 / 0.001"), [[_exact(value) for value in row.values()] for row in deviations]
    )
    shared = {"windows": num_windows, "rounds": num_rounds, "cases": cases, "deviations": deviations}
    print_figures("blend", ("numpy", "megatron-core"), shared)


def print_starts(cases: Sequence[dict[str, Any]]) -> None:
    """Print what the starts took."""
    pairs = ("seconds", "extra_mib", "written_mib", "read_microseconds")
    names = ("s", "MiB", "written MiB", "us a window")
    columns = [f"{who} {name}" for name in names for who in ("peer", "ours")]
    rows = [
        (
            case["sources"],
            *[value for pair in pairs for value in case[pair].values()],
            case["locate_microseconds"],
            show_ratio(case["time_ratio"]),
            show_ratio(case["memory_ratio"]),
        )
        for case in cases
    ]
    print_table(("sources", *columns, "locate us", "time ratio (range)", "memory ratio (range)"), rows)


def print_orders(cases: Sequence[dict[str, Any]]) -> None:
    """Print what the order alone takes, and how far from the shares it is over the whole run."""
    rows = [
        (
            case["sources"],
            *case["order_nanoseconds"].values(),
            show_ratio(case["order_ratio"]),
            show_ratio(case["twin_ratio"]),
            *[_exact(value) for value in case["worst_deviation_windows"].values()],
        )
        for case in cases
    ]
    columns = ("sources", "peer", "ours", "twin", "ratio (range)", "twin ratio (range)", "peer deviation", "ours")
    print_table(columns, rows)


def _exact(value: float) -> str:
    return f"{value:.6f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    parser = make_parser(__doc__, default_rounds=ROUNDS, size=NUM_WINDOWS, unit="windows in all")
    parser.add_argument("--folder", type=Path, help="where token files and the peer's index files go (temporary)")
    arguments = parser.parse_args()
    rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS)
    size = int(arguments.size or (QUICK_WINDOWS if arguments.quick else NUM_WINDOWS))
    run_tool(run, size, rounds, QUICK_SOURCES if arguments.quick else NUM_SOURCES, arguments.folder)
