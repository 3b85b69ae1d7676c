"""Convert a Hugging Face folder to a Megatron checkpoint and back, one tensor at a time.

Reads and writes: folders of ``hf`` and ``dist``, as laid out in ``root``. Guarantees: the output appears whole or not
at all; with ``dtype = "keep"`` a way there and back gives the same bytes; a Megatron checkpoint loads under any
tensor and pipeline layout. Neither megatron-core nor a process group nor a GPU takes part.

1. ``check_hf_tensors`` / ``check_megatron_tensors`` compare names and shapes with the config;
2. ``check_import_vocab`` / ``check_export_vocab`` compare the vocabulary with the tokenizer;
3. ``stream_to_megatron`` / ``stream_to_hf`` go through the rules of ``layout`` and layer by layer through the
   weights; vocabulary matrices are padded on the way in (with the mean of their rows: finite, never zero, and out
   of every loss) and cut to the true vocabulary on the way out;
4. ``verify`` on demand.

Cost: time of reading and writing once; memory of the largest layer tensor about twice, whatever the depth.
"""

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from megatron_adapt.checkpoint.companions import (
    change_config,
    check_export_vocab,
    check_import_vocab,
    find_tokenizer,
    write_card,
    write_companions,
)
from megatron_adapt.checkpoint.dist import DistReader, DistWriter
from megatron_adapt.checkpoint.hf import HFFolder, HFWriter, is_hf_folder, read_config, read_hf_shape
from megatron_adapt.checkpoint.layout import (
    EMBEDDING,
    TensorRule,
    check_hf_tensors,
    check_megatron_tensors,
    list_extra_states,
    list_parts,
    list_rules,
    merge_tensors,
    shape_hf,
    shape_megatron,
    split_tensor,
)
from megatron_adapt.checkpoint.root import (
    HF_FOLDER,
    RELEASE,
    Description,
    find_checkpoint,
    is_megatron_checkpoint,
    read_description,
    write_description,
    write_latest,
)
from megatron_adapt.checkpoint.values import TensorSpec, list_row_blocks
from megatron_adapt.config import ConvertCheckpoint
from megatron_adapt.errors import CheckpointError, ConfigError
from megatron_adapt.files import STAGE_FILE, replace_folder, write_stage
from megatron_adapt.logs import Advance, show_progress
from megatron_adapt.shape import LlamaShape, pad_vocab_size, read_shape

_logger = logging.getLogger(__name__)
_CHECKPOINT_VERSION = 3.0
"Tells Megatron-LM how query, key and value rows are ordered; see ``merge_qkv``."


def convert_checkpoint(config: ConvertCheckpoint) -> None:
    """Convert a checkpoint to the other format.

    Raises:
        CheckpointError: the source is incomplete, of the wrong format, or does not fit its tokenizer.
        ConfigError: the model is not supported, or the output exists.
    """
    if config.to == "megatron":
        _convert_to_megatron(config)
    else:
        _convert_to_hf(config)


def _convert_to_megatron(config: ConvertCheckpoint) -> None:
    if is_megatron_checkpoint(config.source):
        raise ConfigError(f"--source: {config.source} is a Megatron checkpoint already; add --to hf, or name another")
    shape = read_hf_shape(config.source)
    source = HFFolder(config.source)
    check_hf_tensors({name: source.shape(name) for name in source.names}, shape, str(config.source))
    tokenizer = find_tokenizer(config.tokenizer, config.source)
    check_import_vocab(tokenizer, shape.vocab_size, config.source)
    padded_vocab_size = pad_vocab_size(shape.vocab_size, config.settings.vocab_pad_multiple)
    dtype = _parse_dtype(config.settings.dtype)
    description = Description(
        shape=shape,
        true_vocab_size=shape.vocab_size,
        padded_vocab_size=padded_vocab_size,
        tokenizer_fingerprint=None if tokenizer is None else tokenizer.fingerprint,
        step=0,
        dtype=str(dtype or source.dtype(EMBEDDING)).removeprefix("torch."),
    )
    with replace_folder(config.output, overwrite=config.overwrite) as partial:
        release = partial / RELEASE
        release.mkdir()
        stream_to_megatron(source, release, shape, padded_vocab_size=padded_vocab_size, dtype=dtype)
        write_description(release, description)
        write_companions(
            partial / HF_FOLDER, config=read_config(config.source), source=config.source, tokenizer=tokenizer
        )
        write_latest(partial, None)
        if config.verify:
            _verify(config, config.source, release)
        _write_record(partial, config, description)


