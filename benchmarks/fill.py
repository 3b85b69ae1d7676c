"""Filling rows of new tokens: the arithmetic a method needs in bare torch, and the method.

1. ``make_data``: old rows in bf16, pieces of new tokens, anchors of a donor of the same width, from a fixed seed.
2. ``check``: the subtoken mean equals the peer's rows, the map the matrix that the anchors were made with.
3. ``run_in_turns``: the peer gathers and averages in fp32, or multiplies as often in fp64 as moments or a fit need
   (rows already in fp64, in memory), or in fp32 as ``clp`` does, or does what Batch-OMP cannot do without: products of
   atoms with atoms and new rows, weighted sums of Gram rows. Ours does all of the method: types, checks, candidates,
   the solution. For ``similarity_topk`` and ``focus``, whose vectors are given, the peer computes all cosines.
4. ``measure_peak``: memory of ours, in a process of its own.

``python benchmarks/fill.py [--quick] [--size COLUMNS]``
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from measuring.report import make_parser, print_figures, print_table, show_ratio
from measuring.rounds import compare, make_timed, measure, run_fresh, run_in_turns

from megatron_adapt.config import VocabSettings
from megatron_adapt.errors import EngineError
from megatron_adapt.flags import run_tool
from megatron_adapt.tokenizer.id_map import IdMap
from megatron_adapt.vocab.clp import average_by_cosine
from megatron_adapt.vocab.fill import plan_fill
from megatron_adapt.vocab.linear import LinearMap, fit_map
from megatron_adapt.vocab.neighbours import find_nearest, normalize_rows, weigh_by_softmax, weigh_by_sparsemax
from megatron_adapt.vocab.omp import Dictionary, combine_atoms
from megatron_adapt.vocab.rows import CHUNK_ROWS, FillSources

COLUMNS, QUICK_COLUMNS = 4096, 512
NUM_OLD, NUM_NEW, NUM_ANCHORS = 128_000, 32_000, 16_000
QUICK_SHARE = 8
NUM_ATOMS = 64
VECTOR_COLUMNS, NUM_NEIGHBORS, TEMPERATURE = 300, 10, 0.1
PEER_BLOCK = 2048, 16384
ROUNDS, QUICK_ROUNDS = 3, 3
CASES = ("subtoken_mean", "normal", "ols", "ridge", "procrustes", "auto", "clp", "omp", "similarity_topk", "focus")


@dataclass(frozen=True)
class Data:
    """Old rows, which are ``BaseRows``, and what is made for them."""

    rows_VH: torch.Tensor
    pieces: dict[int, list[int]]
    anchors_NH: torch.Tensor
    images_NH: torch.Tensor
    "Of the anchors, through ``matrix_HH``."
    matrix_HH: torch.Tensor
    is_head: bool = False

    @property
    def num_rows(self) -> int:
        """V."""
        return len(self.rows_VH)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return rows [start, stop)."""
        return self.rows_VH[start:stop]

    def gather(self, ids: Sequence[int]) -> torch.Tensor:
        """Return the rows of ids."""
        return self.rows_VH[torch.tensor(ids)]

    def mean(self) -> torch.Tensor:
        """Return the mean row, fp64."""
        return sum_rows(self.rows_VH) / self.num_rows


def sum_rows(rows_VH: torch.Tensor) -> torch.Tensor:
    """Sum rows in fp64: [H]."""
    return torch.stack([part.double().sum(0) for part in rows_VH.split(CHUNK_ROWS)]).sum(0)


def make_data(columns: int, share: int) -> Data:
    """Make rows of a width; ``share`` divides their number."""
    torch.manual_seed(0)
    draw = np.random.default_rng(0)
    num_old, num_new, num_anchors = NUM_OLD // share, NUM_NEW // share, NUM_ANCHORS // share
    rows_VH = torch.randn(num_old, columns, dtype=torch.bfloat16)
    pieces = {num_old + at: draw.integers(0, num_old, draw.integers(2, 6)).tolist() for at in range(num_new)}
    matrix_HH = torch.randn(columns, columns) / columns**0.5
    anchors_NH = torch.randn(num_anchors, columns, dtype=torch.bfloat16)
    return Data(rows_VH, pieces, anchors_NH, anchors_NH.float() @ matrix_HH, matrix_HH)


