"""Hugging Face to Megatron and back: convert_checkpoint against a plain copy and against transformers.

1. ``write_model``: a sharded bf16 Llama of random weights, about ``--size`` GB.
2. In turns, each in its own process: ``copy_bytes`` (``cp -r``), ``convert_to_megatron`` and ``convert_to_hf`` (ours),
   and, unless ``--without-transformers``, ``resave`` (from_pretrained and save_pretrained, the least that a converter
   on top of it must do; it holds the model in memory).
3. ``check_equal``: what came back has the bytes of the source.

Before each call the dirty pages of the last one are written back and the source is dropped from the file cache; every
output is synced to disk inside the time. Start-up is not in the times: our processes import torch before the clock
starts. Peak memory is that of the whole process, in its first call: everything resident, imports and pages of mapped
files included; the file cache is not.

``python benchmarks/convert.py [--quick] [--size GB] [--folder DIR] [--without-transformers]``
"""

import logging
import shutil
import subprocess
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measuring.disk import count_bytes, drop_from_cache, sync_folder
from measuring.report import make_parser, print_figures, print_table, show_ratio
from measuring.rounds import Measured, compare, measure, run_in_turns, start_process

from megatron_adapt.checkpoint.convert import convert_checkpoint
from megatron_adapt.checkpoint.hf import HFFolder, HFWriter
from megatron_adapt.checkpoint.layout import list_hf_tensors
from megatron_adapt.checkpoint.values import TensorSpec, list_row_blocks
from megatron_adapt.config import ConvertCheckpoint
from megatron_adapt.errors import ConfigError
from megatron_adapt.files import write_json
from megatron_adapt.flags import run_tool
from megatron_adapt.shape import LlamaShape, read_shape

GB, QUICK_GB = 1.0, 0.15
ROUNDS, QUICK_ROUNDS = 5, 3
HIDDEN_SIZES = (4096, 2048, 1024, 512, 256)
MIN_LAYERS, NUM_SHARDS = 4, 4
DISK_FACTOR = 3.2
"Source, its Megatron form and one output, which padding and what the system keeps for itself make larger."
OURS = ("to megatron", "to hf")


def choose_config(num_bytes: float) -> dict[str, Any]:
    """Choose the widest Llama of at least four layers that has about ``num_bytes`` in bf16."""
    for hidden_size in HIDDEN_SIZES:
        config: dict[str, Any] = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": hidden_size,
            "intermediate_size": hidden_size * 11 // 4,
            "num_attention_heads": hidden_size // 64,
            "num_key_value_heads": hidden_size // 256,
            "vocab_size": hidden_size * 16 - 256,
            "dtype": "bfloat16",
        }
        one, two = (2 * read_shape({**config, "num_hidden_layers": n}, "config").num_parameters for n in (1, 2))
        num_layers = 1 + round((num_bytes - one) / (two - one))
        if num_layers >= MIN_LAYERS or hidden_size == HIDDEN_SIZES[-1]:
            break
    return {**config, "num_hidden_layers": max(1, num_layers)}


