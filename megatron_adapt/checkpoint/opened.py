"""A Megatron checkpoint of any origin, ready to be read: what model it is, its tensors, and what travels with it.

Reads: a ``torch_dist`` folder of this package (``adapt.json``), one of another program (``foreign``), or partitions
(``legacy``). The latter two say which model they are by the ``args`` of their run, or by ``hf/config.json`` beside
them; neither knows the true vocabulary, so the tokenizer has to tell it. Guarantees: all origins look the same from
here on.
"""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_adapt.checkpoint.arguments import make_hf_config, read_arguments
from megatron_adapt.checkpoint.assemble import Source
from megatron_adapt.checkpoint.companions import find_tokenizer
from megatron_adapt.checkpoint.dist import DistReader
from megatron_adapt.checkpoint.foreign import EMBEDDING_KEY, DistCheckpoint, ForeignCheckpoint
from megatron_adapt.checkpoint.hf import CONFIG_FILE, read_config
from megatron_adapt.checkpoint.layout import check_megatron_tensors
from megatron_adapt.checkpoint.legacy import LegacyCheckpoint
from megatron_adapt.checkpoint.root import (
    DESCRIPTION_FILE,
    HF_FOLDER,
    METADATA_FILE,
    Description,
    find_checkpoint,
    read_description,
)
from megatron_adapt.errors import CheckpointError
from megatron_adapt.shape import LlamaShape, pad_vocab_size, read_shape
from megatron_adapt.tokenizer.pieces import LoadedTokenizer

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenedCheckpoint:
    """A checkpoint whose tensors were found to be those of its model.

    Attributes:
        folder: the iteration.
        description: what it says of itself, or what was found out.
        source: its tensors.
        companions: the ``hf`` folder beside it; may be missing.
        hf_config: content of ``config.json``: the one that travels with it, or one made of the settings of its run.
        tokenizer: the one that was named, or travels with it.
    """

    folder: Path
    description: Description
    source: Source
    companions: Path
    hf_config: dict[str, Any]
    tokenizer: LoadedTokenizer | None

    @property
    def is_own(self) -> bool:
        """Whether this package wrote it; what others wrote gives its weights, without the state of their training."""
        return isinstance(self.source, DistReader)


def open_checkpoint(path: Path, tokenizer: Path | None = None, *, vocab_size: int | None = None) -> OpenedCheckpoint:
    """Open the latest checkpoint of a root, or the one of an iteration's folder.

    Args:
        path: root or iteration.
        tokenizer: folder of its tokenizer; by default the one that travels with it.
        vocab_size: true vocabulary of a checkpoint that does not know it, where no tokenizer tells.

    Raises:
        CheckpointError: the checkpoint is incomplete, damaged or contradicts its settings; or nothing tells its model
            or its vocabulary.
        ConfigError: the model is not supported.
        DataError: ``tokenizer`` holds no tokenizer.
    """
    folder = find_checkpoint(path)
    companions = folder.parent / HF_FOLDER
    loaded = find_tokenizer(tokenizer, companions)
    if (folder / DESCRIPTION_FILE).is_file():
        description = read_description(folder)
        source: Source = DistReader(folder)
        hf_config = _read_travelling_config(companions, description.shape)
    else:
        checkpoint = open_foreign(folder)
        shape = describe_foreign(checkpoint, companions)
        true_size = _find_vocab_size(checkpoint, loaded, vocab_size)
        shape = dataclasses.replace(shape, vocab_size=true_size)
        source = checkpoint.assemble(shape)
        description = Description(
            shape=shape,
            true_vocab_size=true_size,
            padded_vocab_size=checkpoint.num_vocab_rows,
            tokenizer_fingerprint=None if loaded is None else loaded.fingerprint,
            step=checkpoint.step,
            dtype=str(source.dtype(EMBEDDING_KEY)).removeprefix("torch."),
        )
        hf_config = _find_config(description, companions, loaded)
    check_megatron_tensors(source.shape, description.shape, description.padded_vocab_size, str(folder))
    return OpenedCheckpoint(
        folder=folder,
        description=description,
        source=source,
        companions=companions,
        hf_config=hf_config,
        tokenizer=loaded,
    )