def fill(data: Data, method: Any) -> list[torch.Tensor]:
    """Compute all new rows by a method that needs no tokenizer; chunks are kept, as bf16."""
    num_old = data.num_rows
    id_map = IdMap(base_vocab_size=num_old, vocab_size=num_old + len(data.pieces), moved={}, pieces=data.pieces)
    sources = FillSources(id_map=id_map, settings=VocabSettings(method=method))
    return [rows_NH.bfloat16() for _, rows_NH in plan_fill(sources)(data)]


def fit(data: Data, estimator: Any) -> LinearMap:
    """Fit a map from the anchors to their images and map as many rows as there are new tokens."""

    def read(numbers: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        index = torch.from_numpy(numbers)
        return data.anchors_NH[index].double(), data.images_NH[index].double()

    found = fit_map(read, len(data.anchors_NH), estimator=estimator, seed=0, where="benchmark")
    for part_NH in data.rows_VH[: len(data.pieces)].split(CHUNK_ROWS):
        found.apply(part_NH)
    return found


def approach(data: Data, method: str) -> list[torch.Tensor]:
    """Compute as many rows as there are new tokens from the anchors by ``clp`` or ``omp``; chunks are kept as bf16."""

    def read(numbers: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return data.anchors_NH[numbers], data.images_NH[numbers]

    targets = data.rows_VH[: len(data.pieces)]
    if method == "clp":
        num_anchors = len(data.anchors_NH)
        return [average_by_cosine(part, read, num_anchors).bfloat16() for part in targets.split(4 * CHUNK_ROWS)]
    dictionary, rows = Dictionary(data.anchors_NH.float()), data.images_NH.float()
    return [combine_atoms(rows, *dictionary.pursue(part, NUM_ATOMS)).bfloat16() for part in targets.split(CHUNK_ROWS)]


def average(data: Data) -> list[torch.Tensor]:
    """Gather and average in plain torch, chunk by chunk."""
    olds, chunks = list(data.pieces.values()), []
    for start in range(0, len(olds), CHUNK_ROWS):
        part = olds[start : start + CHUNK_ROWS]
        gathered = data.rows_VH[torch.tensor([old for item in part for old in item])].float()
        lengths = torch.tensor([len(item) for item in part])
        chunks.append(torch.segment_reduce(gathered, "mean", lengths=lengths).bfloat16())
    return chunks


def multiply(data: Data, num_rows: int, num_squares: int) -> Callable[[], None]:
    """Return a function that does the products of a method alone, in fp64.

    Args:
        data: says how wide rows are and how many are new.
        num_rows: rows whose squares are summed.
        num_squares: how many such sums: one for moments, two for a fit.
    """
    part_NH = torch.randn(CHUNK_ROWS, data.rows_VH.shape[1], dtype=torch.float64)
    total_HH = torch.zeros(len(part_NH.T), len(part_NH.T), dtype=torch.float64)

    def run() -> None:
        for left in range(num_rows, 0, -CHUNK_ROWS):
            for _ in range(num_squares):
                total_HH.addmm_(part_NH[:left].T, part_NH[:left])
        for left in range(len(data.pieces), 0, -CHUNK_ROWS):
            part_NH[:left] @ total_HH

    return run


def multiply_anchors(data: Data) -> None:
    """Do the two products of ``clp``: new rows with anchors, weights with their rows in the base."""
    atoms = data.anchors_NH.float()
    for part in data.rows_VH[: len(data.pieces)].split(CHUNK_ROWS):
        (part.float() @ atoms.T) @ data.images_NH


def sum_products(data: Data) -> None:
    """Do what Batch-OMP cannot do without: all products once, and each step the sums of the chosen Gram rows."""
    atoms = data.anchors_NH.float()
    gram = atoms @ atoms.T
    draw = torch.Generator().manual_seed(0)
    for part in data.rows_VH[: len(data.pieces)].split(CHUNK_ROWS):
        part.float() @ atoms.T
        index = torch.randint(len(atoms), (len(part), NUM_ATOMS), generator=draw)
        weights = torch.randn(len(part), NUM_ATOMS, generator=draw)
        for step in range(1, NUM_ATOMS):
            combine_atoms(gram, index[:, :step].contiguous(), weights[:, :step].contiguous())
        combine_atoms(data.images_NH, index, weights)


def make_vectors(data: Data) -> tuple[torch.Tensor, torch.Tensor]:
    """Make vectors of length 1 for new and old tokens, of 300 columns at most."""
    olds = normalize_rows(data.rows_VH[:, :VECTOR_COLUMNS].float())[1]
    return normalize_rows(torch.randn(len(data.pieces), olds.shape[1]))[1], olds


def multiply_vectors(news: torch.Tensor, olds: torch.Tensor) -> None:
    """Compute all cosines and keep none, in blocks of a size at which the product is fastest."""
    block = torch.empty(PEER_BLOCK)
    for queries in news.split(PEER_BLOCK[0]):
        for anchors in olds.split(PEER_BLOCK[1]):
            torch.mm(queries, anchors.T, out=block[: len(queries), : len(anchors)])


def weigh(case: str, news: torch.Tensor, olds: torch.Tensor) -> object:
    """Weigh old tokens for new ones as ``similarity_topk`` or ``focus`` does."""
    if case == "focus":
        return weigh_by_sparsemax(news, olds)
    cosines, numbers = find_nearest(news, olds, NUM_NEIGHBORS)
    return weigh_by_softmax(cosines, TEMPERATURE), numbers


def check(data: Data) -> None:
    """Compare results before times.

    Raises:
        EngineError: ours are not those of the peer.
    """
    pairs = zip(fill(data, "subtoken_mean"), average(data), strict=True)
    if not all(torch.allclose(ours.float(), peer.float(), rtol=1e-2, atol=1e-2) for ours, peer in pairs):
        raise EngineError("fill: subtoken_mean differs from the plain mean; mend that before measuring")
    if not torch.allclose(fit(data, "ols").weight.float(), data.matrix_HH, atol=1e-3):
        raise EngineError("fill: least squares miss the matrix of the anchors; mend that before measuring")


def make_calls(case: str, data: Data) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return peer and ours of a case."""
    if case == "subtoken_mean":
        return partial(average, data), partial(fill, data, case)
    if case == "normal":
        return multiply(data, data.num_rows, 1), partial(fill, data, case)
    if case in ("similarity_topk", "focus"):
        vectors = make_vectors(data)
        return partial(multiply_vectors, *vectors), partial(weigh, case, *vectors)
    if case in ("clp", "omp"):
        return partial(multiply_anchors if case == "clp" else sum_products, data), partial(approach, data, case)
    return multiply(data, len(data.anchors_NH), 2), partial(fit, data, case)


def measure_peak(case: str, columns: int, share: int) -> float:
    """Return the MiB that a case takes on top of its data; called in a process of its own."""
    _, ours = make_calls(case, make_data(columns, share))
    return measure(ours).extra_mib


def run(columns: int, share: int, num_rounds: int, cases: Sequence[str]) -> None:
    """Measure cases and print them."""
    data = make_data(columns, share)
    check(data)
    figures = []
    for case in cases:
        peer, ours = make_calls(case, data)
        seconds = run_in_turns({"peer": make_timed(peer), "ours": make_timed(ours)}, num_rounds)
        best = {name: min(values) for name, values in seconds.items()}
        extra_mib = run_fresh(measure_peak, case, columns, share)
        ratio = compare(seconds, "peer", "ours")
        figures.append({"case": case, "seconds": best, "time_ratio": ratio, "extra_mib": extra_mib})
    print(f"{data.num_rows} old rows, {len(data.pieces)} new, {len(data.anchors_NH)} anchors, {columns} columns")
    print_table(
        ("method", "peer s", "ours s", "time ratio (range)", "extra MiB"),
        [
            (item["case"], *item["seconds"].values(), show_ratio(item["time_ratio"]), item["extra_mib"])
            for item in figures
        ],
    )
    print_figures("fill", ("torch", "numpy"), {"columns": columns, "rounds": num_rounds, "cases": figures})


if __name__ == "__main__":
    parser = make_parser(__doc__, default_rounds=ROUNDS, size=COLUMNS, unit="columns of the matrices")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES, help="methods to measure")
    arguments = parser.parse_args()
    quick = arguments.quick
    run_tool(
        run,
        int(arguments.size or (QUICK_COLUMNS if quick else COLUMNS)),
        QUICK_SHARE if quick else 1,
        arguments.rounds or (QUICK_ROUNDS if quick else ROUNDS),
        arguments.cases,
    )
