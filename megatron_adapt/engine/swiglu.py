"""SwiGLU as a part of megatron-core's MLP.

The engine computes its activation in a line of its own unless the config says ``use_te_activation_func``; then it
builds the submodule ``activation_func`` of the spec, whosever that is. No weights: state dicts do not change.
"""

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_adapt.engine.kernels.dispatch import Implementation
from megatron_adapt.engine.kernels.swiglu import swiglu


class SwiGLU(MegatronModule):  # type: ignore[misc]
    """``silu(gate) * up`` of what the first projection leaves on this tensor-parallel rank."""

    def __init__(self, config: TransformerConfig, kernels: Implementation) -> None:
        super().__init__(config=config)
        self.kernels = kernels

    def forward(self, gate_and_up: torch.Tensor) -> torch.Tensor:
        """Return [T, B, F] for [T, B, 2 F]."""
        return swiglu(gate_and_up, kernels=self.kernels)