def open_foreign(folder: Path) -> DistCheckpoint | LegacyCheckpoint:
    """Open an iteration that has no ``adapt.json``.

    Raises:
        CheckpointError: it is incomplete or damaged.
    """
    return DistCheckpoint(folder) if (folder / METADATA_FILE).is_file() else LegacyCheckpoint(folder)


def describe_foreign(checkpoint: ForeignCheckpoint, companions: Path) -> LlamaShape:
    """Return the model of a checkpoint without ``adapt.json``, its vocabulary padded.

    Raises:
        CheckpointError: neither the settings of its run nor a config beside it tell.
        ConfigError: the model is not supported.
    """
    if checkpoint.arguments is not None:
        return read_arguments(checkpoint.arguments, checkpoint.num_vocab_rows, str(checkpoint.folder))
    if (companions / CONFIG_FILE).is_file():
        config = {**read_config(companions), "vocab_size": checkpoint.num_vocab_rows}
        return read_shape(config, str(companions / CONFIG_FILE))
    raise CheckpointError(
        f"{checkpoint.folder}: neither {DESCRIPTION_FILE} nor args of Megatron-LM tell which model it is; put its "
        f"{CONFIG_FILE} into {companions}"
    )


def _find_vocab_size(checkpoint: ForeignCheckpoint, tokenizer: LoadedTokenizer | None, said: int | None) -> int:
    """Return the true vocabulary."""
    size = said if tokenizer is None else tokenizer.vocab_size
    rows = checkpoint.num_vocab_rows
    arguments: Mapping[str, Any] = checkpoint.arguments or {}
    if size is None:
        named = arguments.get("tokenizer_model")
        hint = f" (its args say {named!r})" if isinstance(named, str) else ""
        raise CheckpointError(
            f"{checkpoint.folder}: has {rows} vocabulary rows, padding included, and nothing says how many are tokens; "
            f"name the tokenizer it was trained with: --tokenizer DIR{hint}"
        )
    if size > rows:
        raise CheckpointError(
            f"{checkpoint.folder}: has {rows} vocabulary rows, the tokenizer {size} tokens; name the tokenizer it was "
            "trained with: --tokenizer DIR"
        )
    factors = arguments.get("make_vocab_size_divisible_by"), arguments.get("tensor_model_parallel_size")
    if all(isinstance(factor, int) and factor > 0 for factor in factors):
        padded = pad_vocab_size(size, factors[0] * factors[1])  # type: ignore[operator]
        if padded != rows:
            _logger.warning(
                "%s: Megatron-LM would pad %d tokens to %d rows, the checkpoint has %d; make sure that the tokenizer "
                "is its own",
                checkpoint.folder, size, padded, rows,
            )  # fmt: skip
    return size


def _find_config(description: Description, companions: Path, tokenizer: LoadedTokenizer | None) -> dict[str, Any]:
    if (companions / CONFIG_FILE).is_file():
        return _read_travelling_config(companions, description.shape)
    config = make_hf_config(description.shape, description.dtype)
    if tokenizer is not None:
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        config |= {name: value for name, value in ids.items() if value is not None}
    return config


def _read_travelling_config(companions: Path, shape: LlamaShape) -> dict[str, Any]:
    """Read the config that travels with a Megatron checkpoint; only its vocabulary may differ from the weights."""
    hf_config = read_config(companions)
    said = read_shape({**hf_config, "vocab_size": shape.vocab_size}, str(companions))
    if said != shape:
        raise CheckpointError(f"{companions}: config.json is that of another model; copy the config the run began with")
    return hf_config
