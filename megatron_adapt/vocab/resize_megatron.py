"""Give a Megatron checkpoint the rows of a new tokenizer, its optimizer included, without a conversion.

Reads: a checkpoint root (its latest step) with the tokenizer that travels with it, and the new tokenizer. Writes: a
root of the same step with the new tokenizer; of a checkpoint of another program (``opened``) the weights alone, as
``release``. Guarantees: as ``resize``; the layout of the run that wrote it does not
matter, nor that of the run that reads it; padding rows are made anew; every state of the optimizer is resized with its
matrix.

1. ``_find_role`` sorts the tensors: copied as they are, weights, fp32 masters, moments.
2. ``continue_folder`` checks the free space and finds what an earlier run left; ``_list_chunks`` cuts the tensors.
3. ``_write_matrix`` copies the rows of tokens that stay, fills new rows and padding, block by block. Weights whose
   master is there are filled from the master, so that the two say the same.
4. New rows and padding of a moment are zero, as for a parameter that was never updated.
5. All other tensors are copied slice by slice (``parts``).
6. A stage with ``carry_optimizer`` goes on from the output, on text that the new tokenizer has cut; the plan and the
   cursors of the old run, which count its windows, stay behind.

Cost: one copy of the checkpoint; memory of a few slices of 2 MiB and one chunk of new rows.
"""

import dataclasses
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from megatron_adapt.checkpoint import slices
from megatron_adapt.checkpoint.assemble import Source
from megatron_adapt.checkpoint.companions import write_companions
from megatron_adapt.checkpoint.dist import FORMAT_FILE, MAX_FILE_BYTES, DistReader, DistWriter
from megatron_adapt.checkpoint.estimate import count_dist_bytes, write_estimate
from megatron_adapt.checkpoint.intact import FILES_FILE
from megatron_adapt.checkpoint.layout import list_rules
from megatron_adapt.checkpoint.opened import OpenedCheckpoint, open_checkpoint
from megatron_adapt.checkpoint.parts import Part, cut_parts, write_model
from megatron_adapt.checkpoint.resume import PartialFolder, continue_folder, fingerprint_plan
from megatron_adapt.checkpoint.root import (
    DESCRIPTION_FILE,
    HF_FOLDER,
    RELEASE,
    Description,
    write_description,
    write_latest,
)
from megatron_adapt.checkpoint.values import TensorSpec, list_boxes, list_row_blocks
from megatron_adapt.config import ResizeVocab
from megatron_adapt.errors import CheckpointError
from megatron_adapt.files import STAGE_FILE, read_json, write_json, write_stage
from megatron_adapt.run_folder import PLAN_FILE, TRAINING_FILE
from megatron_adapt.shape import pad_vocab_size
from megatron_adapt.tokenizer.id_map import MAP_FILE, IdMap, read_id_map
from megatron_adapt.tokenizer.pieces import LoadedTokenizer, read_tokenizer
from megatron_adapt.vocab.fill import count_fill_bytes, plan_fill
from megatron_adapt.vocab.fit import check_fit, list_runs, renumber_companions
from megatron_adapt.vocab.rows import Fill, FillSources

_logger = logging.getLogger(__name__)
_STATE = "optimizer.state."
_HEAD = "output_layer.weight"
_MASTER, _MOMENTS = "param", ("exp_avg", "exp_avg_sq")
_MASTER_BYTES = 4
_MAX_FILES = 256
"All stay open while they are written, and systems allow a process about 1000; 70B with its optimizer are 973 GB."
Role = Literal["copied", "filled", "moment"]


