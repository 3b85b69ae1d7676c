"""Hugging Face to Megatron: convert_checkpoint against a plain copy and against transformers, in time and memory.

1. ``write_model``: a sharded bf16 Llama of random weights, about ``--size`` GB.
2. In turns, each in its own process: ``copy_bytes`` (``shutil.copytree``), ``resave`` (transformers' from_pretrained
   and save_pretrained, the least that a converter on top of it must do), ``convert`` (ours).

Before each call the dirty pages of the last one are written back and the source is dropped from the file cache; every
output is synced to disk inside the time. Peak memory is that of the first call of a process: resident memory above
what it held after its imports; pages of mapped files count, the file cache does not.

``python benchmarks/convert.py [--quick] [--size GB] [--folder DIR]``
"""

import logging
import os
import shutil
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measuring.report import make_parser, print_figures, print_table, show_ratio
from measuring.rounds import Measured, compare, measure, run_in_turns, start_process
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from megatron_adapt.checkpoint.convert import convert_checkpoint
from megatron_adapt.checkpoint.hf import HFWriter
from megatron_adapt.checkpoint.layout import list_parts, list_rules, shape_hf
from megatron_adapt.checkpoint.values import TensorSpec
from megatron_adapt.config import ConvertCheckpoint
from megatron_adapt.errors import ConfigError
from megatron_adapt.files import write_json
from megatron_adapt.flags import run_tool
from megatron_adapt.shape import LlamaShape, read_shape

GB, QUICK_GB = 1.0, 0.15
ROUNDS, QUICK_ROUNDS = 5, 3
HIDDEN_SIZES = (4096, 2048, 1024, 512, 256)
MIN_LAYERS, NUM_SHARDS = 4, 4
DISK_FACTOR = 2.5
"Source and one output, which padding and what the system keeps for itself make larger."
NAMES = ("copy", "transformers", "ours")


def choose_config(num_bytes: float) -> LlamaConfig:
    """Choose the widest Llama of at least four layers that has about ``num_bytes`` in bf16."""
    for hidden_size in HIDDEN_SIZES:
        settings: dict[str, Any] = {
            "hidden_size": hidden_size,
            "intermediate_size": hidden_size * 11 // 4,
            "num_attention_heads": hidden_size // 64,
            "num_key_value_heads": hidden_size // 256,
            "vocab_size": hidden_size * 16 - 256,
            "dtype": "bfloat16",
        }
        one, two = (
            2 * read_shape(LlamaConfig(num_hidden_layers=n, **settings).to_dict(), "config").num_parameters
            for n in (1, 2)
        )
        num_layers = 1 + round((num_bytes - one) / (two - one))
        if num_layers >= MIN_LAYERS or hidden_size == HIDDEN_SIZES[-1]:
            break
    return LlamaConfig(num_hidden_layers=max(1, num_layers), architectures=["LlamaForCausalLM"], **settings)