def _convert_to_hf(config: ConvertCheckpoint) -> None:
    if is_hf_folder(config.source) and not is_megatron_checkpoint(config.source):
        raise ConfigError(f"--source: {config.source} is a Hugging Face folder already; add --to megatron")
    source_folder = find_checkpoint(config.source)
    description = read_description(source_folder)
    source = DistReader(source_folder)
    shape, padded_vocab_size = description.shape, description.padded_vocab_size
    check_megatron_tensors(source.shape, shape, padded_vocab_size, str(source_folder))
    companions = source_folder.parent / HF_FOLDER
    hf_config = _read_travelling_config(companions, shape)
    tokenizer = find_tokenizer(config.tokenizer, companions)
    check_export_vocab(tokenizer, description, source_folder)
    dtype = _parse_dtype(config.settings.dtype)
    written = dtype or source.dtype(list_rules(shape)[0].megatron)
    name = str(written).removeprefix("torch.")
    with replace_folder(config.output, overwrite=config.overwrite) as partial:
        stream_to_hf(source, partial, shape, dtype=dtype)
        hf_config = change_config(hf_config, vocab_size=shape.vocab_size, dtype=name)
        write_companions(partial, config=hf_config, source=companions, tokenizer=tokenizer)
        write_card(partial, config.output.name, description)
        if config.verify:
            _verify(config, partial, source_folder)
        _write_record(partial, config, description)


def _read_travelling_config(companions: Path, shape: LlamaShape) -> dict[str, object]:
    """Read the config that travels with a Megatron checkpoint; only its vocabulary may differ from the weights."""
    hf_config = read_config(companions)
    said = read_shape({**hf_config, "vocab_size": shape.vocab_size}, str(companions))
    if said != shape:
        raise CheckpointError(f"{companions}: config.json is that of another model; copy the config the run began with")
    return hf_config


def stream_to_megatron(
    source: HFFolder, target: Path, shape: LlamaShape, *, padded_vocab_size: int, dtype: torch.dtype | None
) -> None:
    """Write the tensors of a Hugging Face folder as a ``torch_dist`` folder.

    Args:
        source: checked weights.
        target: existing empty folder.
        shape: the model.
        padded_vocab_size: rows of the vocabulary matrices in the output; the mean of the old rows fills them up.
        dtype: type to write, or None to keep that of the source.

    Raises:
        CheckpointError: ``dtype`` is None and tensors that share one Megatron tensor are of different types.
    """
    rules = list_rules(shape)
    specs = {
        rule.megatron: TensorSpec(
            shape_megatron(rule, shape, padded_vocab_size), dtype or _common_dtype(source, rule, shape)
        )
        for rule in rules
    }
    with _show_bytes(specs) as advance, DistWriter(target, specs) as writer:
        for rule in rules:
            spec = specs[rule.megatron]
            if rule.kind == "vocab":
                _pad_matrix(source, rule.hf[0], writer, rule.megatron, spec, advance)
                continue
            for layer in list_parts(rule, shape):
                parts = [source.read(name).to(spec.dtype) for name in rule.name_hf(layer)]
                merged = merge_tensors(rule, parts, shape)
                offsets = (layer, *[0] * merged.dim()) if rule.stacked else (0,) * merged.dim()
                writer.write(rule.megatron, offsets, merged[None] if rule.stacked else merged)
                advance(merged.nbytes / 1e6)
        for key in list_extra_states(shape.num_layers):
            writer.write_object(key, None)
        writer.write_common({"iteration": 0, "checkpoint_version": _CHECKPOINT_VERSION})


def _pad_matrix(source: HFFolder, name: str, writer: DistWriter, key: str, spec: TensorSpec, advance: Advance) -> None:
    num_rows = source.shape(name)[0]
    for start, stop in list_row_blocks(TensorSpec((num_rows, *spec.shape[1:]), spec.dtype)):
        writer.write(key, (start, 0), source.read_rows(name, start, stop).to(spec.dtype))
        advance((stop - start) * spec.num_bytes / spec.shape[0] / 1e6)
    num_padding = spec.shape[0] - num_rows
    if num_padding:
        mean_H = source.read_mean_row(name, num_rows).to(spec.dtype)
        writer.write(key, (num_rows, 0), mean_H.expand(num_padding, -1))


