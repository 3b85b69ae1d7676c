"""Weights of megatron-core models to and from ``torch_dist`` checkpoints, under any parallel layout.

megatron-core cuts, stacks and reshards; this module gives it the state dictionary and stands guard over two of its
habits: a vocabulary matrix of another size is cut or filled with zeros without a word, and a missing tensor is
reported as a ``KeyError`` of all keys. Needs a process group and megatron-core's parallel state.

Source: megatron-core 0.16 ``dist_checkpointing/serialization.py``; Megatron-LM ``training/checkpointing.py`` (names).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from megatron_adapt.checkpoint.dist import DistReader
from megatron_adapt.errors import CheckpointError


def weights_state_dict(models: Sequence[torch.nn.Module], *, by_layer: bool = False) -> dict[str, Any]:
    """Return the sharded weights of this rank's model chunks, under Megatron-LM's names.

    Args:
        models: one chunk ("model"), or several under an interleaved pipeline ("model0", "model1", ...).
        by_layer: a key for every layer (megatron-core's ``non_homogeneous_layers``), not one for their stack.

    Returns:
        Name of the chunk to its sharded tensors. The empty quantisation states are left out.
    """
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    metadata = {"dp_cp_group": group, "non_homogeneous_layers": by_layer}
    return {
        name: _drop_extra_states(_unwrap(model).sharded_state_dict(metadata=metadata))
        for name, model in zip(name_chunks(models), models, strict=True)
    }


def name_chunks(models: Sequence[torch.nn.Module]) -> list[str]:
    """Return the keys of a rank's model chunks in a state dictionary, as Megatron-LM names them."""
    return ["model"] if len(models) == 1 else [f"model{at}" for at in range(len(models))]


def _unwrap(model: Any) -> Any:
    while hasattr(model, "module"):
        model = model.module
    return model


def _drop_extra_states(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if not key.endswith("_extra_state")}


def load_weights(models: Sequence[torch.nn.Module], iter_folder: Path) -> None:
    """Load model weights in place; optimizer states in the checkpoint are passed over.

    The types may differ: values are cast to those of the model.

    Args:
        models: the model chunks of this rank, wrapped or not.
        iter_folder: ``torch_dist`` folder.

    Raises:
        CheckpointError: a tensor is missing or of another shape.
    """
    state = weights_state_dict(models)
    _check_shapes(state, iter_folder)
    loaded = dist_checkpointing.load(state, str(iter_folder))
    for name, model in zip(state, models, strict=True):
        fill(_unwrap(model), loaded[name])


def fill(model: torch.nn.Module, values: dict[str, Any]) -> None:
    """Copy values into all parameters and buffers of a model.

    Args:
        model: not wrapped.
        values: by name; but for the quantisation states of Transformer Engine, which are not saved, all that it has.
    """
    found = model.load_state_dict(values, strict=False)
    others = [name for name in found.missing_keys + found.unexpected_keys if not name.endswith("_extra_state")]
    assert not others, others


def _check_shapes(state: dict[str, Any], iter_folder: Path) -> None:
    reader = DistReader(iter_folder)
    for tensor in _list_tensors(state):
        found = reader.shape(tensor.key)
        if found is None:
            raise CheckpointError(f"{iter_folder}: no tensor {tensor.key}; this is the checkpoint of another model")
        if found != tuple(tensor.global_shape):
            raise CheckpointError(
                f"{iter_folder}: {tensor.key} has shape {found}, the model {tuple(tensor.global_shape)}; "
                "start from a checkpoint of the same model and vocabulary"
            )


def _list_tensors(state: dict[str, Any]) -> Iterator[ShardedTensor]:
    """Yield the sharded tensors; ``apply_factories`` works in place, so it gets a copy of the dictionaries."""
    copied = {name: dict(chunk) for name, chunk in state.items()}
    apply_factories(copied)
    for value in nested_values(copied):
        if isinstance(value, ShardedTensor):
            yield value
