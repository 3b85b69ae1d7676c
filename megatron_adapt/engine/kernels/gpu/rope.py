"""RoPE in Triton, in megatron-core's layout and from where the tensor lies: one read and one write of the heads.

``_rotate`` takes a position of a sequence and a block of its heads: cosines and sines, in fp32, once for all of them;
then the pairs (d, d + R / 2) of the rotated columns are turned and the columns behind them copied. Backward is the
same kernel with the angles negated: a rotation's transpose is its inverse. So nothing but the angles is kept.

Shapes: T positions, B batch, N heads, D head width, R rotated columns of it.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

_TILE = 2048
"Pairs of columns that a program turns at most."


class RoPEFunction(torch.autograd.Function):
    """``(heads, angles)``, [T, B, N, D] and [T, 1, 1, R] in fp32, to [T, B, N, D]; fp32, bf16 or fp16, any strides."""

    @staticmethod
    def forward(ctx: Any, heads_TBND: torch.Tensor, angles_T11R: torch.Tensor) -> torch.Tensor:
        """Return the heads turned."""
        ctx.save_for_backward(angles_T11R)
        return _turn(heads_TBND, angles_T11R, backwards=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_TBND: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return the gradient turned back."""
        (angles_T11R,) = ctx.saved_tensors
        return _turn(upstream_TBND, angles_T11R, backwards=True), None


def _turn(heads_TBND: torch.Tensor, angles_T11R: torch.Tensor, *, backwards: bool) -> torch.Tensor:
    """Return the heads turned by the angles, or by their negatives."""
    num_positions, batch, num_heads, width = heads_TBND.shape
    rotated = angles_T11R.shape[-1]
    # The kernel would read past the end, or turn by the angles of another place.
    assert angles_T11R.shape == (num_positions, 1, 1, rotated)
    assert angles_T11R.dtype == torch.float32
    assert rotated <= width
    assert rotated % 2 == 0
    if heads_TBND.stride(-1) != 1:
        heads_TBND = heads_TBND.contiguous()
    angles_T11R = angles_T11R.contiguous()
    turned_TBND = torch.empty_like(heads_TBND, memory_format=torch.contiguous_format)
    if not turned_TBND.numel():
        return turned_TBND
    pairs, rest = triton.next_power_of_2(max(rotated // 2, 1)), triton.next_power_of_2(max(width - rotated, 1))
    block = min(triton.next_power_of_2(num_heads), max(1, _TILE // pairs))
    _rotate[num_positions * batch, triton.cdiv(num_heads, block)](
        heads_TBND, *heads_TBND.stride()[:3], angles_T11R, turned_TBND, batch, num_heads,
        WIDTH=width, ROTATED=rotated, BACKWARDS=backwards, HEADS=block, PAIRS=pairs, REST=rest,
        num_warps=min(max(block * pairs // 256, 1), 8),
    )  # fmt: skip
    return turned_TBND


@triton.jit  # type: ignore[untyped-decorator]
def _rotate(
    heads_ptr: tl.tensor,
    position_stride: tl.tensor,
    batch_stride: tl.tensor,
    head_stride: tl.tensor,
    angles_ptr: tl.tensor,
    turned_ptr: tl.tensor,
    batch: tl.tensor,
    num_heads: tl.tensor,
    WIDTH: tl.constexpr,
    ROTATED: tl.constexpr,
    BACKWARDS: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
) -> None:
    place = tl.program_id(0).to(tl.int64)
    position, sequence = place // batch, place % batch
    heads = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)
    is_head = heads < num_heads
    from_ptr = heads_ptr + position * position_stride + sequence * batch_stride + heads[:, None] * head_stride
    to_ptr = turned_ptr + (place * num_heads + heads[:, None]) * WIDTH
    HALF: tl.constexpr = ROTATED // 2
    pairs = tl.arange(0, PAIRS)
    is_pair = pairs < HALF
    # The engine repeats the angles of the first half in the second.
    angles = tl.load(angles_ptr + position * ROTATED + pairs, mask=is_pair, other=0.0)
    cos, sin = tl.cos(angles)[None, :], tl.sin(angles)[None, :]
    if BACKWARDS:
        sin = -sin
    mask = is_head[:, None] & is_pair[None, :]
    first = tl.load(from_ptr + pairs[None, :], mask=mask, other=0.0).to(tl.float32)
    second = tl.load(from_ptr + HALF + pairs[None, :], mask=mask, other=0.0).to(tl.float32)
    dtype = turned_ptr.dtype.element_ty
    tl.store(to_ptr + pairs[None, :], (first * cos - second * sin).to(dtype), mask=mask)
    tl.store(to_ptr + HALF + pairs[None, :], (second * cos + first * sin).to(dtype), mask=mask)
    if ROTATED < WIDTH:
        columns = tl.arange(0, REST)
        mask = is_head[:, None] & (columns < WIDTH - ROTATED)[None, :]
        passed = tl.load(from_ptr + ROTATED + columns[None, :], mask=mask)
        tl.store(to_ptr + ROTATED + columns[None, :], passed, mask=mask)
