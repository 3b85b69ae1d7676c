"""Make a new set of weights out of Megatron checkpoints: without optimizer, averaged, or with more blocks.

Reads: checkpoint roots (their latest step). Writes: a root with the weights as ``release``, from which a stage of
training can start, and the Hugging Face files that travel with them. Guarantees: one box of a tensor is in memory at a
time; what is only copied keeps its bits; the output appears whole or not at all.

- ``strip_checkpoint``: the weights alone, in another type or in smaller files.
- ``average_checkpoints``: the mean of the same model's weights, computed in fp64.
- ``expand_blocks``: after every group of blocks a copy of its last one whose two output projections are zero, so that
  it adds nothing to the residual and the model is what it was (LLaMA Pro, Wu et al. 2024, arXiv:2401.02415).
  ``adapt.json`` lists them, for a training that freezes the others.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_adapt.checkpoint.companions import find_tokenizer, write_companions
from megatron_adapt.checkpoint.dist import DistReader, DistWriter
from megatron_adapt.checkpoint.hf import read_config
from megatron_adapt.checkpoint.layout import STACKED_PREFIX, check_megatron_tensors, list_extra_states, list_rules
from megatron_adapt.checkpoint.root import (
    HF_FOLDER,
    RELEASE,
    Description,
    find_checkpoint,
    read_description,
    write_description,
    write_latest,
)
from megatron_adapt.checkpoint.values import TensorSpec, torch_dtype
from megatron_adapt.config import AverageCheckpoints, ExpandBlocks, StripCheckpoint
from megatron_adapt.errors import CheckpointError, ConfigError
from megatron_adapt.files import STAGE_FILE, replace_folder, write_stage
from megatron_adapt.logs import show_progress

_OUTPUT_PROJECTIONS = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")
_BOX_BYTES = 64 << 20
_logger = logging.getLogger(__name__)

Box = tuple[tuple[int, ...], tuple[int, ...]]
"Offsets and sizes of a part of a tensor."


def strip_checkpoint(config: StripCheckpoint) -> None:
    """Write the weights of ``config.source`` alone.

    Raises:
        CheckpointError: the source is incomplete.
        ConfigError: the output exists.
    """
    folder, description, source = _open(config.source)
    dtype = description.dtype if config.dtype == "keep" else config.dtype
    stripped = dataclasses.replace(description, step=0, dtype=dtype)
    specs = _spec(source, description, None if config.dtype == "keep" else torch_dtype(config.dtype))
    _write(config, [folder], stripped, specs, source.read, max_file_bytes=config.max_file_mib << 20)


def average_checkpoints(config: AverageCheckpoints) -> None:
    """Write the mean of the weights of ``config.sources``.

    Raises:
        CheckpointError: a source is incomplete, or is another model than the first.
        ConfigError: the output exists.
    """
    (first, description, source), *others = [_open(path) for path in config.sources]
    for folder, other, _ in others:
        for name in ("shape", "padded_vocab_size", "tokenizer_fingerprint"):
            if getattr(other, name) != getattr(description, name):
                raise CheckpointError(
                    f"{folder}: {name} {getattr(other, name)}, but {first} has {getattr(description, name)}; average "
                    "checkpoints of one model"
                )
    sources = [source, *(item[2] for item in others)]

    def read_mean(key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
        total = sum(item.read(key, offsets, sizes).double() for item in sources)
        assert isinstance(total, torch.Tensor)
        return total / len(sources)

    folders = [first, *(item[0] for item in others)]
    _write(config, folders, dataclasses.replace(description, step=0), _spec(source, description, None), read_mean)


def expand_blocks(config: ExpandBlocks) -> None:
    """Write ``config.source`` with ``config.blocks`` more blocks, evenly spread.

    Raises:
        CheckpointError: the source is incomplete.
        ConfigError: the output exists, or the blocks do not divide the layers.
    """
    folder, description, source = _open(config.source)
    num_layers = description.shape.num_layers
    if num_layers % config.blocks:
        fitting = [count for count in range(1, num_layers + 1) if num_layers % count == 0]
        raise ConfigError(
            f"--blocks: {config.blocks} do not divide {num_layers} layers; use one of {', '.join(map(str, fitting))}"
        )
    copied, is_new = list_blocks(num_layers, config.blocks)
    shape = dataclasses.replace(description.shape, num_layers=len(copied))
    specs = {
        key: TensorSpec((len(copied), *spec.shape[1:]), spec.dtype) if _is_stacked(key) else spec
        for key, spec in _spec(source, description, None).items()
    }

    def read_expanded(key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
        if not _is_stacked(key):
            return source.read(key, offsets, sizes)
        block = offsets[0]
        if is_new[block] and key.endswith(_OUTPUT_PROJECTIONS):
            return torch.zeros(sizes, dtype=specs[key].dtype)
        return source.read(key, (copied[block], *offsets[1:]), sizes)

    new_blocks = tuple(block for block, new in enumerate(is_new) if new)
    expanded = dataclasses.replace(description, shape=shape, step=0, new_blocks=new_blocks)
    _write(config, [folder], expanded, specs, read_expanded, copied=copied)


def list_blocks(num_layers: int, num_new: int) -> tuple[list[int], list[bool]]:
    """Return the old block that each block of an expanded model copies, and whether it is a new one."""
    size = num_layers // num_new
    copied, is_new = [], []
    for group in range(num_new):
        own = list(range(group * size, (group + 1) * size))
        copied += [*own, own[-1]]
        is_new += [*[False] * size, True]
    return copied, is_new


def _open(path: Path) -> tuple[Path, Description, DistReader]:
    folder = find_checkpoint(path)
    description, source = read_description(folder), DistReader(folder)
    check_megatron_tensors(source.shape, description.shape, description.padded_vocab_size, str(folder))
    return folder, description, source


def _spec(source: DistReader, description: Description, dtype: torch.dtype | None) -> dict[str, TensorSpec]:
    specs = {}
    for rule in list_rules(description.shape):
        shape = source.shape(rule.megatron)
        assert shape is not None, rule.megatron
        specs[rule.megatron] = TensorSpec(shape, dtype or source.dtype(rule.megatron))
    return specs


def _is_stacked(key: str) -> bool:
    return key.startswith(STACKED_PREFIX)


def _list_boxes(key: str, spec: TensorSpec) -> Iterator[Box]:
    """Cut a tensor into boxes of rows, of one layer each."""
    lead = 1 if _is_stacked(key) else 0
    num_rows, inner = spec.shape[lead], spec.shape[lead + 1 :]
    step = max(1, _BOX_BYTES // (spec.dtype.itemsize * math.prod(inner)))
    for layer in range(spec.shape[0] if lead else 1):
        for start in range(0, num_rows, step):
            front = (layer,) if lead else ()
            yield (
                (*front, start, *[0] * len(inner)),
                (*[1] * lead, min(step, num_rows - start), *inner),
            )


def _write(
    config: StripCheckpoint | AverageCheckpoints | ExpandBlocks,
    folders: Sequence[Path],
    description: Description,
    specs: Mapping[str, TensorSpec],
    read: Callable[[str, tuple[int, ...], tuple[int, ...]], torch.Tensor],
    *,
    max_file_bytes: int | None = None,
    copied: Sequence[int] | None = None,
) -> None:
    """Write the root: tensors, description, the files that travel with them, and the record."""
    companions = folders[0].parent / HF_FOLDER
    total = sum(spec.num_bytes for spec in specs.values()) / 1e6
    with replace_folder(config.output, overwrite=config.overwrite) as partial:
        release = partial / RELEASE
        release.mkdir()
        with (
            show_progress("writing weights", total, "MB") as advance,
            DistWriter(release, specs, max_file_bytes) as writer,
        ):
            for key, spec in specs.items():
                for offsets, sizes in _list_boxes(key, spec):
                    values = read(key, offsets, sizes).to(spec.dtype)
                    writer.write(key, offsets, values)
                    advance(values.nbytes / 1e6)
            for key in list_extra_states(description.shape.num_layers):
                writer.write_object(key, None)
            writer.write_common({"iteration": 0, "checkpoint_version": 3.0})
        write_description(release, description)
        if companions.is_dir():
            hf_config = _adapt_config(read_config(companions), description, copied)
            write_companions(
                partial / HF_FOLDER, config=hf_config, source=companions, tokenizer=find_tokenizer(None, companions)
            )
        write_latest(partial, None)
        counts = {"parameters": description.shape.num_parameters, "new_blocks": list(description.new_blocks)}
        write_stage(partial / STAGE_FILE, config=config, inputs=list(folders), counts=counts)
    _logger.info("%s: weights of %s parameters", config.output, f"{counts['parameters']:,}")


def _adapt_config(config: dict[str, Any], description: Description, copied: Sequence[int] | None) -> dict[str, Any]:
    changed: dict[str, Any] = {key: description.dtype for key in ("dtype", "torch_dtype") if key in config}
    if copied is not None:
        changed["num_hidden_layers"] = len(copied)
        if "layer_types" in config:
            changed["layer_types"] = [config["layer_types"][layer] for layer in copied]
    return {**config, **changed}
