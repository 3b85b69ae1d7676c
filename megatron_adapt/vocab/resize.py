"""Give a Hugging Face model the rows of an extended tokenizer.

Reads: a model folder with its tokenizer, and the folder of the extended tokenizer with ``added_pieces.json``. Writes:
a model folder with the new tokenizer. Guarantees: rows are written by token id, never as a tail slice; old rows and
all other tensors are copied byte by byte; input matrix and output head are filled separately, from their own rows.

1. ``_read_pieces`` reads which old pieces spelt each new token, and checks that every new id is there once;
2. ``_check_fit`` refuses a tokenizer that was not made from this model's;
3. ``_write_weights`` copies all tensors block by block, the vocabulary matrices up to the old tokenizer's size;
4. ``_fill_matrix`` writes the new rows (``fill``). Spare rows beyond the old tokenizer are overwritten or dropped.

Cost: time of one copy plus one read of the old rows used; memory of one 64 MiB block and one chunk of new rows.
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
from megatron_adapt.errors import CheckpointError, DataError
from megatron_adapt.files import STAGE_FILE, read_json, replace_folder, write_stage
from megatron_adapt.logs import Advance, show_progress
from megatron_adapt.shape import LlamaShape
from megatron_adapt.tokenizer.extend import ADDED_FILE
from megatron_adapt.tokenizer.pieces import LoadedTokenizer, read_tokenizer
from megatron_adapt.vocab.fill import FILL_METHODS

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
        CheckpointError: the model is incomplete, a Megatron checkpoint, or does not fit the tokenizer.
        ConfigError: the model is not supported, or the output exists.
        DataError: the tokenizer folder is incomplete.
    """
    if is_megatron_checkpoint(config.model):
        raise CheckpointError(
            f"--model: {config.model} is a Megatron checkpoint; convert it (tools/convert_checkpoint.py --to hf), "
            "resize that folder, and convert it back (--to megatron)"
        )
    shape = read_hf_shape(config.model)
    source = HFFolder(config.model)
    check_hf_tensors({name: source.shape(name) for name in source.names}, shape, str(config.model))
    tokenizer = read_tokenizer(config.tokenizer)
    base_size, pieces = _read_pieces(config.tokenizer, tokenizer)
    _check_fit(config.model, shape, tokenizer, base_size)
    with replace_folder(config.output, overwrite=config.overwrite) as partial:
        _write_weights(source, partial, shape, base_size, tokenizer.vocab_size, pieces, config.settings.method)
        hf_config = {**read_config(config.model), "vocab_size": tokenizer.vocab_size}
        write_companions(partial, config=hf_config, source=config.model, tokenizer=tokenizer)
        counts = {"base_vocab_size": base_size, "vocab_size": tokenizer.vocab_size, "new_rows": len(pieces)}
        write_stage(partial / STAGE_FILE, config=config, inputs=[config.model, config.tokenizer], counts=counts)
    _logger.info("%s: %d rows kept, %d filled by %s", config.output, base_size, len(pieces), config.settings.method)


def _read_pieces(folder: Path, tokenizer: LoadedTokenizer) -> tuple[int, dict[int, list[int]]]:
    """Read ``added_pieces.json``: size of the base tokenizer, and new id to old ids, in the order of the new ids."""
    path = folder / ADDED_FILE
    if not path.is_file():
        raise DataError(
            f"{folder}: no {ADDED_FILE}, so it is unknown how its new tokens were spelt; "
            "make the tokenizer with tools/build_tokenizer.py"
        )
    content = read_json(path)
    try:
        base_size = int(content["base_vocab_size"])
        pieces = {int(new): [int(old) for old in olds] for new, olds in content["pieces"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise DataError(f"{path}: not of the form that tools/build_tokenizer.py writes; make it again") from None
    if tokenizer.vocab_size < base_size:
        raise DataError(
            f"{folder}: tokenizer has {tokenizer.vocab_size} tokens, its base had {base_size}; "
            "old ids may never go, make it again with tools/build_tokenizer.py"
        )
    expected = range(base_size, tokenizer.vocab_size)
    if sorted(pieces) != list(expected):
        raise DataError(
            f"{path}: names {len(pieces)} new ids, the tokenizer has {len(expected)} beyond its base's {base_size}; "
            "the two files do not belong together, make both again with tools/build_tokenizer.py"
        )
    wrong = [new for new, olds in pieces.items() if any(not 0 <= old < base_size for old in olds)]
    if wrong:
        raise DataError(f"{path}: new id {wrong[0]} is spelt with an id that is not below {base_size}; make it again")
    return base_size, {new: pieces[new] for new in expected}


def _check_fit(model: Path, shape: LlamaShape, tokenizer: LoadedTokenizer, base_size: int) -> None:
    """Refuse a tokenizer that was not made from the one of this model."""
    own = find_tokenizer(None, model)
    # Spare rows beyond the model's own tokenizer are common; without that tokenizer they cannot be told from lost ones.
    fits = shape.vocab_size == base_size if own is None else own.vocab_size == base_size <= shape.vocab_size
    if not fits:
        said = "" if own is None else f" (its tokenizer {own.vocab_size} tokens)"
        raise CheckpointError(
            f"{model}: has {shape.vocab_size} vocabulary rows{said}, but {tokenizer.folder} was made from a base of "
            f"{base_size} tokens; build the tokenizer from this model's: tools/build_tokenizer.py --base {model}"
        )
    if own is None:
        return
    for index in range(base_size):
        old, new = own.tokenizer.id_to_token(index), tokenizer.tokenizer.id_to_token(index)
        if old != new:
            raise CheckpointError(
                f"{tokenizer.folder}: id {index} is {new!r}, in the model's tokenizer {old!r}; "
                f"build the tokenizer from this model's: tools/build_tokenizer.py --base {model}"
            )


def _write_weights(
    source: HFFolder,
    target: Path,
    shape: LlamaShape,
    base_size: int,
    vocab_size: int,
    pieces: dict[int, list[int]],
    method: str,
) -> None:
    matrices = [EMBEDDING] if shape.tied else [EMBEDDING, HEAD]
    specs = {name: source.specs[name] for name in source.names if not (shape.tied and name == HEAD)}
    for name in matrices:
        specs[name] = TensorSpec((vocab_size, shape.hidden_size), source.dtype(name))
    total = sum(spec.num_bytes for spec in specs.values()) / 1e6
    with show_progress("resizing", total, "MB") as advance, HFWriter(target, specs) as writer:
        for name, spec in specs.items():
            kept = base_size if name in matrices else spec.shape[0]
            for start, stop in list_row_blocks(TensorSpec((kept, *spec.shape[1:]), spec.dtype)):
                rows = source.read_rows(name, start, stop)
                writer.write_rows(name, start, rows)
                advance(rows.nbytes / 1e6)
            if name in matrices:
                _fill_matrix(_MatrixRows(source, name, base_size), writer, spec, pieces, method, advance)


def _fill_matrix(
    base: _MatrixRows,
    writer: HFWriter,
    spec: TensorSpec,
    pieces: dict[int, list[int]],
    method: str,
    advance: Advance,
) -> None:
    for ids, rows_NH in FILL_METHODS[method](base, pieces):
        rows = rows_NH.to(spec.dtype)
        for new, row_H in zip(ids, rows, strict=True):
            writer.write_rows(base.name, new, row_H[None])
        advance(rows.nbytes / 1e6)
