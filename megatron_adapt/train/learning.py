"""What of a model learns in a stage, checked against its names and its record before the engine starts.

A pattern that no parameter has, blocks that nobody added, a learning rate for matrices that do not learn: each would
train something else than was meant, without a word.
"""

import difflib
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from megatron_adapt.config import StageSettings
from megatron_adapt.engine.trainable import find_rule, is_vocabulary
from megatron_adapt.errors import ConfigError
from megatron_adapt.shape import LlamaShape
from megatron_adapt.train.flops import list_weights


def check_learning(stage: StageSettings, shape: LlamaShape, new_blocks: Sequence[int]) -> None:
    """Refuse a choice of what learns that does not fit the model.

    Args:
        stage: settings of the stage.
        shape: the model.
        new_blocks: numbers of the blocks that were added to it (``adapt.json``).

    Raises:
        ConfigError: a pattern matches nothing, no blocks were added, or a learning rate has no effect.
    """
    where = f"train.stages {stage.name}"
    names = [name for name, _ in list_weights(shape, shape.vocab_size)]
    if not isinstance(stage.trainable, str):
        for pattern in stage.trainable:
            _check_pattern(where, pattern, names)
    if stage.trainable == "expanded_blocks" and not new_blocks:
        raise ConfigError(
            f'{where}: trainable = "expanded_blocks": the checkpoint it starts from has none; add some with '
            "tools/reshape_checkpoint.py expand"
        )
    learns = find_rule(stage.trainable, new_blocks)
    of_vocabulary = {is_vocabulary(name) for name in names if learns(name)}
    if stage.decoupled_lr is not None and len(of_vocabulary) == 1:
        which = "nothing else learns; set lr alone" if of_vocabulary == {True} else "neither learns; leave it out"
        raise ConfigError(
            f"{where}: decoupled_lr {stage.decoupled_lr} is for input embedding and output head beside others: {which}"
        )


def _check_pattern(where: str, pattern: str, names: Sequence[str]) -> None:
    if any(fnmatchcase(name, pattern) for name in names):
        return
    # The layers have the same names; that of the first one stands for all.
    once = dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names)
    near = difflib.get_close_matches(re.sub(r"\.\d+\.", ".*.", pattern), once, n=3, cutoff=0.0)
    num_layers = 1 + max(int(found[1]) for name in names if (found := re.search(r"\.(\d+)\.", name)))
    raise ConfigError(
        f"{where}: trainable {pattern!r} matches no parameter of the model, whose layers are 0 to {num_layers - 1}; "
        f"use for example {' or '.join(near)}"
    )
