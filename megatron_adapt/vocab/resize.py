"""Give a model the rows of a tokenizer made from its own.

Reads: a Hugging Face folder with its tokenizer (a Megatron checkpoint goes to ``resize_megatron``), and the folder of
the new tokenizer with ``added_pieces.json``. Writes: a model folder with the new tokenizer. Guarantees: rows are
written by token id, never as a tail slice; the row of a token that stays is copied byte by byte wherever its id moved,
and so are all other tensors; input matrix and output head are filled separately, from their own rows.

1. ``read_id_map`` says which old id each new id stands for, and which old pieces spell each new token;
2. ``check_fit`` refuses a tokenizer that was not made from this model's;
3. ``_write_weights`` copies all tensors block by block, the rows of the vocabulary matrices by id (``_copy_rows``);
4. ``_fill_matrix`` writes the new rows (``fill``). Spare rows beyond the old tokenizer are dropped.

Cost: time of one copy plus one read of the old rows used; memory of one 4 MiB block and one chunk of new rows.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_adapt.checkpoint.companions import find_tokenizer, write_companions
from megatron_adapt.checkpoint.hf import HFFolder, HFWriter, read_config, read_hf_shape
from megatron_adapt.checkpoint.layout import EMBEDDING, HEAD, check_hf_tensors
from megatron_adapt.checkpoint.root import is_megatron_checkpoint
from megatron_adapt.checkpoint.values import TensorSpec, list_row_blocks
from megatron_adapt.config import ResizeVocab
from megatron_adapt.files import STAGE_FILE, replace_folder, write_stage
from megatron_adapt.logs import Advance, show_progress
from megatron_adapt.shape import LlamaShape
from megatron_adapt.tokenizer.id_map import IdMap, read_id_map
from megatron_adapt.tokenizer.pieces import read_tokenizer
from megatron_adapt.vocab.fill import FILL_METHODS
from megatron_adapt.vocab.fit import check_fit, list_runs, renumber_companions
from megatron_adapt.vocab.resize_megatron import resize_megatron

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _MatrixRows:
    """``BaseRows`` of a matrix in a Hugging Face folder."""

    source: HFFolder
    name: str
    num_rows: int

    def gather(self, ids: Sequence[int]) -> torch.Tensor:
        return self.source.gather_rows(self.name, ids)

    def mean(self) -> torch.Tensor:
        return self.source.read_mean_row(self.name, self.num_rows)


def resize_vocab(config: ResizeVocab) -> None:
    """Write the model with one row per token of the extended tokenizer.

    Raises:
        CheckpointError: the model is incomplete, or does not fit the tokenizer.
        ConfigError: the model is not supported, or the output exists.
        DataError: the tokenizer folder is incomplete.
    """
    if is_megatron_checkpoint(config.model):
        resize_megatron(config)
        return
    shape = read_hf_shape(config.model)
    source = HFFolder(config.model)
    check_hf_tensors({name: source.shape(name) for name in source.names}, shape, str(config.model))
    tokenizer = read_tokenizer(config.tokenizer)
    id_map = read_id_map(tokenizer)
    check_fit(config.model, shape.vocab_size, find_tokenizer(None, config.model), tokenizer, id_map)
    with replace_folder(config.output, overwrite=config.overwrite) as partial:
        _write_weights(source, partial, shape, id_map, config.settings.method)
        hf_config = {**read_config(config.model), "vocab_size": tokenizer.vocab_size}
        write_companions(partial, config=hf_config, source=config.model, tokenizer=tokenizer)
        renumber_companions(partial, id_map)
        counts = {
            "base_vocab_size": id_map.base_vocab_size,
            "vocab_size": id_map.vocab_size,
            "moved_rows": len(id_map.moved),
            "new_rows": len(id_map.pieces),
        }
        write_stage(partial / STAGE_FILE, config=config, inputs=[config.model, config.tokenizer], counts=counts)
    kept = id_map.vocab_size - len(id_map.pieces)
    _logger.info("%s: %d rows kept, %d filled by %s", config.output, kept, len(id_map.pieces), config.settings.method)


def _write_weights(source: HFFolder, target: Path, shape: LlamaShape, id_map: IdMap, method: str) -> None:
    matrices = [EMBEDDING] if shape.tied else [EMBEDDING, HEAD]
    specs = {name: source.specs[name] for name in source.names if not (shape.tied and name == HEAD)}
    for name in matrices:
        specs[name] = TensorSpec((id_map.vocab_size, shape.hidden_size), source.dtype(name))
    total = sum(spec.num_bytes for spec in specs.values()) / 1e6
    with show_progress("resizing", total, "MB") as advance, HFWriter(target, specs) as writer:
        for name, spec in specs.items():
            if name in matrices:
                _copy_rows(source, writer, name, spec, id_map, advance)
                _fill_matrix(_MatrixRows(source, name, id_map.base_vocab_size), writer, spec, id_map, method, advance)
                continue
            for start, stop in list_row_blocks(spec):
                rows = source.read_rows(name, start, stop)
                writer.write_rows(name, start, rows)
                advance(rows.nbytes / 1e6)


def _copy_rows(
    source: HFFolder, writer: HFWriter, name: str, spec: TensorSpec, id_map: IdMap, advance: Advance
) -> None:
    """Copy the rows of the tokens that stay, in runs of neighbours."""
    for start, stop in list_row_blocks(spec):
        for new, old, count in list_runs(id_map, start, stop):
            rows = source.read_rows(name, old, old + count)
            writer.write_rows(name, new, rows)
            advance(rows.nbytes / 1e6)


def _fill_matrix(
    base: _MatrixRows, writer: HFWriter, spec: TensorSpec, id_map: IdMap, method: str, advance: Advance
) -> None:
    for ids, rows_NH in FILL_METHODS[method](base, id_map.pieces):
        rows = rows_NH.to(spec.dtype)
        for new, row_H in zip(ids, rows, strict=True):
            writer.write_rows(base.name, new, row_H[None])
        advance(rows.nbytes / 1e6)
