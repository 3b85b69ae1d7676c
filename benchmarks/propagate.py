"""Propagating a learned vocabulary to an instruct model (LEP), both matrices, against the fp64 products it must do.

1. ``write_models``: three folders of random bf16 weights with an almost empty body, tokenizers of 128,000 and 160,000
   tokens (both made up); the instruct model's rows are the base's with columns exchanged and doubled.
2. In turns, each in its own process: the products of one matrix after the other alone, on rows that are in memory and
   fp64 already (``multiply``; a part of them, since all are alike), and ours, from folders to folder.
3. ``check``: adapted rows come out with columns exchanged and doubled.

Peak memory is that of the whole process, imports included. The paper's own way would hold two matrices of all new
tokens in fp64, and as much again inside LAPACK: 21 GB at full size.

``python benchmarks/propagate.py [--quick] [--size COLUMNS] [--folder DIR]``
"""

import logging
import shutil
import tempfile
from collections.abc import Callable
from itertools import islice, product
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import torch
from measuring.report import make_parser, print_figures, print_table, show_ratio
from measuring.rounds import Measured, compare, make_timed, measure, run_fresh, run_in_turns
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from megatron_adapt.checkpoint.hf import HFFolder, HFWriter
from megatron_adapt.checkpoint.layout import EMBEDDING, HEAD, list_hf_tensors
from megatron_adapt.checkpoint.values import TensorSpec
from megatron_adapt.config import PropagateEmbeddings
from megatron_adapt.errors import EngineError
from megatron_adapt.files import write_json
from megatron_adapt.flags import run_tool
from megatron_adapt.shape import read_shape
from megatron_adapt.vocab.propagate import propagate_embeddings
from megatron_adapt.vocab.rows import CHUNK_ROWS

