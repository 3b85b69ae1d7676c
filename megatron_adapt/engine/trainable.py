"""Which parameters learn in a stage.

Freezing is ``requires_grad = False`` before the engine wraps the model: then a frozen parameter has no gradient
buffer, no optimizer state and no weight decay, and a pipeline stage may own nothing that learns.
"""

from collections.abc import Callable

import torch


def _is_embedding(name: str) -> bool:
    return name in ("embedding.word_embeddings.weight", "output_layer.weight")


TRAINABLE: dict[str, Callable[[str], bool]] = {
    # Stage 1 of Bilingual Adaptation (arXiv 2407.12869, section 4) and of LEP (arXiv 2412.21140, section 3).
    "embeddings": _is_embedding,
    "all": lambda name: True,
}


def freeze_rest(model: torch.nn.Module, trainable: str) -> int:
    """Freeze every parameter that does not learn under ``trainable``; call before wrapping the model.

    Returns:
        Number of values on this rank that learn.
    """
    learns = TRAINABLE[trainable]
    for name, parameter in model.named_parameters():
        parameter.requires_grad = learns(name)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