def write_model(folder: Path, config: dict[str, Any]) -> LlamaShape:
    """Write a Hugging Face folder with weights drawn from a fixed seed, a few rows at a time."""
    shape = read_shape(config, "config")
    specs = {name: TensorSpec(size, torch.bfloat16) for _, name, size in list_hf_tensors(shape)}
    folder.mkdir()
    write_json(folder / "config.json", config)
    generator = torch.Generator().manual_seed(0)
    num_bytes = sum(spec.num_bytes for spec in specs.values())
    with HFWriter(folder, specs, max_shard_bytes=num_bytes // NUM_SHARDS) as writer:
        for name, spec in specs.items():
            for start, stop in list_row_blocks(spec):
                rows = torch.empty((stop - start, *spec.shape[1:]))
                writer.write_rows(name, start, rows.normal_(std=0.02, generator=generator).bfloat16())
    return shape


def copy_bytes(source: Path, target: Path) -> None:
    """Copy the folder."""
    subprocess.run(["cp", "-r", source, target], check=True)
    sync_folder(target)


def resave(source: Path, target: Path) -> None:
    """Load the model with transformers and save it again."""
    from transformers import LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    LlamaForCausalLM.from_pretrained(source, dtype="auto").save_pretrained(target)
    sync_folder(target)


def convert_to_megatron(source: Path, target: Path) -> None:
    """Convert the folder with our tool's entry function, which syncs what it writes."""
    logging.getLogger("megatron_adapt").setLevel(logging.ERROR)  # the model has no tokenizer, and need not
    convert_checkpoint(ConvertCheckpoint(source=source, to="megatron", output=target))


def convert_to_hf(source: Path, target: Path) -> None:
    """Convert back."""
    logging.getLogger("megatron_adapt").setLevel(logging.ERROR)
    convert_checkpoint(ConvertCheckpoint(source=source, to="hf", output=target))


FUNCTIONS = {"copy": copy_bytes, **dict(zip(OURS, (convert_to_megatron, convert_to_hf), strict=True))}


def check_equal(one: Path, other: Path) -> None:
    """Stop if a tensor of two Hugging Face folders differs.

    Raises:
        ConfigError: with its name.
    """
    left, right = HFFolder(one), HFFolder(other)
    for name, spec in left.specs.items():
        for start, stop in list_row_blocks(spec):
            rows = [folder.read_rows(name, start, stop).view(torch.int16) for folder in (left, right)]
            if not torch.equal(*rows):
                raise ConfigError(f"{name}: came back with other bytes; the conversion is wrong")


def require_space(folder: Path, num_bytes: float) -> None:
    """Refuse a model that does not fit the disk.

    Raises:
        ConfigError: there is less free space than source and output need.
    """
    free, needed = shutil.disk_usage(folder).free, DISK_FACTOR * num_bytes
    if free < needed:
        raise ConfigError(
            f"--size: a model of {num_bytes / 1e9:.3g} GB needs {needed / 1e9:.3g} GB in {folder}, "
            f"{free / 1e9:.3g} GB are free; lower --size or name another --folder"
        )


def do_nothing() -> None:
    """Let a process finish its imports."""


def measure_all(source: Path, folder: Path, functions: dict[str, Any], num_rounds: int) -> dict[str, Any]:
    """Run the functions in turns, each in its own process."""
    found: dict[str, list[Measured]] = {name: [] for name in functions}
    written: dict[str, float] = {}
    megatron = folder / "megatron"
    convert_to_megatron(source, megatron)
    with ExitStack() as stack:
        processes = {name: stack.enter_context(start_process()) for name in functions}
        for call in [process.submit(do_nothing) for process in processes.values()]:
            call.result()

        def run_one(name: str) -> float:
            target, given = folder / "output", megatron if name == "to hf" else source
            drop_from_cache(given)
            found[name].append(processes[name].submit(measure, functions[name], given, target).result())
            written[name] = count_bytes(target) / 1e9
            if name == "to hf" and len(found[name]) == 1:
                check_equal(source, target)
            shutil.rmtree(target)
            return found[name][-1].seconds

        seconds = run_in_turns({name: partial(run_one, name) for name in functions}, num_rounds)
    return {
        "seconds": {name: median(values) for name, values in seconds.items()},
        "written_gb": written,
        "time_ratio": {
            ours: {name: compare(seconds, ours, name) for name in functions if name not in OURS} for ours in OURS
        },
        "start_mib": {name: items[0].start_mib for name, items in found.items()},
        "peak_mib": {name: items[0].start_mib + items[0].extra_mib for name, items in found.items()},
    }


def run(size_gb: float, num_rounds: int, parent: Path, with_transformers: bool = True) -> None:
    """Write the model, measure and print.

    Raises:
        ConfigError: the folder does not exist or has too little space.
    """
    if not parent.is_dir():
        raise ConfigError(f"--folder: {parent} is not a folder; create it or name another")
    require_space(parent, size_gb * 1e9)
    functions = {**FUNCTIONS, **({"transformers": resave} if with_transformers else {})}
    with tempfile.TemporaryDirectory(dir=parent) as name:
        shape = write_model(Path(name, "source"), choose_config(size_gb * 1e9))
        source_gb = count_bytes(Path(name, "source")) / 1e9
        figures = measure_all(Path(name, "source"), Path(name), functions, num_rounds)
    print(f"Hugging Face and Megatron: {source_gb:.3g} GB, {shape.num_layers} layers, {shape.hidden_size} wide, bf16")
    ratios = figures["time_ratio"]
    print_table(
        ("what", "seconds", "written GB", *(f"time {ours} / its" for ours in OURS), "peak MiB"),
        [
            (
                name,
                figures["seconds"][name],
                figures["written_gb"][name],
                *(show_ratio(ratios[ours][name]) if name in ratios[ours] else "" for ours in OURS),
                figures["peak_mib"][name],
            )
            for name in functions
        ],
    )
    model = {"gb": source_gb, "num_layers": shape.num_layers, "hidden_size": shape.hidden_size}
    print_figures("convert", ("torch", "transformers", "safetensors"), {**model, "rounds": num_rounds, **figures})


if __name__ == "__main__":
    parser = make_parser(__doc__, default_rounds=ROUNDS, size=GB, unit="GB of weights")
    temporary = Path(tempfile.gettempdir())
    parser.add_argument("--folder", type=Path, default=temporary, help="where the model and its copies are written")
    parser.add_argument("--without-transformers", action="store_true", help="leave out what holds the model in memory")
    arguments = parser.parse_args()
    size = arguments.size or (QUICK_GB if arguments.quick else GB)
    rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS)
    run_tool(run, size, rounds, arguments.folder, not arguments.without_transformers)
