"""Give a Megatron checkpoint the rows of a new tokenizer, its optimizer included, without a conversion.

Reads: a checkpoint root (its latest step) with the tokenizer that travels with it, and the new tokenizer. Writes: a
root of the same step with the new tokenizer. Guarantees: as ``resize``; the layout of the run that wrote it does not
matter, nor that of the run that reads it; padding rows are made anew; every state of the optimizer is resized with its
matrix.

1. ``_find_role`` sorts the tensors: copied as they are, weights, fp32 masters, moments.
2. ``_write_matrix`` copies the rows of tokens that stay, fills new rows and padding, block by block. Weights whose
   master is there are filled from the master, so that the two say the same.
3. New rows and padding of a moment are zero, as for a parameter that was never updated.

Cost: one copy of the checkpoint; memory of one 4 MiB block and one chunk of new rows.
"""

import dataclasses
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from megatron_adapt.checkpoint.companions import find_tokenizer, write_companions
from megatron_adapt.checkpoint.dist import DistReader, DistWriter
from megatron_adapt.checkpoint.hf import read_config
from megatron_adapt.checkpoint.layout import check_megatron_tensors, list_rules
from megatron_adapt.checkpoint.root import (
    HF_FOLDER,
    RELEASE,
    find_checkpoint,
    read_description,
    write_description,
    write_latest,
)
from megatron_adapt.checkpoint.values import TensorSpec, list_row_blocks
from megatron_adapt.config import ResizeVocab
from megatron_adapt.errors import CheckpointError
from megatron_adapt.files import STAGE_FILE, replace_folder, write_stage
from megatron_adapt.logs import Advance, show_progress
from megatron_adapt.shape import pad_vocab_size
from megatron_adapt.tokenizer.id_map import IdMap, read_id_map
from megatron_adapt.tokenizer.pieces import read_tokenizer
from megatron_adapt.vocab.fill import FILL_METHODS
from megatron_adapt.vocab.fit import check_fit, list_runs, renumber_companions

_logger = logging.getLogger(__name__)
_STATE = "optimizer.state."
_MASTER, _MOMENTS = "param", ("exp_avg", "exp_avg_sq")
Role = Literal["copied", "filled", "moment"]


