"""Make a new set of weights out of Megatron checkpoints: without optimizer, averaged, or with more blocks.

Reads: checkpoint roots (their latest step). Writes: a root with the weights as ``release``, from which a stage of
training can start, and the Hugging Face files that travel with them. Guarantees: a few parts of 2 MiB are in memory;
what is only copied keeps its bits; free space is looked at first; the output appears whole; killed and started again,
the work goes on behind what is done and ends with the same bytes.

- ``strip_checkpoint``: the weights alone, in another type or in smaller files.
- ``average_checkpoints``: the mean of the same model's weights, computed in fp64.
- ``expand_blocks``: after every group of blocks a copy of its last one whose two output projections are zero, so that
  it adds nothing to the residual and the model is what it was (LLaMA Pro, Wu et al. 2024, arXiv:2401.02415).
  ``adapt.json`` lists them, for a training that freezes the others.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_adapt.checkpoint import slices
from megatron_adapt.checkpoint.companions import find_tokenizer, write_companions
from megatron_adapt.checkpoint.dist import DistReader, DistWriter
from megatron_adapt.checkpoint.estimate import count_dist_bytes
from megatron_adapt.checkpoint.hf import read_config
from megatron_adapt.checkpoint.layout import STACKED_PREFIX, check_megatron_tensors, list_rules
from megatron_adapt.checkpoint.parts import Part, cut_parts, write_model
from megatron_adapt.checkpoint.resume import PartialFolder, continue_folder, fingerprint_plan
from megatron_adapt.checkpoint.root import (
    HF_FOLDER,
    RELEASE,
    Description,
    find_checkpoint,
    read_description,
    write_description,
    write_latest,
)
from megatron_adapt.checkpoint.values import TensorSpec, list_boxes, torch_dtype
from megatron_adapt.config import AverageCheckpoints, ExpandBlocks, StripCheckpoint
from megatron_adapt.errors import CheckpointError, ConfigError
from megatron_adapt.files import STAGE_FILE, write_stage

_OUTPUT_PROJECTIONS = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")
_logger = logging.getLogger(__name__)

_Opened = tuple[Path, Description, DistReader]
"Iteration, what it says of itself, its tensors."


def strip_checkpoint(config: StripCheckpoint) -> None:
    """Write the weights of ``config.source`` alone.

    Raises:
        CheckpointError: the source is incomplete.
        ConfigError: the output exists.
    """
    opened = _open(config.source)
    _, description, source = opened
    dtype = description.dtype if config.dtype == "keep" else config.dtype
    stripped = dataclasses.replace(description, step=0, dtype=dtype)
    specs = _spec(source, description, None if config.dtype == "keep" else torch_dtype(config.dtype))
    _write(config, [opened], stripped, specs, source.read, max_file_bytes=config.max_file_mib << 20)


def average_checkpoints(config: AverageCheckpoints) -> None:
    """Write the mean of the weights of ``config.sources``.

    Raises:
        CheckpointError: a source is incomplete, or is another model than the first.
        ConfigError: the output exists.
    """
    opened = [_open(path) for path in config.sources]
    (first, description, source), *others = opened
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

    _write(config, opened, dataclasses.replace(description, step=0), _spec(source, description, None), read_mean)


def expand_blocks(config: ExpandBlocks) -> None:
    """Write ``config.source`` with ``config.blocks`` more blocks, evenly spread.

    Raises:
        CheckpointError: the source is incomplete.
        ConfigError: the output exists, or the blocks do not divide the layers.
    """
    opened = _open(config.source)
    _, description, source = opened
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
        one, blocks = (1, *sizes[1:]), range(offsets[0], offsets[0] + sizes[0])
        zeros = torch.zeros(one, dtype=specs[key].dtype)
        is_zero = [is_new[block] and key.endswith(_OUTPUT_PROJECTIONS) for block in blocks]
        read = [source.read(key, (copied[block], *offsets[1:]), one) for block in blocks]
        return torch.cat([zeros if empty else values for empty, values in zip(is_zero, read, strict=True)])

    new_blocks = tuple(block for block, new in enumerate(is_new) if new)
    expanded = dataclasses.replace(description, shape=shape, step=0, new_blocks=new_blocks)
    _write(config, [opened], expanded, specs, read_expanded, copied=copied)


def list_blocks(num_layers: int, num_new: int) -> tuple[list[int], list[bool]]:
    """Return the old block that each block of an expanded model copies, and whether it is a new one."""
    size = num_layers // num_new
    copied, is_new = [], []
    for group in range(num_new):
        own = list(range(group * size, (group + 1) * size))
        copied += [*own, own[-1]]
        is_new += [*[False] * size, True]
    return copied, is_new


def _open(path: Path) -> _Opened:
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


def _write(
    config: StripCheckpoint | AverageCheckpoints | ExpandBlocks,
    opened: Sequence[_Opened],
    description: Description,
    specs: Mapping[str, TensorSpec],
    read: Callable[[str, tuple[int, ...], tuple[int, ...]], torch.Tensor],
    *,
    max_file_bytes: int | None = None,
    copied: Sequence[int] | None = None,
) -> None:
    """Write the root: tensors, description, the files that travel with them, and the record."""
    folders = [folder for folder, _, _ in opened]
    companions = folders[0].parent / HF_FOLDER
    files = [file for _, _, source in opened for file in source.files]
    sizes = (slices.SLICE_BYTES, slices.CHUNK_BYTES, max_file_bytes)
    plan = fingerprint_plan(type(config).__name__, description.to_dict(), sizes, files=files)
    num_bytes = count_dist_bytes(specs, description.shape.num_layers)
    with continue_folder(config.output, overwrite=config.overwrite, plan=plan, num_bytes=num_bytes) as partial:
        release = partial.folder / RELEASE
        release.mkdir(exist_ok=True)
        _write_tensors(release, specs, read, description.shape.num_layers, max_file_bytes, partial)
        write_description(release, description)
        if companions.is_dir():
            hf_config = _adapt_config(read_config(companions), description, copied)
            tokenizer = find_tokenizer(None, companions)
            write_companions(partial.folder / HF_FOLDER, config=hf_config, source=companions, tokenizer=tokenizer)
        write_latest(partial.folder, None)
        counts = {"parameters": description.shape.num_parameters, "new_blocks": list(description.new_blocks)}
        write_stage(partial.folder / STAGE_FILE, config=config, inputs=folders, counts=counts)
    _logger.info("%s: weights of %s parameters", config.output, f"{counts['parameters']:,}")


def _write_tensors(
    target: Path,
    specs: Mapping[str, TensorSpec],
    read: Callable[[str, tuple[int, ...], tuple[int, ...]], torch.Tensor],
    num_layers: int,
    max_file_bytes: int | None,
    progress: PartialFolder,
) -> None:
    with DistWriter(target, specs, max_file_bytes) as writer:
        for key, spec in specs.items():
            for offsets, sizes in list_boxes(spec, slices.CHUNK_BYTES):
                writer.reserve(key, offsets, sizes)

        def copy_part(part: Part, _: torch.Tensor) -> int:
            values = read(part.name, part.offsets, part.sizes).to(specs[part.name].dtype)
            writer.write_values(part.name, part.chunk, part.start, values)
            return values.nbytes

        write_model(
            "writing weights",
            writer,
            matrices={},
            write_matrix=lambda key: None,
            parts=[part for key, spec in specs.items() for part in cut_parts(key, spec)],
            copy_part=copy_part,
            total_bytes=sum(spec.num_bytes for spec in specs.values()),
            progress=progress,
        )
        writer.write_release_state(num_layers)


def _adapt_config(config: dict[str, Any], description: Description, copied: Sequence[int] | None) -> dict[str, Any]:
    changed: dict[str, Any] = {key: description.dtype for key in ("dtype", "torch_dtype") if key in config}
    if copied is not None:
        changed["num_hidden_layers"] = len(copied)
        if "layer_types" in config:
            changed["layer_types"] = [config["layer_types"][layer] for layer in copied]
    return {**config, **changed}
