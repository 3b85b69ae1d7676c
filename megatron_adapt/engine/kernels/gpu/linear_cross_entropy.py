"""What lies between the matrix products of head and loss, on a chunk of logits: two kernels, a pass over it each.

1. ``normalise``: reads the logits once, in their own type. Per row the highest one, the sum of exponentials below it,
   kept right while the highest one rises (Milakov and Gimelshein 2018, arXiv 1805.02867), and the logit of the target.
2. ``differentiate``: reads the logits once more and writes the gradient of the losses over them.

So the chunk moves three times through memory, and nothing of its size is kept beside it. Sums and exponentials are
fp32. The first kernel has one program a row, which goes through the row in blocks; the second has one a block. Blocks
that are full carry no mask: with a mask at an odd number of columns Triton loads value by value.

Shapes: N tokens, V columns of this rank.
"""

import torch
import triton
import triton.language as tl

_MAX_BLOCK = 4096
"Columns that a program holds at once, 16 a thread; fewer warps of more programs hide what a reduction waits for."
ROW_MULTIPLE = 64
"Rows should begin at a multiple of so many values: both kernels and cuBLAS then load 16 bytes at once."


def normalise(logits_NV: torch.Tensor, own_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Reduce every row of logits.

    Args:
        logits_NV: fp32, bf16 or fp16; values of a row lie side by side.
        own_N: [N] column of the target, int64; outside of V where another rank has it.

    Returns:
        [N] each, fp32: the highest logit, the sum of exponentials of what lies below it, the logit of the target (0
        where another rank has it).
    """
    highest_N, sum_N, target_N = logits_NV.new_empty(3, len(logits_NV), dtype=torch.float32)
    _normalise_row[(len(logits_NV),)](
        logits_NV, own_N.contiguous(), highest_N, sum_N, target_N, logits_NV.stride(0), **_choose_block(logits_NV)
    )
    return highest_N, sum_N, target_N


def differentiate(
    logits_NV: torch.Tensor,
    own_N: torch.Tensor,
    highest_N: torch.Tensor,
    factor_N: torch.Tensor,
    scale_N: torch.Tensor,
) -> None:
    """Turn logits into ``exp(logit - highest) * factor``, less ``scale`` at the target, in place.

    Args:
        logits_NV: as ``normalise`` read them.
        own_N: the same.
        highest_N: what it found.
        factor_N: [N] fp32.
        scale_N: [N] fp32.
    """
    options = _choose_block(logits_NV)
    blocks = triton.cdiv(logits_NV.shape[1], options["BLOCK"])
    if not blocks:
        return
    rows_N = (own_N, highest_N, factor_N, scale_N)
    _differentiate_block[(len(logits_NV), blocks)](
        logits_NV, *(row_N.contiguous() for row_N in rows_N), logits_NV.stride(0), **options
    )


def _choose_block(logits_NV: torch.Tensor) -> dict[str, int]:
    """Return the number of columns, how many a program takes at once, and the warps for them."""
    num_columns = logits_NV.shape[1]
    block = min(_MAX_BLOCK, triton.next_power_of_2(max(num_columns, 1)))
    return {"num_columns": num_columns, "BLOCK": block, "num_warps": max(1, min(8, block // 512))}


@triton.jit  # type: ignore[untyped-decorator]
def _normalise_row(
    logits_ptr: tl.tensor,
    own_ptr: tl.tensor,
    highest_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    target_ptr: tl.tensor,
    stride: tl.tensor,
    num_columns: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    places = tl.arange(0, BLOCK)
    full = num_columns // BLOCK * BLOCK
    highest = float("-inf")
    total = 0.0
    for start in range(0, full, BLOCK):
        values = tl.load(logits_ptr + start + places).to(tl.float32)
        highest, total = _add_block(values, highest, total)
    if full < num_columns:
        is_there = full + places < num_columns
        values = tl.load(logits_ptr + full + places, mask=is_there, other=float("-inf")).to(tl.float32)
        highest, total = _add_block(values, highest, total)
    own = tl.load(own_ptr + row)
    is_own = (own >= 0) & (own < num_columns)
    target = tl.load(logits_ptr + own, mask=is_own, other=0.0).to(tl.float32)
    tl.store(highest_ptr + row, highest)
    tl.store(sum_ptr + row, total)
    tl.store(target_ptr + row, target)


@triton.jit  # type: ignore[untyped-decorator]
def _add_block(values: tl.tensor, highest: tl.tensor, total: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    higher = tl.maximum(highest, tl.max(values, 0))
    # Where a row begins with a block of -inf, which low precision may overflow to, -inf - -inf is no number.
    shift = tl.where(higher == float("-inf"), 0.0, higher)
    return higher, total * tl.exp(highest - shift) + tl.sum(tl.exp(values - shift), 0)


@triton.jit  # type: ignore[untyped-decorator]
def _differentiate_block(
    logits_ptr: tl.tensor,
    own_ptr: tl.tensor,
    highest_ptr: tl.tensor,
    factor_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    stride: tl.tensor,
    num_columns: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    columns = start + tl.arange(0, BLOCK)
    logits_ptr += row * stride + columns
    is_target = columns == tl.load(own_ptr + row)
    highest, factor, scale = tl.load(highest_ptr + row), tl.load(factor_ptr + row), tl.load(scale_ptr + row)
    if start + BLOCK <= num_columns:
        values = tl.load(logits_ptr)
        tl.store(logits_ptr, _make_gradient(values, is_target, highest, factor, scale).to(values.dtype))
    else:
        is_there = columns < num_columns
        values = tl.load(logits_ptr, mask=is_there, other=0.0)
        gradient = _make_gradient(values, is_target, highest, factor, scale).to(values.dtype)
        tl.store(logits_ptr, gradient, mask=is_there)


@triton.jit  # type: ignore[untyped-decorator]
def _make_gradient(
    values: tl.tensor, is_target: tl.tensor, highest: tl.tensor, factor: tl.tensor, scale: tl.tensor
) -> tl.tensor:
    return tl.exp(values.to(tl.float32) - highest) * factor - tl.where(is_target, scale, 0.0)
