"""Give a model the rows of a tokenizer made from its own.

Reads: a Hugging Face folder with its tokenizer (a Megatron checkpoint goes to ``resize_megatron``), and the folder of
the new tokenizer with ``added_pieces.json``. Writes: a model folder with the new tokenizer. Guarantees: rows are
written by token id, never as a tail slice; the row of a token that stays is copied byte by byte wherever its id moved,
and so are all other tensors; input matrix and output head are filled separately, from their own rows; killed and
started again, a resize goes on where it was and ends with the same bytes.

1. ``read_id_map`` says which old id each new id stands for, and which old pieces spell each new token;
2. ``check_fit`` refuses a tokenizer that was not made from this model's;
3. ``continue_folder`` checks the free space and finds what an earlier run left;
4. ``_write_matrix`` copies the rows of tokens that stay by id and fills the new ones (``fill``), a matrix at a time.
   Spare rows beyond the old tokenizer are dropped;
5. all other tensors are copied slice by slice (``parts``).

Cost: time of one copy plus one read of the old rows used; memory of a few slices of 2 MiB and one chunk of new rows.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_adapt.checkpoint import slices
from megatron_adapt.checkpoint.companions import find_tokenizer, write_companions
from megatron_adapt.checkpoint.estimate import count_hf_bytes, write_estimate
from megatron_adapt.checkpoint.hf import HFFolder, HFWriter, count_shards, read_config, read_hf_shape
from megatron_adapt.checkpoint.layout import EMBEDDING, HEAD, check_hf_tensors
from megatron_adapt.checkpoint.parts import Part, cut_rows, write_model
from megatron_adapt.checkpoint.resume import PartialFolder, continue_folder, fingerprint_plan
from megatron_adapt.checkpoint.root import is_megatron_checkpoint
from megatron_adapt.checkpoint.values import TensorSpec, list_row_blocks
from megatron_adapt.config import ResizeVocab
from megatron_adapt.files import STAGE_FILE, write_stage
from megatron_adapt.shape import LlamaShape
from megatron_adapt.tokenizer.id_map import MAP_FILE, IdMap, read_id_map
from megatron_adapt.tokenizer.pieces import read_tokenizer
from megatron_adapt.vocab.fill import count_fill_bytes, plan_fill
from megatron_adapt.vocab.fit import check_fit, list_runs, renumber_companions
from megatron_adapt.vocab.resize_megatron import resize_megatron
from megatron_adapt.vocab.rows import Fill, FillSources

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MatrixRows:
    """``BaseRows`` of a matrix in a Hugging Face folder."""

    source: HFFolder
    name: str
    num_rows: int

    @property
    def is_head(self) -> bool:
        """Whether this is an output head of its own."""
        return self.name == HEAD

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return the rows [start, stop): [stop - start, H]."""
        return self.source.read_rows(self.name, start, stop)

    def gather(self, ids: Sequence[int]) -> torch.Tensor:
        """Return the rows of ``ids``, in that order: [len(ids), H]."""
        return self.source.gather_rows(self.name, ids)

    def mean(self) -> torch.Tensor:
        """Return the mean of all rows that are finite: [H], fp64."""
        return self.source.read_mean_row(self.name, self.num_rows)


def resize_vocab(config: ResizeVocab) -> None:
    """Write the model with one row per token of the extended tokenizer.

    Raises:
        CheckpointError: the model is incomplete, or does not fit the tokenizer.
        ConfigError: the model is not supported, the output exists, or there is too little space.
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
    own = find_tokenizer(None, config.model)
    check_fit(config.model, shape.vocab_size, own, tokenizer, id_map)
    fill = plan_fill(FillSources.of(config, own=own, made=tokenizer, id_map=id_map))
    specs = list_specs(source, shape, id_map.vocab_size)
    num_bytes = count_hf_bytes(specs)
    if config.dry_run:
        write_estimate(
            f"{config.model} to {id_map.vocab_size} tokens",
            source.files,
            config.output,
            overwrite=config.overwrite,
            num_bytes=num_bytes,
            num_files=count_shards(specs),
            work_bytes=count_fill_bytes(
                config.settings, id_map.pieces, shape.hidden_size, source.dtype(EMBEDDING).itemsize
            ),
        )
        return
    read = [*source.files, tokenizer.folder / MAP_FILE, *config.list_sources()]
    inputs = [config.model, config.tokenizer, *config.list_sources()]
    plan = fingerprint_plan("hf", shape, tokenizer.fingerprint, config.settings, slices.SLICE_BYTES, files=read)
    with continue_folder(config.output, overwrite=config.overwrite, plan=plan, num_bytes=num_bytes) as partial:
        _write_weights(source, specs, id_map, fill, partial)
        hf_config = {**read_config(config.model), "vocab_size": tokenizer.vocab_size}
        write_companions(partial.folder, config=hf_config, source=config.model, tokenizer=tokenizer)
        renumber_companions(partial.folder, id_map)
        counts = {
            "base_vocab_size": id_map.base_vocab_size,
            "vocab_size": id_map.vocab_size,
            "moved_rows": len(id_map.moved),
            "new_rows": len(id_map.pieces),
        }
        write_stage(partial.folder / STAGE_FILE, config=config, inputs=inputs, counts=counts)
    kept = id_map.vocab_size - len(id_map.pieces)
    _logger.info("%s: %d rows kept, %d filled by %s", config.output, kept, len(id_map.pieces), config.settings.method)


def list_specs(source: HFFolder, shape: LlamaShape, vocab_size: int) -> dict[str, TensorSpec]:
    """Return the tensors of a model of ``shape`` with so many rows in its vocabulary matrices, by name."""
    specs = {name: source.specs[name] for name in source.names if not (shape.tied and name == HEAD)}
    for name in {EMBEDDING, HEAD} & set(specs):
        specs[name] = TensorSpec((vocab_size, shape.hidden_size), source.dtype(name))
    return specs


def _write_weights(
    source: HFFolder, specs: dict[str, TensorSpec], id_map: IdMap, fill: Fill, progress: PartialFolder
) -> None:
    matrices = {name: specs[name] for name in (EMBEDDING, HEAD) if name in specs}
    parts = [part for name, spec in specs.items() if name not in matrices for part in cut_rows(name, spec)]
    with HFWriter(progress.folder, specs) as writer:

        def write_matrix(name: str) -> None:
            _write_matrix(MatrixRows(source, name, id_map.base_vocab_size), writer, specs[name], id_map, fill)

        def copy_rows(part: Part, buffer: torch.Tensor) -> int:
            start = part.offsets[0]
            rows = source.read_rows(part.name, start, start + part.sizes[0], buffer)
            writer.write_rows(part.name, start, rows)
            return rows.nbytes

        write_model(
            "resizing",
            writer,
            matrices=matrices,
            write_matrix=write_matrix,
            parts=parts,
            copy_part=copy_rows,
            total_bytes=sum(spec.num_bytes for spec in specs.values()),
            progress=progress,
        )


def _write_matrix(base: MatrixRows, writer: HFWriter, spec: TensorSpec, id_map: IdMap, fill: Fill) -> None:
    """Copy the rows of the tokens that stay, in runs of neighbours, and fill those of the others."""
    for start, stop in list_row_blocks(spec):
        for new, old, count in list_runs(id_map, start, stop):
            writer.write_rows(base.name, new, base.source.read_rows(base.name, old, old + count))
    for ids, rows_NH in fill(base):
        for new, row_H in zip(ids, rows_NH.to(spec.dtype), strict=True):
            writer.write_rows(base.name, new, row_H[None])