COLUMNS, QUICK_COLUMNS = 4096, 512
NUM_OLD, NUM_NEW = 128_000, 160_000
QUICK_SHARE, ROUNDS, QUICK_ROUNDS = 8, 1, 3
PEER_SHARE = 8
"The peer does this part of its products, and its time counts as many times."
MATRICES = (EMBEDDING, HEAD)


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write a byte-level tokenizer: all pairs of letters, then pairs of pairs."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = ["".join(pair) for pair in product(ascii_lowercase, repeat=2)]
    merges = list(islice((*product(ascii_lowercase, repeat=2), *product(pairs, repeat=2)), vocab_size - len(letters)))
    pieces = [*letters, *(left + right for left, right in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={piece: at for at, piece in enumerate(pieces)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


def draw_rows(name: str, start: int, num_rows: int, columns: int) -> torch.Tensor:
    """Draw rows of a matrix that begin with number ``start``, always the same."""
    generator = torch.Generator().manual_seed(start + len(name))
    return torch.randn(num_rows, columns, generator=generator).bfloat16()


def write_model(folder: Path, num_rows: int, columns: int, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Write a one-layer Llama with rows of a fixed seed, changed."""
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": columns, "intermediate_size": 8,
        "num_attention_heads": 8, "num_key_value_heads": 1, "num_hidden_layers": 1, "vocab_size": num_rows,
        "head_dim": 8, "dtype": "bfloat16",
    }  # fmt: skip
    shape = read_shape(config, "config")
    specs = {name: TensorSpec(size, torch.bfloat16) for _, name, size in list_hf_tensors(shape)}
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config)
    write_tokenizer(folder, num_rows)
    with HFWriter(folder, specs) as writer:
        for name, spec in specs.items():
            if name not in MATRICES:
                writer.write(name, torch.zeros(spec.shape, dtype=spec.dtype))
                continue
            for start in range(0, num_rows, CHUNK_ROWS):
                rows_NH = draw_rows(name, start, min(CHUNK_ROWS, num_rows - start), columns)
                writer.write_rows(name, start, change(rows_NH))


def exchange(rows_NH: torch.Tensor) -> torch.Tensor:
    """Reverse the columns and double the values, exactly."""
    return 2 * rows_NH.flip(-1)


def write_models(folder: Path, columns: int, share: int) -> None:
    """Write the base, the adapted and the instruct model."""
    write_model(folder / "base", NUM_OLD // share, columns, torch.clone)
    write_model(folder / "adapted", NUM_NEW // share, columns, lambda rows_NH: rows_NH.roll(1, -1))
    write_model(folder / "instruct", NUM_OLD // share, columns, exchange)


def propagate(folder: Path) -> Measured:
    """Run ours from folders to a new folder; called in a process of its own."""
    logging.getLogger("megatron_adapt").setLevel(logging.ERROR)
    shutil.rmtree(folder / "out", ignore_errors=True)
    paths = {name: folder / name for name in ("base", "adapted", "instruct")}
    return measure(propagate_embeddings, PropagateEmbeddings(**paths, output=folder / "out"))


def multiply(columns: int, num_rows: int) -> float:
    """Do a part of the products of both matrices; return what all would take. Called in a process of its own."""
    part_NH = torch.randn(CHUNK_ROWS, columns, dtype=torch.float64)
    total_HH = torch.zeros(columns, columns, dtype=torch.float64)

    def run() -> None:
        for left in range(len(MATRICES) * num_rows // PEER_SHARE, 0, -CHUNK_ROWS):
            for _ in range(2):
                total_HH.addmm_(part_NH[:left].T, part_NH[:left])
            part_NH[:left] @ total_HH

    return PEER_SHARE * make_timed(run)()


def check(folder: Path, columns: int, share: int) -> None:
    """Compare rows of the output with what they must be.

    Raises:
        EngineError: they differ.
    """
    before, after = HFFolder(folder / "adapted"), HFFolder(folder / "out")
    for name in MATRICES:
        start = NUM_NEW // share - 64
        rows_NH, expected_NH = (source.read_rows(name, start, start + 64).float() for source in (after, before))
        if not torch.allclose(rows_NH, exchange(expected_NH), rtol=1e-2, atol=1e-4):
            raise EngineError(f"propagate: rows of {name} are not those of the map; mend that before measuring")


def run(columns: int, share: int, num_rounds: int, folder: Path | None) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        scratch = Path(name)
        write_models(scratch, columns, share)
        measured: list[Measured] = []

        def run_ours() -> float:
            measured.append(run_fresh(propagate, scratch))
            return measured[-1].seconds

        calls = {"products": lambda: run_fresh(multiply, columns, NUM_NEW // share), "ours": run_ours}
        seconds = run_in_turns(calls, num_rounds)
        check(scratch, columns, share)
    best = {name: min(values) for name, values in seconds.items()}
    ratio = compare(seconds, "products", "ours")
    peak_mib = max(item.start_mib + item.extra_mib for item in measured)
    extra_mib = max(item.extra_mib for item in measured)
    print(f"two matrices of {NUM_OLD // share} old and {NUM_NEW // share} new rows, {columns} columns, bf16")
    print("products: X^T X, X^T Y and N D of all new tokens in fp64; ours: files, tokenizers and eigenvalues, too")
    print_table(
        ("", "products s", "ours s", "time ratio (range)", "extra MiB", "whole process MiB"),
        [("conversion", *best.values(), show_ratio(ratio), extra_mib, peak_mib)],
    )
    case = {"case": "conversion", "seconds": best, "time_ratio": ratio, "extra_mib": extra_mib, "peak_mib": peak_mib}
    print_figures("propagate", ("torch",), {"columns": columns, "rounds": num_rounds, "cases": [case]})


if __name__ == "__main__":
    parser = make_parser(__doc__, default_rounds=ROUNDS, size=COLUMNS, unit="columns of the matrices")
    parser.add_argument("--folder", type=Path, help="where to write the models, 10 GB (the system's temporary folder)")
    arguments = parser.parse_args()
    quick = arguments.quick
    run_tool(
        run,
        int(arguments.size or (QUICK_COLUMNS if quick else COLUMNS)),
        QUICK_SHARE if quick else 1,
        arguments.rounds or (QUICK_ROUNDS if quick else ROUNDS),
        arguments.folder,
    )