def stream_to_hf(source: DistReader, target: Path, shape: LlamaShape, *, dtype: torch.dtype | None) -> None:
    """Write the model tensors of a ``torch_dist`` folder as safetensors; the inverse of ``stream_to_megatron``.

    Args:
        source: checked checkpoint; keys that are no model tensors (optimizer, random states) are passed over.
        target: existing empty folder.
        shape: the model, with its true vocabulary: rows beyond it are padding and dropped.
        dtype: type to write, or None to keep that of the source.
    """
    specs = {
        name: TensorSpec(size, dtype or source.dtype(rule.megatron))
        for rule in list_rules(shape)
        for layer in list_parts(rule, shape)
        for name, size in zip(rule.name_hf(layer), shape_hf(rule, shape), strict=True)
    }
    with _show_bytes(specs) as advance, HFWriter(target, specs) as writer:
        for rule in list_rules(shape):
            if rule.kind == "vocab":
                spec = specs[rule.hf[0]]
                for start, stop in list_row_blocks(spec):
                    rows = source.read(rule.megatron, (start, 0), (stop - start, shape.hidden_size))
                    writer.write_rows(rule.hf[0], start, rows.to(spec.dtype))
                    advance(rows.nbytes / 1e6)
                continue
            for layer in list_parts(rule, shape):
                parts = split_tensor(rule, read_part(source, rule, layer), shape)
                for name, part in zip(rule.name_hf(layer), parts, strict=True):
                    writer.write(name, part.to(specs[name].dtype))
                    advance(specs[name].num_bytes / 1e6)


def read_part(source: DistReader, rule: TensorRule, layer: int) -> torch.Tensor:
    """Read the tensor of one layer from a Megatron checkpoint, without its layer axis."""
    if not rule.stacked:
        return source.read(rule.megatron)
    size = source.shape(rule.megatron)
    assert size is not None, rule.megatron
    return source.read(rule.megatron, (layer, *[0] * (len(size) - 1)), (1, *size[1:]))[0]


def _common_dtype(source: HFFolder, rule: TensorRule, shape: LlamaShape) -> torch.dtype:
    names = [name for layer in list_parts(rule, shape) for name in rule.name_hf(layer)]
    for name in names:
        if source.dtype(name) != source.dtype(names[0]):
            raise CheckpointError(
                f"{source.folder}: {name} is {source.dtype(name)}, {names[0]} is {source.dtype(names[0])}, but a "
                "Megatron checkpoint holds both in one tensor; choose a type: --dtype bfloat16"
            )
    return source.dtype(names[0])


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch type of a name such as "bfloat16"."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype), name
    return dtype


def _parse_dtype(name: str) -> torch.dtype | None:
    return None if name == "keep" else torch_dtype(name)


def _verify(config: ConvertCheckpoint, hf_folder: Path, megatron_folder: Path) -> None:
    # Only here are the engine and transformers needed; without them a conversion starts at once and stays small.
    from megatron_adapt.checkpoint.verify import verify_conversion

    verify_conversion(
        hf_folder,
        megatron_folder,
        output=config.to,
        logits=read_hf_shape(hf_folder).num_parameters <= config.settings.verify_logits_parameters,
    )


def _write_record(target: Path, config: ConvertCheckpoint, description: Description) -> None:
    counts = {
        "parameters": description.shape.num_parameters,
        "true_vocab_size": description.true_vocab_size,
        "padded_vocab_size": description.padded_vocab_size,
        "step": description.step,
    }
    inputs = [config.source] if config.tokenizer is None else [config.source, config.tokenizer]
    write_stage(target / STAGE_FILE, config=config, inputs=inputs, counts=counts)
    _logger.info("%s: %s checkpoint of %s parameters", config.output, config.to, f"{counts['parameters']:,}")


def _show_bytes(specs: Mapping[str, TensorSpec]) -> AbstractContextManager[Advance]:
    return show_progress("converting", sum(spec.num_bytes for spec in specs.values()) / 1e6, "MB")
