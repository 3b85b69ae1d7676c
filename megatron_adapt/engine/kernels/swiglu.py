"""SwiGLU, ``silu(gate) * up`` (Shazeer 2020, arXiv 2002.05202), both in one tensor, as the projection leaves them.

Kept for the backward pass: the input. The engine's own line also keeps ``silu(gate)`` and ``up + 0.0`` (its
``glu_linear_offset``), of half the input's size each. ``silu(gate)`` is computed anew.

- ``torch``: ``_Gate``, the numbers of the engine's line, forward and backward; the gradient of both halves is written
  in place, where autograd would concatenate it.
- ``triton``: ``gpu/swiglu.py``, one kernel forward and one backward.

Not the engine's ``bias_activation_fusion``: it keeps the input alone too, through ``torch.compile``, which needs a
compiler on every machine and compiles in every process. Not Liger Kernel's: the function for two tensors would copy
both halves; since 0.8 it has one for this layout, which rounds ``silu(gate)`` below fp32 and would be a dependency for
two kernels of ten lines. Which is fastest was not measured, for want of a GPU.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megatron_adapt.engine.kernels.dispatch import Implementation


def swiglu(gate_and_up: torch.Tensor, *, kernels: Implementation) -> torch.Tensor:
    """Return ``silu(gate) * up``.

    Args:
        gate_and_up: [.., 2 F], the gate first; for Triton fp32, bf16 or fp16.
        kernels: what computes it.

    Returns:
        [.., F].
    """
    function: Any = _Gate
    if kernels == "triton":
        from megatron_adapt.engine.kernels.gpu.swiglu import SwiGLUFunction as function
    gated: torch.Tensor = function.apply(gate_and_up)
    return gated


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_and_up)
        gate, up = gate_and_up.chunk(2, -1)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> torch.Tensor:
        (gate_and_up,) = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, -1)
        gradient = torch.empty_like(gate_and_up)
        of_gate, of_up = gradient.chunk(2, -1)
        torch.mul(upstream, torch.nn.functional.silu(gate), out=of_up)
        torch.ops.aten.silu_backward.grad_input(upstream * up, gate, grad_input=of_gate)
        return gradient
