"""Say what is in a checkpoint: the model, the state of its vocabulary, how far it was trained, and every tensor.

Reads: a Hugging Face folder or a Megatron checkpoint, headers and index only; also checkpoints of other programs, which
have no ``adapt.json``. Writes: a table, or JSON. Cost: well under a second beside the imports, whatever the size.
"""

import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_adapt.checkpoint.companions import find_tokenizer
from megatron_adapt.checkpoint.dist import DistReader
from megatron_adapt.checkpoint.hf import HFFolder, read_hf_shape
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
    reader = DistReader(iter_folder)
    specs = {key: TensorSpec(reader.shape(key) or (), reader.dtype(key)) for key in reader.keys}
    found = {"format": "Megatron torch_dist", "folder": iter_folder, "files": len(reader.files) - 1}
    if (iter_folder / DESCRIPTION_FILE).is_file():
        description = read_description(iter_folder)
        found |= {
            "model": description.shape.to_dict(),
            "parameters": description.shape.num_parameters,
            "vocabulary": {
                "true size": description.true_vocab_size,
                "rows": description.padded_vocab_size,
                "padding rows": description.padded_vocab_size - description.true_vocab_size,
                **_describe_tokenizer(iter_folder.parent / HF_FOLDER, description.tokenizer_fingerprint),
            },
        }
        position = {"step": description.step}
    else:
        found["vocabulary"] = {"true size": f"unknown, there is no {DESCRIPTION_FILE}"}
        position = {}
    return {**found, "position": {**position, **_read_position(reader)}, **_describe_tensors(specs)}


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
        **_describe_tensors(reader.specs),
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
    """Return the numbers that ``common.pt`` says of the training; other programs put more than numbers there."""
    try:
        common = reader.read_common()
    except AdaptError:
        return {"common.pt": "holds more than plain values, so it is not read"}
    return {key: value for key, value in common.items() if isinstance(value, int | float | str)}


def _describe_tensors(specs: Mapping[str, TensorSpec]) -> dict[str, Any]:
    """Return the tensors; those of one kind, shape and type over the layers are one entry."""
    kinds: dict[tuple[str, TensorSpec], int] = {}
    for name, spec in specs.items():
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
    values = sum(math.prod(spec.shape) for spec in specs.values())
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
