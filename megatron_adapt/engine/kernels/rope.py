"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) in megatron-core's layout.

Column d of a head is paired with column d + R / 2, and the pair is turned by the angle of its position; columns from R
on pass. Scaling of frequencies, and the positions that a rank of a context-parallel group holds, are in the angles.

- ``torch``: the engine's ``_apply_rotary_pos_emb_bshd``. About a dozen passes over the heads, each way; below fp32 it
  rounds cosines, sines and products.
- ``triton``: ``gpu/rope.py``, one read and one write each way, fp32 between them. Neither keeps heads for the backward
  pass.

Not Liger Kernel's (0.8): it wants [B, N, T, D] whose transpose is contiguous, and turns it in place. megatron-core has
[T, B, N, D], and its keys are a slice of the joint projection: both would be copied. Transformer Engine's fused RoPE
takes this layout, but not without Transformer Engine. Neither was measured against this one, for want of a GPU.
"""

import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

from megatron_adapt.engine.kernels.dispatch import Implementation


def rotate_heads(heads_TBND: torch.Tensor, angles_T11R: torch.Tensor, *, kernels: Implementation) -> torch.Tensor:
    """Turn queries or keys by the angles of their positions.

    Args:
        heads_TBND: N heads of D columns, at any strides; for Triton fp32, bf16 or fp16.
        angles_T11R: radians in fp32, those of R / 2 pairs twice (``RotaryEmbedding`` of the engine); R is even and at
            most D. No gradient flows into them.
        kernels: what computes it.

    Returns:
        [T, B, N, D] in the type of ``heads_TBND``.
    """
    if kernels == "torch":
        turned_TBND: torch.Tensor = _apply_rotary_pos_emb_bshd(heads_TBND, angles_T11R)
        return turned_TBND
    from megatron_adapt.engine.kernels.gpu.rope import RoPEFunction

    turned_TBND = RoPEFunction.apply(heads_TBND, angles_T11R)  # type: ignore[no-untyped-call]
    return turned_TBND
