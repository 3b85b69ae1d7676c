"""RMSNorm for megatron-core's local layers (Zhang and Sennrich 2019, arXiv 1910.07467).

The engine's own wrapper of torch's norm refuses sequence parallelism. Here the weight is marked instead, so that
the engine sums its gradient over the tensor-parallel ranks, each of which sees a part of the sequence.
"""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_adapt.engine.kernels.dispatch import Implementation
from megatron_adapt.engine.kernels.rms_norm import rms_norm


class RMSNorm(torch.nn.RMSNorm):
    """``x / rms(x) * weight`` over the last axis, statistics in fp32."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, *, kernels: Implementation
    ) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.kernels = kernels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise [.., H]."""
        assert self.eps is not None
        return rms_norm(x, self.weight, self.eps, kernels=self.kernels)
