"""The small files beside the weights: config, generation config, tokenizer; and the vocabulary check.

Reads and writes Hugging Face folders. Guarantees: a config comes out as it went in, with only ``vocab_size`` and the
type of the weights changed; weights never leave with a tokenizer that they were not trained with.
"""

import logging
import shutil
from pathlib import Path
from typing import Any

from megatron_adapt.checkpoint.hf import CONFIG_FILE
from megatron_adapt.checkpoint.root import Description
from megatron_adapt.errors import CheckpointError
from megatron_adapt.files import write_json
from megatron_adapt.tokenizer.id_map import MAP_FILE
from megatron_adapt.tokenizer.pieces import LoadedTokenizer, copy_tokenizer, read_tokenizer

_logger = logging.getLogger(__name__)
GENERATION_FILE = "generation_config.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


def find_tokenizer(named: Path | None, beside: Path) -> LoadedTokenizer | None:
    """Read the tokenizer in ``named``, or the one ``beside`` the weights; None when these came without one.

    Raises:
        DataError: ``named`` holds no tokenizer.
    """
    if named is not None:
        return read_tokenizer(named)
    if any((beside / name).is_file() for name in _TOKENIZER_FILES):
        return read_tokenizer(beside)
    return None


def check_import_vocab(tokenizer: LoadedTokenizer | None, vocab_size: int, where: Path) -> None:
    """Refuse weights that have no row for some token; rows beyond the tokenizer are allowed and logged.

    Published models do have such rows, kept for alignment or for later tokens.

    Args:
        tokenizer: the tokenizer of the model.
        vocab_size: rows of the model's matrices.
        where: the folder of the weights, for messages.

    Raises:
        CheckpointError: the tokenizer is larger than the matrices.
    """
    if tokenizer is None:
        _logger.warning("%s: no tokenizer, so its %d vocabulary rows are taken unchecked", where, vocab_size)
    elif tokenizer.vocab_size > vocab_size:
        raise CheckpointError(
            f"{where}: its tokenizer {tokenizer.folder} has {tokenizer.vocab_size} tokens, the model only {vocab_size} "
            "rows; give the model rows for the new tokens with tools/resize_vocab.py"
        )
    elif tokenizer.vocab_size < vocab_size:
        spare = vocab_size - tokenizer.vocab_size
        _logger.info("%s: %d rows beyond the %d tokens are kept", where, spare, tokenizer.vocab_size)


def check_export_vocab(tokenizer: LoadedTokenizer | None, description: Description, where: Path) -> None:
    """Refuse to release weights with a tokenizer other than theirs.

    Args:
        tokenizer: the tokenizer that the release would carry.
        description: what the checkpoint says of itself.
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: the sizes differ (unless they did when this very tokenizer came with the weights), the
            tokenizer is another one of the same size, or it is missing.
    """
    true_size, known = description.true_vocab_size, description.tokenizer_fingerprint
    if tokenizer is None:
        if known is None:
            return
        raise CheckpointError(
            f"{where}: its tokenizer is missing from the hf folder beside it; name it: --tokenizer DIR"
        )
    is_same = tokenizer.fingerprint == known
    if tokenizer.vocab_size != true_size and not (is_same and tokenizer.vocab_size < true_size):
        raise CheckpointError(
            f"{where}: tokenizer {tokenizer.folder} has {tokenizer.vocab_size} tokens, the checkpoint's vocabulary "
            f"has {true_size}; name the tokenizer it was trained with: --tokenizer DIR"
        )
    if known is not None and not is_same:
        raise CheckpointError(
            f"{where}: tokenizer {tokenizer.folder} is not the one of the checkpoint, though both have "
            f"{true_size} tokens; name the tokenizer it was trained with: --tokenizer DIR"
        )


def write_companions(target: Path, *, config: dict[str, Any], source: Path, tokenizer: LoadedTokenizer | None) -> None:
    """Write config, generation config and tokenizer into the folder ``target``.

    Args:
        target: folder; made if missing.
        config: content of ``config.json``.
        source: folder that the generation config is copied from, if it has one.
        tokenizer: the tokenizer to copy, if there is one; the map of its new tokens goes with it.
    """
    target.mkdir(parents=True, exist_ok=True)
    write_json(target / CONFIG_FILE, config)
    if (source / GENERATION_FILE).is_file():
        shutil.copyfile(source / GENERATION_FILE, target / GENERATION_FILE)
    if tokenizer is not None:
        copy_tokenizer(tokenizer.folder, target)
        # A training that holds the old rows asks which rows are new.
        if (tokenizer.folder / MAP_FILE).is_file():
            shutil.copyfile(tokenizer.folder / MAP_FILE, target / MAP_FILE)


def change_config(config: dict[str, Any], *, vocab_size: int, dtype: str) -> dict[str, Any]:
    """Return a config with another vocabulary size and type of weights, everything else as it was.

    transformers 5 calls the type ``dtype``, transformers 4 ``torch_dtype``; the source's spelling stays. Where it
    says nothing of the type, transformers takes that of the weights.
    """
    types: dict[str, Any] = {key: dtype for key in ("dtype", "torch_dtype") if key in config}
    return {**config, "vocab_size": vocab_size, **types}
