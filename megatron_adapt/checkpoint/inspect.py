"""Say what is in a checkpoint: the model, the state of its vocabulary, how far it was trained, and every tensor.

Reads: a Hugging Face folder or a Megatron checkpoint, headers and index only; also checkpoints of other programs
(``opened``), whose true vocabulary is not known. Writes: a table, or JSON. Cost: well under a second beside the
imports, whatever the size.
"""

import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_adapt.checkpoint.companions import find_tokenizer
from megatron_adapt.checkpoint.dist import DistReader
from megatron_adapt.checkpoint.hf import HFFolder, read_hf_shape
from megatron_adapt.checkpoint.legacy import LegacyCheckpoint
from megatron_adapt.checkpoint.opened import describe_foreign, open_foreign
from megatron_adapt.checkpoint.root import (
    DESCRIPTION_FILE,
    HF_FOLDER,
    find_checkpoint,
    is_megatron_checkpoint,
    read_description,
)
from megatron_adapt.checkpoint.values import TensorSpec
from megatron_adapt.config import InspectCheckpoint
from megatron_adapt.errors import AdaptError
from megatron_adapt.files import write_json

_ARGUMENTS = ("consumed_train_samples", "seq_length", "global_batch_size", "tokenizer_type", "tokenizer_model")
"What ``args`` of Megatron-LM say of the training."
_LAYER = re.compile(r"(?<=\.layers\.)\d+(?=\.)")


def inspect_checkpoint(config: InspectCheckpoint) -> None:
    """Print what is in a checkpoint.

    Raises:
        CheckpointError: the folder is no checkpoint, or an incomplete one.
        ConfigError: the model of a Hugging Face folder is not supported.
    """
    megatron = is_megatron_checkpoint(config.folder)
    found = describe_megatron(config.folder) if megatron else describe_hf(config.folder)
    if config.json is not None:
        write_json(config.json, found)
    sys.stdout.write(_show(found))


def describe_megatron(folder: Path) -> dict[str, Any]:
    """Return what a Megatron checkpoint holds, as plain values."""
    iter_folder = find_checkpoint(folder)
    if not (iter_folder / DESCRIPTION_FILE).is_file():
        return _describe_foreign(iter_folder)
    reader, description = DistReader(iter_folder), read_description(iter_folder)
    return {
        "format": "Megatron torch_dist",
        "folder": iter_folder,
        "files": len(reader.files) - 1,
        "model": description.shape.to_dict(),
        "parameters": description.shape.num_parameters,
        "vocabulary": {
            "true size": description.true_vocab_size,
            "rows": description.padded_vocab_size,
            "padding rows": description.padded_vocab_size - description.true_vocab_size,
            **_describe_tokenizer(iter_folder.parent / HF_FOLDER, description.tokenizer_fingerprint),
        },
        "position": {"step": description.step, **_read_position(reader)},
        **_describe_tensors(_list_specs(reader)),
    }


def _list_specs(reader: DistReader) -> list[tuple[str, TensorSpec]]:
    return [(key, TensorSpec(reader.shape(key) or (), reader.dtype(key))) for key in reader.keys]


def _describe_foreign(iter_folder: Path) -> dict[str, Any]:
    """Describe a checkpoint that another program wrote, as far as it goes; its tensors as they are stored."""
    checkpoint = open_foreign(iter_folder)
    companions = iter_folder.parent / HF_FOLDER
    if isinstance(checkpoint, LegacyCheckpoint):
        named = f"{checkpoint.tensor_size} tensor-parallel ranks, {checkpoint.num_stages} pipeline stages"
        chunks = f", {checkpoint.num_chunks} model chunks each" if checkpoint.num_chunks > 1 else ""
        found: dict[str, Any] = {
            "format": f"Megatron partitions ({named}{chunks})",
            "files": len(checkpoint.partitions),
        }
        specs = [
            (name, item.spec) for _, parts in checkpoint.partitions for part in parts for name, item in part.items()
        ]
    else:
        reader = checkpoint.reader
        found = {"format": "Megatron torch_dist of another program", "files": len(reader.files) - 1}
        specs = _list_specs(reader)
    try:
        shape = describe_foreign(checkpoint, companions)
        model = {name: value for name, value in shape.to_dict().items() if name != "vocab_size"}
    except AdaptError as error:
        model = {"unknown": str(error)}
    return {
        "folder": iter_folder,
        **found,
        "model": model,
        "vocabulary": {
            "true size": f"unknown, there is no {DESCRIPTION_FILE}",
            "rows": checkpoint.num_vocab_rows,
            **_describe_tokenizer(companions, None),
        },
        "position": {"step": checkpoint.step, **_list_plain(checkpoint.arguments or {}, _ARGUMENTS)},
        **_describe_tensors(specs),
    }