def write_model(folder: Path, config: LlamaConfig) -> LlamaShape:
    """Write a Hugging Face folder with weights drawn from a fixed seed, one tensor at a time."""
    shape = read_shape(config.to_dict(), "config")
    specs = {
        name: TensorSpec(size, torch.bfloat16)
        for rule in list_rules(shape)
        for layer in list_parts(rule, shape)
        for name, size in zip(rule.name_hf(layer), shape_hf(rule, shape), strict=True)
    }
    folder.mkdir()
    write_json(folder / "config.json", config.to_dict())
    generator = torch.Generator().manual_seed(0)
    num_bytes = sum(spec.num_bytes for spec in specs.values())
    with HFWriter(folder, specs, max_shard_bytes=num_bytes // NUM_SHARDS) as writer:
        for name, spec in specs.items():
            writer.write(name, torch.empty(spec.shape, dtype=spec.dtype).normal_(std=0.02, generator=generator))
    return shape


def copy_bytes(source: Path, target: Path) -> None:
    """Copy the folder."""
    shutil.copytree(source, target)
    sync_folder(target)


def resave(source: Path, target: Path) -> None:
    """Load the model with transformers and save it again."""
    disable_progress_bar()
    LlamaForCausalLM.from_pretrained(source, dtype="auto").save_pretrained(target)
    sync_folder(target)


def convert(source: Path, target: Path) -> None:
    """Convert the folder with our tool's entry function, which syncs what it writes."""
    logging.getLogger("megatron_adapt").setLevel(logging.ERROR)  # the model has no tokenizer, and need not
    convert_checkpoint(ConvertCheckpoint(source=source, to="megatron", output=target))


FUNCTIONS = dict(zip(NAMES, (copy_bytes, resave, convert), strict=True))


def sync_folder(folder: Path) -> None:
    """Wait until all files of a folder are on disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def drop_from_cache(folder: Path) -> None:
    """Write back what is dirty and ask the kernel to forget the pages of a folder's files."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file() and hasattr(os, "posix_fadvise"):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def count_bytes(folder: Path) -> int:
    """Return the size of all files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


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


def measure_all(source: Path, folder: Path, num_rounds: int) -> dict[str, Any]:
    """Run the three in turns, each in its own process."""
    found: dict[str, list[Measured]] = {name: [] for name in NAMES}
    written: dict[str, float] = {}
    with ExitStack() as stack:
        processes = {name: stack.enter_context(start_process()) for name in NAMES}
        for call in [process.submit(do_nothing) for process in processes.values()]:
            call.result()

        def run_one(name: str) -> float:
            target = folder / "output"
            drop_from_cache(source)
            found[name].append(processes[name].submit(measure, FUNCTIONS[name], source, target).result())
            written[name] = count_bytes(target) / 1e9
            shutil.rmtree(target)
            return found[name][-1].seconds

        seconds = run_in_turns({name: partial(run_one, name) for name in NAMES}, num_rounds)
    extra_mib = {name: items[0].extra_mib for name, items in found.items()}
    return {
        "seconds": {name: median(values) for name, values in seconds.items()},
        "written_gb": written,
        "time_ratio": {name: compare(seconds, name, "ours") for name in NAMES[:2]},
        "start_mib": {name: items[0].start_mib for name, items in found.items()},
        "extra_mib": extra_mib,
        "memory_ratio": {"transformers": extra_mib["transformers"] / extra_mib["ours"]},
    }


def run(size_gb: float, num_rounds: int, parent: Path) -> None:
    """Write the model, measure and print.

    Raises:
        ConfigError: the folder does not exist or has too little space.
    """
    if not parent.is_dir():
        raise ConfigError(f"--folder: {parent} is not a folder; create it or name another")
    require_space(parent, size_gb * 1e9)
    with tempfile.TemporaryDirectory(dir=parent) as name:
        shape = write_model(Path(name, "source"), choose_config(size_gb * 1e9))
        source_gb = count_bytes(Path(name, "source")) / 1e9
        figures = measure_all(Path(name, "source"), Path(name), num_rounds)
    print(f"Hugging Face to Megatron: {source_gb:.3g} GB, {shape.num_layers} layers, {shape.hidden_size} wide, bf16")
    print_table(
        ("what", "seconds", "written GB", "its time / ours (range)", "peak MiB"),
        [
            (
                name,
                figures["seconds"][name],
                figures["written_gb"][name],
                show_ratio(figures["time_ratio"][name]) if name in figures["time_ratio"] else "1",
                figures["extra_mib"][name],
            )
            for name in NAMES
        ],
    )
    model = {"gb": source_gb, "num_layers": shape.num_layers, "hidden_size": shape.hidden_size}
    print_figures("convert", ("torch", "transformers", "safetensors"), {**model, "rounds": num_rounds, **figures})


if __name__ == "__main__":
    parser = make_parser(__doc__, default_rounds=ROUNDS, size=GB, unit="GB of weights")
    temporary = Path(tempfile.gettempdir())
    parser.add_argument("--folder", type=Path, default=temporary, help="where the model and its copies are written")
    arguments = parser.parse_args()
    size = arguments.size or (QUICK_GB if arguments.quick else GB)
    run_tool(run, size, arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS), arguments.folder)