@dataclass(frozen=True)
class _MatrixRows:
    """``BaseRows`` of a matrix in a Megatron checkpoint."""

    source: DistReader
    key: str
    num_rows: int
    width: int

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
        ConfigError: the output exists.
        DataError: the tokenizer folder is incomplete.
    """
    folder = find_checkpoint(config.model)
    description, source = read_description(folder), DistReader(folder)
    check_megatron_tensors(source.shape, description.shape, description.padded_vocab_size, str(folder))
    companions = folder.parent / HF_FOLDER
    tokenizer = read_tokenizer(config.tokenizer)
    id_map = read_id_map(tokenizer)
    check_fit(folder, description.true_vocab_size, find_tokenizer(None, companions), tokenizer, id_map)
    resized = dataclasses.replace(
        description,
        shape=dataclasses.replace(description.shape, vocab_size=id_map.vocab_size),
        true_vocab_size=id_map.vocab_size,
        padded_vocab_size=pad_vocab_size(id_map.vocab_size, config.vocab_pad_multiple),
        tokenizer_fingerprint=tokenizer.fingerprint,
    )
    matrices = {rule.megatron for rule in list_rules(description.shape) if rule.kind == "vocab"}
    roles = {key: _find_role(key, matrices, folder) for key in source.keys}
    with replace_folder(config.output, overwrite=config.overwrite) as partial:
        target = partial / folder.name
        target.mkdir()
        _write_tensors(source, target, roles, id_map, resized.padded_vocab_size, config.settings.method)
        write_description(target, resized)
        for extra in sorted(folder.glob("*.json")):
            if not (target / extra.name).exists():
                shutil.copyfile(extra, target / extra.name)
        hf_config = {**read_config(companions), "vocab_size": id_map.vocab_size}
        write_companions(partial / HF_FOLDER, config=hf_config, source=companions, tokenizer=tokenizer)
        renumber_companions(partial / HF_FOLDER, id_map)
        write_latest(partial, None if folder.name == RELEASE else description.step)
        counts = {
            "base_vocab_size": id_map.base_vocab_size,
            "vocab_size": id_map.vocab_size,
            "padded_vocab_size": resized.padded_vocab_size,
            "moved_rows": len(id_map.moved),
            "new_rows": len(id_map.pieces),
            "matrices": sum(role != "copied" for role in roles.values()),
        }
        write_stage(partial / STAGE_FILE, config=config, inputs=[folder, config.tokenizer], counts=counts)
    _logger.info(
        "%s: %d matrices of %d rows, %d new", config.output, counts["matrices"], id_map.vocab_size, len(id_map.pieces)
    )


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


def _write_tensors(
    source: DistReader, target: Path, roles: dict[str, Role], id_map: IdMap, padded_size: int, method: str
) -> None:
    specs = {}
    for key, role in roles.items():
        shape = source.shape(key)
        assert shape is not None, key
        specs[key] = TensorSpec(shape if role == "copied" else (padded_size, *shape[1:]), source.dtype(key))
    total = sum(spec.num_bytes for spec in specs.values()) / 1e6
    with show_progress("resizing", total, "MB") as advance, DistWriter(target, specs) as writer:
        for key, spec in specs.items():
            if roles[key] == "copied":
                _copy_tensor(source, writer, key, spec, advance)
            else:
                _write_matrix(source, writer, key, spec, id_map, method if roles[key] == "filled" else None, advance)
        for key in source.object_keys:
            writer.copy_object(key, source)
        writer.write_common(source.read_common())


def _copy_tensor(source: DistReader, writer: DistWriter, key: str, spec: TensorSpec, advance: Advance) -> None:
    for start, stop in list_row_blocks(spec):
        offsets = (start, *[0] * (len(spec.shape) - 1))
        rows = source.read(key, offsets, (stop - start, *spec.shape[1:]))
        writer.write(key, offsets, rows)
        advance(rows.nbytes / 1e6)


def _write_matrix(
    source: DistReader,
    writer: DistWriter,
    key: str,
    spec: TensorSpec,
    id_map: IdMap,
    method: str | None,
    advance: Advance,
) -> None:
    """Write one vocabulary matrix; ``method`` None fills new rows and padding with zeros."""
    width = spec.shape[1]
    padding_H = torch.zeros(width, dtype=torch.float64)
    new_rows: Iterator[tuple[int, torch.Tensor]] = iter(())
    if method is not None:
        master = f"{_STATE}{_MASTER}.{key}"
        base = _MatrixRows(source, master if source.shape(master) else key, id_map.base_vocab_size, width)
        padding_H = base.mean()
        new_rows = _iterate_rows(method, base, id_map)
    upcoming = next(new_rows, None)
    for start, stop in list_row_blocks(spec):
        rows_NH = torch.zeros(stop - start, width, dtype=spec.dtype)
        for new, old, count in list_runs(id_map, start, stop):
            rows_NH[new - start : new - start + count] = source.read(key, (old, 0), (count, width))
        while upcoming and upcoming[0] < stop:
            rows_NH[upcoming[0] - start] = upcoming[1].to(spec.dtype)
            upcoming = next(new_rows, None)
        rows_NH[max(0, id_map.vocab_size - start) :] = padding_H.to(spec.dtype)
        writer.write(key, (start, 0), rows_NH)
        advance(rows_NH.nbytes / 1e6)


def _iterate_rows(method: str, base: _MatrixRows, id_map: IdMap) -> Iterator[tuple[int, torch.Tensor]]:
    for ids, rows_NH in FILL_METHODS[method](base, id_map.pieces):
        yield from zip(ids, rows_NH, strict=True)