def _list_plain(arguments: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: arguments[name] for name in names if isinstance(arguments.get(name), int | float | str)}


def describe_hf(folder: Path) -> dict[str, Any]:
    """Return what a Hugging Face folder holds, as plain values."""
    shape, reader = read_hf_shape(folder), HFFolder(folder)
    return {
        "format": "Hugging Face",
        "folder": folder,
        "files": len(reader.files),
        "model": shape.to_dict(),
        "parameters": shape.num_parameters,
        "vocabulary": {"rows": shape.vocab_size, **_describe_tokenizer(folder, None)},
        "position": {},
        **_describe_tensors(list(reader.specs.items())),
    }


def _describe_tokenizer(folder: Path, known: str | None) -> dict[str, Any]:
    try:
        tokenizer = find_tokenizer(None, folder)
    except AdaptError as error:
        return {"tokenizer": f"unreadable: {error}"}
    if tokenizer is None:
        return {"tokenizer": "none beside the weights"}
    described: dict[str, Any] = {"tokenizer": f"{tokenizer.vocab_size} tokens, fingerprint {tokenizer.fingerprint}"}
    if known is not None and known != tokenizer.fingerprint:
        described["tokenizer expected"] = f"fingerprint {known}"
    return described


def _read_position(reader: DistReader) -> dict[str, Any]:
    """Return the numbers that ``common.pt`` says of the training."""
    common = reader.read_common()
    return {key: value for key, value in common.items() if isinstance(value, int | float | str)}


def _describe_tensors(specs: Sequence[tuple[str, TensorSpec]]) -> dict[str, Any]:
    """Return the tensors; those of one kind, shape and type over the layers are one entry."""
    kinds: dict[tuple[str, TensorSpec], int] = {}
    for name, spec in specs:
        kind = _LAYER.sub("*", name), spec
        kinds[kind] = kinds.get(kind, 0) + 1
    listed = [
        {
            "name": name,
            "count": count,
            "shape": list(spec.shape),
            "dtype": str(spec.dtype).removeprefix("torch."),
            "bytes": count * spec.num_bytes,
        }
        for (name, spec), count in kinds.items()
    ]
    values = sum(math.prod(spec.shape) for _, spec in specs)
    return {"values": values, "bytes": sum(item["bytes"] for item in listed), "tensors": listed}


def _show(found: Mapping[str, Any]) -> str:
    lines = [f"{found['folder']}: {found['format']}, {found['files']} files of weights"]
    for part in ("model", "vocabulary", "position"):
        for name, value in found.get(part, {}).items():
            lines.append(f"{part:12}{name}: {value}")
    if "parameters" in found:
        lines.append(f"{'model':12}parameters: {found['parameters']:,}")
    rows = [
        (item["name"], str(item["count"]), "x".join(map(str, item["shape"])), item["dtype"], f"{item['bytes']:,}")
        for item in found["tensors"]
    ]
    rows = [("tensor", "count", "shape", "dtype", "bytes"), *rows]
    widths = [max(len(row[at]) for row in rows) for at in range(5)]
    for name, *cells in rows:
        aligned = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append("  ".join((name.ljust(widths[0]), *aligned)))
    lines.append(f"{found['values']:,} values, {found['bytes'] / 1e9:.3f} GB")
    return "\n".join(lines) + "\n"
