"""Convert a Hugging Face folder to a Megatron checkpoint and back, slice by slice.

Reads and writes: folders of ``hf`` and ``dist``, as laid out in ``root``; reads what other programs wrote, too
(``opened``). Guarantees: the output appears whole or not at all; killed and started again, a conversion goes on where
it was and ends with the same bytes; with ``dtype = "keep"`` a way there and back gives the same bytes; a Megatron
checkpoint loads under any tensor and pipeline layout. Neither megatron-core nor a process group nor a GPU takes part.

1. ``check_hf_tensors`` / ``check_megatron_tensors`` compare names and shapes with the config;
2. ``check_import_vocab`` / ``check_export_vocab`` compare the vocabulary with the tokenizer;
3. ``continue_folder`` checks the free space and finds what an earlier run left;
4. ``stream_to_megatron`` / ``stream_to_hf`` copy the slices (``stream``); vocabulary matrices are padded on the way in
   (with the mean of their rows: finite, never zero, and out of every loss) and cut to the true vocabulary on the way
   out; values that are not finite are reported by name (``finite``);
5. on the way out a model card (``card``) and checksums (``release``); ``verify`` on demand.

Cost: time of one copy; memory of a few slices of 2 MiB, whatever the size of the model.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_adapt.checkpoint.card import write_card
from megatron_adapt.checkpoint.companions import (
    change_config,
    check_export_vocab,
    check_import_vocab,
    find_tokenizer,
    write_companions,
)
from megatron_adapt.checkpoint.estimate import count_dist_bytes, count_dist_files, count_hf_bytes, write_estimate
from megatron_adapt.checkpoint.hf import HFFolder, count_shards, is_hf_folder, read_config, read_hf_shape
from megatron_adapt.checkpoint.layout import EMBEDDING, check_hf_tensors, list_rules
from megatron_adapt.checkpoint.opened import OpenedCheckpoint, open_checkpoint
from megatron_adapt.checkpoint.release import SUMS_FILE, sum_files
from megatron_adapt.checkpoint.resume import continue_folder, fingerprint_plan
from megatron_adapt.checkpoint.root import (
    HF_FOLDER,
    RELEASE,
    Description,
    is_megatron_checkpoint,
    write_description,
    write_latest,
)
from megatron_adapt.checkpoint.slices import CHUNK_BYTES, SLICE_BYTES
from megatron_adapt.checkpoint.stream import spec_hf, spec_megatron, stream_to_hf, stream_to_megatron
from megatron_adapt.checkpoint.values import torch_dtype
from megatron_adapt.config import ConvertCheckpoint
from megatron_adapt.errors import ConfigError
from megatron_adapt.files import STAGE_FILE, write_stage
from megatron_adapt.shape import pad_vocab_size

_logger = logging.getLogger(__name__)
_SIZES = (SLICE_BYTES, CHUNK_BYTES)
"Decide how the work is cut; a restart with others begins anew."


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
    specs = spec_megatron(source, shape, padded_vocab_size, dtype)
    description = Description(
        shape=shape,
        true_vocab_size=shape.vocab_size,
        padded_vocab_size=padded_vocab_size,
        tokenizer_fingerprint=None if tokenizer is None else tokenizer.fingerprint,
        step=0,
        dtype=str(dtype or source.dtype(EMBEDDING)).removeprefix("torch."),
    )
    num_bytes = count_dist_bytes(specs, shape.num_layers)
    if config.dry_run:
        _estimate(config, source.files, num_bytes, count_dist_files(num_bytes))
        return
    plan = fingerprint_plan(config.to, description.to_dict(), config.settings, _SIZES, files=source.files)
    with continue_folder(config.output, overwrite=config.overwrite, plan=plan, num_bytes=num_bytes) as partial:
        release = partial.folder / RELEASE
        release.mkdir(exist_ok=True)
        stream_to_megatron(source, release, shape, padded_vocab_size=padded_vocab_size, dtype=dtype, progress=partial)
        write_description(release, description)
        companions = partial.folder / HF_FOLDER
        write_companions(companions, config=read_config(config.source), source=config.source, tokenizer=tokenizer)
        write_latest(partial.folder, None)
        if config.verify:
            _verify(config, config.source, release)
        _write_record(partial.folder, config, description)


def _convert_to_hf(config: ConvertCheckpoint) -> None:
    if is_hf_folder(config.source) and not is_megatron_checkpoint(config.source):
        raise ConfigError(f"--source: {config.source} is a Hugging Face folder already; add --to megatron")
    opened = open_checkpoint(config.source, config.tokenizer)
    description, source, tokenizer = opened.description, opened.source, opened.tokenizer
    shape, companions = description.shape, opened.companions
    check_export_vocab(tokenizer, description, opened.folder)
    dtype = _parse_dtype(config.settings.dtype)
    specs = spec_hf(source, shape, dtype)
    num_bytes = count_hf_bytes(specs)
    if config.dry_run:
        _estimate(config, source.files, num_bytes, count_shards(specs))
        return
    fingerprint = None if tokenizer is None else tokenizer.fingerprint
    plan = fingerprint_plan(config.to, description.to_dict(), fingerprint, config.settings, _SIZES, files=source.files)
    with continue_folder(config.output, overwrite=config.overwrite, plan=plan, num_bytes=num_bytes) as partial:
        known = stream_to_hf(source, partial.folder, shape, dtype=dtype, progress=partial)
        name = str(dtype or source.dtype(list_rules(shape)[0].megatron)).removeprefix("torch.")
        hf_config = change_config(opened.hf_config, vocab_size=shape.vocab_size, dtype=name)
        write_companions(partial.folder, config=hf_config, source=companions, tokenizer=tokenizer)
        write_card(partial.folder, name=config.output.name, shape=shape, step=description.step)
        (partial.folder / SUMS_FILE).unlink(missing_ok=True)  # of a run that was killed behind it
        sum_files(partial.folder, known)
        if config.verify:
            _verify(config, partial.folder, opened)
        _write_record(partial.folder, config, description)


def _estimate(config: ConvertCheckpoint, files: Sequence[Path], num_bytes: int, num_files: int) -> None:
    title = f"{config.source} to {config.to}"
    write_estimate(title, files, config.output, overwrite=config.overwrite, num_bytes=num_bytes, num_files=num_files)


def _parse_dtype(name: str) -> torch.dtype | None:
    return None if name == "keep" else torch_dtype(name)


def _verify(config: ConvertCheckpoint, hf_folder: Path, megatron: Path | OpenedCheckpoint) -> None:
    # Only here are the engine and transformers needed; without them a conversion starts at once and stays small.
    from megatron_adapt.checkpoint.verify import verify_conversion

    verify_conversion(
        hf_folder,
        megatron,
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