@dataclass(frozen=True)
class _MatrixRows:
    """``BaseRows`` of a matrix in a Megatron checkpoint."""

    source: Source
    key: str
    num_rows: int
    width: int

    @property
    def is_head(self) -> bool:
        return self.key.endswith(_HEAD)

    def read(self, start: int, stop: int) -> torch.Tensor:
        return self.source.read(self.key, (start, 0), (stop - start, self.width))

    def gather(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.cat([self.source.read(self.key, (index, 0), (1, self.width)) for index in ids])

    def mean(self) -> torch.Tensor:
        total_H = torch.zeros(self.width, dtype=torch.float64)
        for start, stop in list_row_blocks(TensorSpec((self.num_rows, self.width), torch.float64)):
            total_H += self.source.read(self.key, (start, 0), (stop - start, self.width)).double().sum(0)
        return total_H / self.num_rows


def resize_megatron(config: ResizeVocab) -> None:
    """Write the checkpoint with one row per token of the new tokenizer.

    Raises:
        CheckpointError: the checkpoint is incomplete, does not fit the tokenizer, or has a state that is not known.
        ConfigError: the output exists, or there is too little space.
        DataError: the tokenizer folder is incomplete.
    """
    tokenizer = read_tokenizer(config.tokenizer)
    id_map = read_id_map(tokenizer)
    opened = open_checkpoint(config.model, vocab_size=id_map.base_vocab_size)
    folder, description, source = opened.folder, opened.description, opened.source
    check_fit(folder, description.true_vocab_size, opened.tokenizer, tokenizer, id_map)
    fill = plan_fill(FillSources.of(config, own=opened.tokenizer, made=tokenizer, id_map=id_map))
    resized = dataclasses.replace(
        description,
        shape=dataclasses.replace(description.shape, vocab_size=id_map.vocab_size),
        true_vocab_size=id_map.vocab_size,
        padded_vocab_size=pad_vocab_size(id_map.vocab_size, config.vocab_pad_multiple),
        tokenizer_fingerprint=tokenizer.fingerprint,
        step=description.step if opened.is_own else 0,
    )
    matrices = {rule.megatron for rule in list_rules(description.shape) if rule.kind == "vocab"}
    roles = {key: _find_role(key, matrices, folder) for key in source.keys}
    specs = _spec(source, roles, resized.padded_vocab_size)
    num_bytes = count_dist_bytes(specs, description.shape.num_layers)
    if config.dry_run:
        write_estimate(
            f"{folder} to {id_map.vocab_size} tokens",
            source.files,
            config.output,
            overwrite=config.overwrite,
            num_bytes=num_bytes,
            num_files=-(-num_bytes // _choose_file_bytes(num_bytes)),
            work_bytes=count_fill_bytes(config.settings, id_map.pieces, description.shape.hidden_size, _MASTER_BYTES),
        )
        return
    read = [*source.files, tokenizer.folder / MAP_FILE, *config.list_sources()]
    inputs = [folder, config.tokenizer, *config.list_sources()]
    sizes = (slices.SLICE_BYTES, slices.CHUNK_BYTES)
    plan = fingerprint_plan("megatron", resized.to_dict(), config.settings, sizes, files=read)
    with continue_folder(config.output, overwrite=config.overwrite, plan=plan, num_bytes=num_bytes) as partial:
        target = partial.folder / (folder.name if opened.is_own else RELEASE)
        target.mkdir(exist_ok=True)
        num_layers = description.shape.num_layers
        _write_tensors(source, target, specs, roles, id_map, fill, num_layers, partial)
        _write_small_files(opened, target, resized, tokenizer, id_map)
        counts = {
            "base_vocab_size": id_map.base_vocab_size,
            "vocab_size": id_map.vocab_size,
            "padded_vocab_size": resized.padded_vocab_size,
            "moved_rows": len(id_map.moved),
            "new_rows": len(id_map.pieces),
            "matrices": sum(role != "copied" for role in roles.values()),
        }
        write_stage(partial.folder / STAGE_FILE, config=config, inputs=inputs, counts=counts)
    _logger.info(
        "%s: %d matrices of %d rows, %d new", config.output, counts["matrices"], id_map.vocab_size, len(id_map.pieces)
    )


def _write_small_files(
    opened: OpenedCheckpoint, target: Path, resized: Description, tokenizer: LoadedTokenizer, id_map: IdMap
) -> None:
    """Write what says what the tensors are, beside them and in the root."""
    write_description(target, resized)
    for extra in sorted(opened.folder.glob("*.json")) if opened.is_own else []:
        if extra.name == TRAINING_FILE:
            # Text is tokenised anew: where the run stood in its token files says nothing any more.
            training = {name: value for name, value in read_json(extra).items() if name != "cursors"}
            write_json(target / extra.name, {**training, "tokenizer_fingerprint": tokenizer.fingerprint})
        elif extra.name not in (FORMAT_FILE, DESCRIPTION_FILE, PLAN_FILE, FILES_FILE):
            shutil.copyfile(extra, target / extra.name)
    root, named = target.parent, {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    # A config that was made of the settings of a run may name no ids; all are renumbered below.
    ids = {name: id_map.old_id(index) for name, index in named.items() if index is not None}
    hf_config = {**ids, **opened.hf_config, "vocab_size": id_map.vocab_size}
    write_companions(root / HF_FOLDER, config=hf_config, source=opened.companions, tokenizer=tokenizer)
    renumber_companions(root / HF_FOLDER, id_map)
    write_latest(root, None if target.name == RELEASE else resized.step)


def _find_role(key: str, matrices: set[str], where: Path) -> Role:
    if key in matrices:
        return "filled"
    state, _, name = key.removeprefix(_STATE).partition(".")
    if not key.startswith(_STATE) or name not in matrices:
        return "copied"
    if state == _MASTER:
        return "filled"
    if state in _MOMENTS:
        return "moment"
    raise CheckpointError(
        f"{where}: {key} is an optimizer state of the vocabulary that is not known; convert the weights alone: "
        "tools/convert_checkpoint.py --to hf"
    )


def _spec(source: Source, roles: dict[str, Role], padded_size: int) -> dict[str, TensorSpec]:
    """Return the tensors of the output, by key."""
    specs = {}
    for key, role in roles.items():
        shape = source.shape(key)
        assert shape is not None, key
        specs[key] = TensorSpec(shape if role == "copied" else (padded_size, *shape[1:]), source.dtype(key))
    return specs


def _write_tensors(
    source: Source,
    target: Path,
    specs: dict[str, TensorSpec],
    roles: dict[str, Role],
    id_map: IdMap,
    fill: Fill,
    num_layers: int,
    progress: PartialFolder,
) -> None:
    total_bytes = sum(spec.num_bytes for spec in specs.values())
    with DistWriter(target, specs, _choose_file_bytes(total_bytes)) as writer:
        for key, spec in specs.items():
            for offsets, sizes in _list_chunks(spec, roles[key]):
                writer.reserve(key, offsets, sizes)

        def write_matrix(key: str) -> None:
            _write_matrix(source, writer, key, specs[key], id_map, fill if roles[key] == "filled" else None)

        def copy_part(part: Part, buffer: torch.Tensor) -> int:
            values = source.read(part.name, part.offsets, part.sizes, buffer)
            writer.write_values(part.name, part.chunk, part.start, values)
            return values.nbytes

        write_model(
            "resizing",
            writer,
            matrices={key: spec for key, spec in specs.items() if roles[key] != "copied"},
            write_matrix=write_matrix,
            parts=[part for key, spec in specs.items() if roles[key] == "copied" for part in cut_parts(key, spec)],
            copy_part=copy_part,
            total_bytes=total_bytes,
            progress=progress,
        )
        if isinstance(source, DistReader):
            for key in source.object_keys:
                writer.copy_object(key, source)
            writer.write_common(source.read_common())
        else:
            writer.write_release_state(num_layers)


def _choose_file_bytes(num_bytes: int) -> int:
    """Return when to close a file of the output and begin another."""
    return max(MAX_FILE_BYTES, num_bytes // _MAX_FILES)


def _list_chunks(spec: TensorSpec, role: Role) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut a tensor into the chunks of the output."""
    if role == "copied":
        yield from list_boxes(spec, slices.CHUNK_BYTES)
        return
    for start, stop in list_row_blocks(spec):
        yield (start, 0), (stop - start, spec.shape[1])


def _write_matrix(
    source: Source,
    writer: DistWriter,
    key: str,
    spec: TensorSpec,
    id_map: IdMap,
    fill: Fill | None,
) -> None:
    """Write one vocabulary matrix; ``fill`` None fills new rows and padding with zeros."""
    width = spec.shape[1]
    padding_H = torch.zeros(width, dtype=torch.float64)
    new_rows: Iterator[tuple[int, torch.Tensor]] = iter(())
    if fill is not None:
        master = f"{_STATE}{_MASTER}.{key}"
        base = _MatrixRows(source, master if source.shape(master) else key, id_map.base_vocab_size, width)
        padding_H = base.mean()
        new_rows = _iterate_rows(fill, base)
    upcoming = next(new_rows, None)
    for start, stop in list_row_blocks(spec):
        rows_NH = torch.zeros(stop - start, width, dtype=spec.dtype)
        for new, old, count in list_runs(id_map, start, stop):
            rows_NH[new - start : new - start + count] = source.read(key, (old, 0), (count, width))
        while upcoming and upcoming[0] < stop:
            rows_NH[upcoming[0] - start] = upcoming[1].to(spec.dtype)
            upcoming = next(new_rows, None)
        rows_NH[max(0, id_map.vocab_size - start) :] = padding_H.to(spec.dtype)
        writer.write_values(key, (start, 0), 0, rows_NH)


def _iterate_rows(fill: Fill, base: _MatrixRows) -> Iterator[tuple[int, torch.Tensor]]:
    for ids, rows_NH in fill(base):
        yield from zip(ids, rows_NH, strict=True)
