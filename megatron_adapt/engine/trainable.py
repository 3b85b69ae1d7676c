"""Which parameters learn in a stage, and which rows of them.

A frozen parameter is ``requires_grad = False`` before the engine wraps the model: then it has no gradient buffer, no
optimizer state and no weight decay, and a pipeline stage may own nothing that learns.

The engine freezes whole parameters only. Where some rows of a matrix learn, the others get gradients of zero between
the reduction of the gradients and the optimizer (``FrozenRows.zero_gradient``), and the optimizer has no weight decay.
Then the update of a frozen row is exactly zero: Adam moves a value by ``lr * m / (sqrt(v) + eps)``, and its moments
``m`` and ``v`` are zero when the stage begins and stay so. The norm that is clipped sees only what learns. Whole
gradients are zeroed, on every rank, so it does not matter where the distributed optimizer cuts a row.

Names are those of the whole model: a rank that holds layers 8 to 15 calls the first of them 0, and a pipeline's last
stage has a copy of a tied embedding under the name of the head (``name_parameters``).
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from numpy.typing import NDArray

_INPUT = "embedding.word_embeddings.weight"
_HEAD = "output_layer.weight"


_LAYERS = "decoder.layers."


def is_vocabulary(name: str) -> bool:
    """Tell whether a parameter is the input embedding or the output head."""
    return name in (_INPUT, _HEAD)


def _is_in_blocks(name: str, blocks: Collection[int]) -> bool:
    number = name.removeprefix(_LAYERS).partition(".")[0]
    return name.startswith(_LAYERS) and int(number) in blocks


TRAINABLE: dict[str, Callable[[str, Collection[int]], bool]] = {
    # Stage 1 of Bilingual Adaptation (arXiv 2407.12869, section 4) and of LEP (arXiv 2412.21140, section 3).
    "embeddings": lambda name, _: is_vocabulary(name),
    # The matrices learn; all their rows but the new ones are held by ``find_frozen_rows``.
    "new_rows": lambda name, _: is_vocabulary(name),
    # LLaMA Pro (arXiv 2401.02415, section 3.3).
    "expanded_blocks": _is_in_blocks,
    "all": lambda name, _: True,
}
"Whether a parameter learns, by its name in the whole model and the numbers of the blocks that were added, from 0."


def find_rule(trainable: str | tuple[str, ...], new_blocks: Collection[int] = ()) -> Callable[[str], bool]:
    """Return what tells of a parameter, by its name in the whole model, whether it learns.

    Args:
        trainable: a key of ``TRAINABLE``, or patterns of names.
        new_blocks: numbers of the blocks that were added to the model.
    """
    if isinstance(trainable, str):
        rule = TRAINABLE[trainable]
        return lambda name: rule(name, new_blocks)
    return lambda name: any(fnmatchcase(name, pattern) for pattern in trainable)


def is_by_layer(trainable: str | tuple[str, ...]) -> bool:
    """Tell whether of a parameter that all layers have some may learn and some not."""
    return not isinstance(trainable, str) or trainable == "expanded_blocks"


def name_parameters(model: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield the parameters of this rank under their names in the whole model.

    Args:
        model: an engine's model, or one of the chunks of it that this rank holds.
    """
    for name, parameter in model.named_parameters():
        if name.startswith(_LAYERS):
            at, _, rest = name.removeprefix(_LAYERS).partition(".")
            yield f"{_LAYERS}{model.decoder.layers[int(at)].layer_number - 1}.{rest}", parameter
        else:
            is_copy = name == _HEAD and model.share_embeddings_and_output_weights
            yield _INPUT if is_copy else name, parameter


@dataclass(frozen=True)
class FrozenRows:
    """The rows of a vocabulary matrix that do not learn although the matrix does."""

    weight: Any
    "[V_local, H]: the part of the matrix on this rank."
    rows_N: torch.Tensor
    "Places in that part."

    @property
    def num_values(self) -> int:
        """Values that do not learn."""
        return len(self.rows_N) * int(self.weight.shape[1])

    def zero_gradient(self) -> None:
        """Forget the reduced gradient of these rows; call before the optimizer reads it."""
        # Filled, not multiplied: what is not finite would stay.
        self.weight.main_grad.index_fill_(0, self.rows_N, 0.0)


def freeze_rest(
    model: torch.nn.Module,
    trainable: str | tuple[str, ...],
    *,
    head: bool = True,
    new_blocks: Collection[int] = (),
) -> int:
    """Freeze every parameter that does not learn under ``trainable``; call before wrapping the model.

    Args:
        model: the part of this rank, or one of the chunks it holds.
        trainable: what learns.
        head: whether an output head of its own may learn; a tied one is the input matrix.
        new_blocks: for ``expanded_blocks``, the numbers of the blocks that learn, from 0.

    Returns:
        Number of values on this rank that learn, frozen rows included.
    """
    learns = find_rule(trainable, new_blocks)
    for name, parameter in name_parameters(model):
        parameter.requires_grad = learns(name) and (head or name != _HEAD)
    _open_recomputed_layers(model)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _open_recomputed_layers(model: Any) -> None:
    """Let gradients reach layers that are recomputed above a frozen embedding.

    The engine's recomputation is a function to autograd that has the hidden states as its only inputs: where these need
    no gradient, neither does anything inside, without a word.
    """
    embedding = getattr(model, "embedding", None)
    if embedding is None or model.config.recompute_granularity != "full":
        return
    if not any(parameter.requires_grad for parameter in embedding.parameters()):
        embedding.register_forward_hook(lambda _, inputs, hidden: hidden.requires_grad_())


def find_frozen_rows(model: torch.nn.Module, learning_ids: NDArray[np.int64]) -> tuple[FrozenRows, ...]:
    """Find the rows of the learning vocabulary matrices of this rank that are not to learn, padding among them.

    Args:
        model: the part of this rank, frozen as wanted (``freeze_rest``); every parameter of it that learns is a
            vocabulary matrix.
        learning_ids: the ids whose rows learn.
    """
    rank = parallel_state.get_tensor_model_parallel_rank()
    found = []
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        assert is_vocabulary(name), name
        num_rows = len(weight)
        learns_V = torch.zeros(num_rows, dtype=torch.bool)
        local_ids = learning_ids - rank * num_rows
        learns_V[torch.from_numpy(local_ids[(local_ids >= 0) & (local_ids < num_rows)])] = True
        found.append(FrozenRows(weight, (~learns_V).nonzero().flatten().to(weight.device)))
    return tuple(found)
