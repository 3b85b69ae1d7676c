"""RMSNorm over the last axis, statistics in fp32 (Zhang and Sennrich 2019, arXiv 1910.07467).

Kept for the backward pass: input, weight and one number a row; the normalised input is computed anew. Torch's own norm
on a CPU keeps that too, in fp32, and below fp32 a wide copy of the input besides.

- ``torch`` on a CPU: ``_Norm``, forward the bits of ``torch.nn.functional.rms_norm``, backward the formula.
- ``torch`` on a GPU: ``torch.nn.functional.rms_norm``, which since torch 2.9 runs ``aten::_fused_rms_norm`` there: one
  kernel that leaves one number a row.
- ``triton``: ``gpu/rms_norm.py``. It reads and writes as little as torch does on a GPU. What it adds is a gradient of
  the weight that is summed in fp32 in an order that never changes. Which is faster was not measured, for want of a
  GPU.

Not Liger Kernel's (0.8): its module for megatron-core multiplies with the weight below fp32; its "gemma" mode computes
as torch does and would serve, at the price of a dependency. Transformer Engine's comes with its layers
(``transformer_impl``).
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megatron_adapt.engine.kernels.dispatch import Implementation


def rms_norm(hidden: torch.Tensor, weight_H: torch.Tensor, eps: float, *, kernels: Implementation) -> torch.Tensor:
    """Return ``hidden / sqrt(mean(hidden**2) + eps) * weight``.

    Args:
        hidden: [.., H]; for Triton fp32, bf16 or fp16.
        weight_H: scale of each column.
        eps: added to the mean square.
        kernels: what computes it.

    Returns:
        [.., H] in the type of ``hidden``.
    """
    if kernels == "torch" and hidden.is_cuda:
        return torch.nn.functional.rms_norm(hidden, weight_H.shape, weight_H, eps)
    function: Any = _Norm
    if kernels == "triton":
        from megatron_adapt.engine.kernels.gpu.rms_norm import RMSNormFunction as function
    normalised: torch.Tensor = function.apply(hidden, weight_H, eps)
    return normalised


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
        normalised, rstd = torch._fused_rms_norm(hidden, weight_H.shape, weight_H, eps)
        ctx.save_for_backward(hidden, weight_H, rstd)
        return normalised

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight_H, rstd = ctx.saved_tensors
        of_hidden = of_weight_H = None
        normalised, upstream = hidden * rstd, upstream.to(rstd.dtype)
        if ctx.needs_input_grad[1]:
            of_weight_H = (upstream * normalised).reshape(-1, len(weight_H)).sum(0).to(weight_H.dtype)
        if ctx.needs_input_grad[0]:
            scaled = upstream * weight_H
            along = (scaled * normalised).mean(-1, keepdim=True)
            of_hidden = scaled.addcmul_(normalised, along, value=-1).mul_(rstd).to(hidden.dtype)
        return of_hidden, of_weight_H, None
