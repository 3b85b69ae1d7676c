"""RMSNorm in Triton: one pass over the input forward, one over input and upstream gradient backward.

1. ``_normalise``: a program has whole rows in registers; it writes them normalised, and 1 / rms of each (rstd).
2. ``_differentiate``: a program goes through a run of rows, writes their gradient and adds up, in fp32, what they give
   to the gradient of the weight; at the end it stores that sum.
3. torch adds the sums of the programs. There are no atomics: how the rows are cut follows from their number alone, so
   the same input gives the same bits.

Everything is fp32 between load and store. Keeps the input, the weight and rstd, 4 bytes a row.
Working memory of the backward pass: ``_NUM_SUMS`` rows of fp32.

Shapes: R rows, H columns, P programs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from megatron_adapt.engine.kernels.gpu.rows import as_rows

_TILE = 2048
"Values that a program holds at least, so that narrow rows share one; a power of 2."
_NUM_SUMS = 256
"Programs of the backward pass: about two for each multiprocessor of an H100 or H200. Not measured."


class RMSNormFunction(torch.autograd.Function):
    """``(hidden, weight, eps)`` to ``hidden * rstd * weight``; fp32, bf16 or fp16, any strides."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
        """Return the rows normalised."""
        hidden_RH = as_rows(hidden)
        num_rows, width = hidden_RH.shape
        normalised_RH = torch.empty_like(hidden_RH, memory_format=torch.contiguous_format)
        rstd_R = torch.empty(num_rows, dtype=torch.float32, device=hidden.device)
        weight_H = weight_H.contiguous()
        rows, columns, num_warps = _choose_tile(width)
        if hidden_RH.numel():
            _normalise[(triton.cdiv(num_rows, rows),)](
                hidden_RH, hidden_RH.stride(0), weight_H, normalised_RH, rstd_R, num_rows, width, eps,
                ROWS=rows, COLUMNS=columns, num_warps=num_warps,
            )  # fmt: skip
        # The tensor that came in, not a copy of it with other strides: others may keep it too.
        ctx.save_for_backward(hidden, weight_H, rstd_R)
        return normalised_RH.view(hidden.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients that are asked for."""
        hidden, weight_H, rstd_R = ctx.saved_tensors
        of_hidden, of_weight, _ = ctx.needs_input_grad
        hidden_RH, upstream_RH = as_rows(hidden), as_rows(upstream)
        num_rows, width = hidden_RH.shape
        rows, columns, num_warps = _choose_tile(width)
        rows_per_program = triton.cdiv(max(triton.cdiv(num_rows, rows), 1), _NUM_SUMS) * rows
        num_programs = triton.cdiv(num_rows, rows_per_program)
        gradient_RH = torch.empty_like(hidden_RH, memory_format=torch.contiguous_format) if of_hidden else None
        sums_PH = torch.empty(num_programs, width, dtype=torch.float32, device=hidden.device) if of_weight else None
        if hidden_RH.numel():
            _differentiate[(num_programs,)](
                upstream_RH, upstream_RH.stride(0), hidden_RH, hidden_RH.stride(0), weight_H, rstd_R,
                # A pointer that is not used must still be one.
                rstd_R if gradient_RH is None else gradient_RH, rstd_R if sums_PH is None else sums_PH,
                num_rows, width, rows_per_program, OF_HIDDEN=of_hidden, OF_WEIGHT=of_weight,
                ROWS=rows, COLUMNS=columns, num_warps=num_warps,
            )  # fmt: skip
        return (
            None if gradient_RH is None else gradient_RH.view(hidden.shape),
            None if sums_PH is None else sums_PH.sum(0).to(weight_H.dtype),
            None,
        )


def _choose_tile(width: int) -> tuple[int, int, int]:
    """Return rows and columns of a tile, and the warps that share it."""
    columns = triton.next_power_of_2(width)
    rows = max(1, _TILE // columns)
    return rows, columns, min(max(rows * columns // 512, 4), 32)


@triton.jit  # type: ignore[untyped-decorator]
def _normalise(
    hidden_ptr: tl.tensor,
    hidden_stride: tl.tensor,
    weight_ptr: tl.tensor,
    normalised_ptr: tl.tensor,
    rstd_ptr: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    eps: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    is_row, is_column = rows < num_rows, columns < width
    mask = is_row[:, None] & is_column[None, :]
    hidden = tl.load(hidden_ptr + rows[:, None] * hidden_stride + columns[None, :], mask=mask, other=0.0)
    hidden = hidden.to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=is_column, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(hidden * hidden, 1) / width + eps)
    normalised = hidden * rstd[:, None] * weight[None, :]
    tl.store(rstd_ptr + rows, rstd, mask=is_row)
    places = normalised_ptr + rows[:, None] * width + columns[None, :]
    tl.store(places, normalised.to(normalised_ptr.dtype.element_ty), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _differentiate(
    upstream_ptr: tl.tensor,
    upstream_stride: tl.tensor,
    hidden_ptr: tl.tensor,
    hidden_stride: tl.tensor,
    weight_ptr: tl.tensor,
    rstd_ptr: tl.tensor,
    gradient_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    rows_per_program: tl.tensor,
    OF_HIDDEN: tl.constexpr,
    OF_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    columns = tl.arange(0, COLUMNS)
    is_column = columns < width
    weight = tl.load(weight_ptr + columns, mask=is_column, other=0.0).to(tl.float32)
    sums = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in range(0, rows_per_program, ROWS):
        rows = (program * rows_per_program + start + tl.arange(0, ROWS)).to(tl.int64)
        is_row = rows < num_rows
        mask = is_row[:, None] & is_column[None, :]
        upstream = tl.load(upstream_ptr + rows[:, None] * upstream_stride + columns[None, :], mask=mask, other=0.0)
        hidden = tl.load(hidden_ptr + rows[:, None] * hidden_stride + columns[None, :], mask=mask, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=is_row, other=0.0)
        upstream = upstream.to(tl.float32)
        normalised = hidden.to(tl.float32) * rstd[:, None]
        if OF_WEIGHT:
            sums += upstream * normalised
        if OF_HIDDEN:
            scaled = upstream * weight[None, :]
            along = tl.sum(scaled * normalised, 1) / width
            gradient = (scaled - normalised * along[:, None]) * rstd[:, None]
            places = gradient_ptr + rows[:, None] * width + columns[None, :]
            tl.store(places, gradient.to(gradient_ptr.dtype.element_ty), mask=mask)
    if OF_WEIGHT:
        tl.store(sums_ptr + program.to(tl.int64) * width + columns, tl.sum(sums, 0), mask=is_column)
