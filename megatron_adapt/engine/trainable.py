"""Which parameters learn in a stage, and which rows of them.

A frozen parameter is ``requires_grad = False`` before the engine wraps the model: then it has no gradient buffer, no
optimizer state and no weight decay, and a pipeline stage may own nothing that learns.

The engine freezes whole parameters only. Where some rows of a matrix learn, the others get gradients of zero between
the reduction of the gradients and the optimizer (``FrozenRows.zero_gradient``), and the optimizer has no weight decay.
Then the update of a frozen row is exactly zero: Adam moves a value by ``lr * m / (sqrt(v) + eps)``, and its moments
``m`` and ``v`` are zero when the stage begins and stay so. The norm that is clipped sees only what learns. Whole
gradients are zeroed, on every rank, so it does not matter where the distributed optimizer cuts a row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from numpy.typing import NDArray

_INPUT = "embedding.word_embeddings.weight"
_HEAD = "output_layer.weight"


def _is_vocabulary(name: str) -> bool:
    return name in (_INPUT, _HEAD)


TRAINABLE: dict[str, Callable[[str], bool]] = {
    # Stage 1 of Bilingual Adaptation (arXiv 2407.12869, section 4) and of LEP (arXiv 2412.21140, section 3).
    "embeddings": _is_vocabulary,
    # The matrices learn; all their rows but the new ones are held by ``find_frozen_rows``.
    "new_rows": _is_vocabulary,
    "all": lambda name: True,
}


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


def freeze_rest(model: torch.nn.Module, trainable: str, *, head: bool = True) -> int:
    """Freeze every parameter that does not learn under ``trainable``; call before wrapping the model.

    Args:
        model: the part of this rank.
        trainable: what learns.
        head: whether an output head of its own may learn; a tied one is the input matrix.

    Returns:
        Number of values on this rank that learn, frozen rows included.
    """
    learns = TRAINABLE[trainable]
    for name, parameter in model.named_parameters():
        parameter.requires_grad = learns(name) and (head or name != _HEAD)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


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
        assert _is_vocabulary(name), name
        num_rows = len(weight)
        learns_V = torch.zeros(num_rows, dtype=torch.bool)
        local_ids = learning_ids - rank * num_rows
        learns_V[torch.from_numpy(local_ids[(local_ids >= 0) & (local_ids < num_rows)])] = True
        found.append(FrozenRows(weight, (~learns_V).nonzero().flatten().to(weight.device)))
    return tuple(found)
