"""SwiGLU in Triton: gate and up are read where the projection left them, side by side in a row.

``_gate`` reads both halves once and writes the product; ``_differentiate`` reads both again with the upstream gradient
and writes the gradient of both side by side. The sigmoid is computed anew, so nothing but the input is kept. fp32
between load and store.

Shapes: R rows, F columns of gate, of up and of what comes out.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from megatron_adapt.engine.kernels.gpu.rows import as_rows

_BLOCK = 1024
"Columns of a program: 8 values of each tensor a thread, which is 16 bytes in bf16."


class SwiGLUFunction(torch.autograd.Function):
    """[.., 2 F] to [.., F]; fp32, bf16 or fp16, any strides."""

    @staticmethod
    def forward(ctx: Any, gate_and_up: torch.Tensor) -> torch.Tensor:
        """Return ``silu(gate) * up``."""
        ctx.save_for_backward(gate_and_up)
        inputs_R2F = as_rows(gate_and_up)
        width = gate_and_up.shape[-1] // 2
        gated = gate_and_up.new_empty((*gate_and_up.shape[:-1], width))
        if gated.numel():
            _gate[len(inputs_R2F), triton.cdiv(width, _BLOCK)](
                inputs_R2F, inputs_R2F.stride(0), gated, width, BLOCK=_choose_block(width)
            )
        return gated

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> torch.Tensor:
        """Return the gradient of gate and up."""
        (gate_and_up,) = ctx.saved_tensors
        inputs_R2F, upstream_RF = as_rows(gate_and_up), as_rows(upstream)
        width = upstream.shape[-1]
        gradient = torch.empty_like(gate_and_up, memory_format=torch.contiguous_format)
        if gradient.numel():
            _differentiate[len(inputs_R2F), triton.cdiv(width, _BLOCK)](
                upstream_RF, upstream_RF.stride(0), inputs_R2F, inputs_R2F.stride(0), gradient, width,
                BLOCK=_choose_block(width),
            )  # fmt: skip
        return gradient


def _choose_block(width: int) -> int:
    """Return the columns of a program."""
    return min(_BLOCK, int(triton.next_power_of_2(width)))


@triton.jit  # type: ignore[untyped-decorator]
def _load(places: tl.tensor, width: tl.tensor, mask: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    gate = tl.load(places, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(places + width, mask=mask, other=0.0).to(tl.float32)
    # exp overflows to infinity for a gate far below 0, of which the sigmoid is 0 as it should be.
    return gate, up, 1.0 / (1.0 + tl.exp(-gate))


@triton.jit  # type: ignore[untyped-decorator]
def _gate(
    inputs_ptr: tl.tensor, inputs_stride: tl.tensor, gated_ptr: tl.tensor, width: tl.tensor, BLOCK: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    gate, up, sigmoid = _load(inputs_ptr + row * inputs_stride + columns, width, mask)
    tl.store(gated_ptr + row * width + columns, (gate * sigmoid * up).to(gated_ptr.dtype.element_ty), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _differentiate(
    upstream_ptr: tl.tensor,
    upstream_stride: tl.tensor,
    inputs_ptr: tl.tensor,
    inputs_stride: tl.tensor,
    gradient_ptr: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    gate, up, sigmoid = _load(inputs_ptr + row * inputs_stride + columns, width, mask)
    upstream = tl.load(upstream_ptr + row * upstream_stride + columns, mask=mask, other=0.0).to(tl.float32)
    of_gate = upstream * up * (sigmoid * (1.0 + gate * (1.0 - sigmoid)))
    of_up = upstream * (gate * sigmoid)
    places = gradient_ptr + row * 2 * width + columns
    tl.store(places, of_gate.to(gradient_ptr.dtype.element_ty), mask=mask)
    tl.store(places + width, of_up.to(gradient_ptr.dtype.element_ty), mask=mask)
