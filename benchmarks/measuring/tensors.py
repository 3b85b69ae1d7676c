"""What the benchmarks of the engine ask of the machine and of the tensors of both sides."""

from collections.abc import Sequence

import torch

from megatron_adapt.errors import EngineError


def require_cpu(benchmark: str) -> None:
    """Refuse to measure the CPU where the engine would use a GPU.

    Raises:
        EngineError: there is one.
    """
    if torch.cuda.is_available():
        raise EngineError(f"{benchmark}: this measures the CPU, but a GPU is visible; start with CUDA_VISIBLE_DEVICES=")


def find_difference(theirs: Sequence[torch.Tensor], ours: Sequence[torch.Tensor]) -> float:
    """Return the largest difference between tensors, over the largest value of its tensor."""
    return max(
        float((one.float() - other.float()).abs().max() / one.float().abs().max())
        for one, other in zip(theirs, ours, strict=True)
    )
