"""Which tokens of the checkpoint's tokenizer are new: those that ``added_pieces.json`` spells by older ones.

Reads the ``hf`` folder that travels with the weights.
"""

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_adapt.config import StageSettings
from megatron_adapt.errors import ConfigError
from megatron_adapt.tokenizer.id_map import MAP_FILE, IdMap, read_id_map
from megatron_adapt.tokenizer.pieces import read_tokenizer


def read_new_tokens(stage: StageSettings, tokenizer: Path) -> IdMap:
    """Read the map of a tokenizer that has new tokens.

    Args:
        stage: settings of the stage, which trains rows of new tokens.
        tokenizer: folder of the tokenizer that travels with the checkpoint.

    Raises:
        ConfigError: the tokenizer has no new tokens.
        DataError: the map is damaged or another tokenizer's.
    """
    where = f'train.stages {stage.name}: trainable = "new_rows"'
    if not (tokenizer / MAP_FILE).is_file():
        raise ConfigError(
            f"{where}: {tokenizer} has no {MAP_FILE}, so no token is known to be new; copy it from the folder of the "
            "tokenizer that tools/build_tokenizer.py made, or train other parameters"
        )
    id_map = read_id_map(read_tokenizer(tokenizer))
    if not id_map.pieces:
        raise ConfigError(
            f"{where}: the tokenizer {tokenizer} has no new tokens ({MAP_FILE}); train other parameters, or resize the "
            "vocabulary first"
        )
    return id_map


def find_new_ids(stage: StageSettings, tokenizer: Path) -> NDArray[np.int64] | None:
    """Return the ids whose rows learn, in ascending order; None for a stage in which whole parameters do.

    A token without text, which nothing spells, has nothing to learn from in token distillation.

    Raises:
        ConfigError: as ``read_new_tokens``.
        DataError: as ``read_new_tokens``.
    """
    if stage.trainable != "new_rows":
        return None
    pieces = read_new_tokens(stage, tokenizer).pieces
    spelt = stage.objective == "token_distillation"
    return np.array(sorted(new for new, olds in pieces.items() if olds or not spelt), dtype=np.int64)


def hash_ids(ids: NDArray[np.int64] | None) -> str | None:
    """Return a fingerprint of ids; None for none."""
    return None if ids is None else hashlib.sha256(ids.tobytes()).hexdigest()[:16]
