"""Triton's RoPE where megatron-core looks for a fused one.

The engine's attention rotates through ``fused_apply_rotary_pos_emb`` of Transformer Engine if its config says
``apply_rope_fusion``, and leaves the name None if that is not installed. Only local layers for which Triton was chosen
have a config that says so (``llama``), so nobody else reads what is bound here.
"""

import torch
from megatron.core.models.common.embeddings import rope_utils

from megatron_adapt.engine.kernels.rope import rotate_heads


def install() -> None:
    """Bind Triton's RoPE; before a config with ``apply_rope_fusion`` is made, which is refused without one."""
    rope_utils.fused_apply_rotary_pos_emb = _rotate


def _rotate(t: torch.Tensor, freqs: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """Turn [T, B, N, D] by [T, 1, 1, R] angles; the names are Transformer Engine's."""
    assert not interleaved
    return rotate_heads(t, freqs, kernels="triton")
