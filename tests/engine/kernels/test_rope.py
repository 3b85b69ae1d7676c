"""RoPE in Triton: what megatron-core computes, more exactly; its gradient is the rotation back."""

import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

from megatron_adapt.engine.kernels.rope import rotate_heads
from tests.helpers.exactness import DTYPES, allow, draw, measure_errors, rounding_as_a_gpu, run_both_ways

pytest.importorskip("triton", reason="triton is not installed")

from megatron_adapt.engine.kernels.gpu import rope as module


def make_angles(num_positions, rotated, first=0):
    """Return [T, 1, 1, R] as the engine's ``RotaryEmbedding``."""
    rates = 1e4 ** -(torch.arange(0, rotated, 2) / max(rotated, 1))
    angles = torch.outer(first + torch.arange(num_positions).float(), rates)
    return torch.cat((angles, angles), -1)[:, None, None, :]


def rotate(angles_T11R, kernels="triton"):
    return lambda heads_TBND: rotate_heads(heads_TBND, angles_T11R, kernels=kernels)


def rotate_plainly(angles_T11R):
    return lambda heads_TBND: _apply_rotary_pos_emb_bshd(
        heads_TBND, angles_T11R.double() if heads_TBND.dtype == torch.float64 else angles_T11R
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first", [0, 131_072])
def test_error_is_at_most_twice_that_of_the_engine(dtype, first):
    angles = make_angles(37, 64, first)
    for ours, plain, _ in measure_errors(
        rotate(angles), rotate_plainly(angles), [draw(37, 2, 5, 80)], draw(37, 2, 5, 80, seed=1), dtype
    ):
        assert ours <= 2 * plain


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 3), st.integers(1, 7), st.integers(1, 9), st.integers(0, 5),
    st.sampled_from([1, 4, 64]), st.sampled_from(DTYPES), st.integers(0, 99),
)  # fmt: skip
def test_any_heads_and_tiles_give_what_the_engine_gives(
    num_positions, batch, num_heads, num_pairs, rest, tile, dtype, seed
):
    angles = make_angles(num_positions, 2 * num_pairs, first=seed)
    shape = (num_positions, batch, num_heads, 2 * num_pairs + rest)
    with mock.patch.object(module, "_TILE", tile):
        for ours, plain, norm in measure_errors(
            rotate(angles), rotate_plainly(angles), [draw(*shape, seed=seed)], draw(*shape, seed=seed + 1), dtype
        ):
            assert ours <= allow(plain, norm, dtype)


def test_the_twin_has_the_bits_of_the_engine():
    angles, heads = make_angles(5, 6), draw(5, 2, 3, 8)
    assert torch.equal(rotate(angles, "torch")(heads), _apply_rotary_pos_emb_bshd(heads, angles))


def test_a_rotation_by_the_negative_angles_is_the_inverse():
    angles, heads = make_angles(9, 8), draw(9, 2, 3, 10)
    torch.testing.assert_close(rotate(-angles)(rotate(angles)(heads)), heads)


def test_the_gradient_is_the_rotation_back():
    angles, upstream = make_angles(9, 8), draw(9, 2, 3, 10)
    _, gradient = run_both_ways(rotate(angles), [draw(9, 2, 3, 10, seed=1)], upstream)
    assert torch.equal(gradient, rotate(-angles)(upstream))


def test_keys_are_read_out_of_the_joint_projection_without_a_copy():
    # [T, B, G, (queries of a group + key + value) * D], as the engine cuts it.
    mixed = draw(4, 2, 3, (2 + 2) * 8)
    _, key, _ = mixed.split([16, 8, 8], dim=3)
    angles, upstream = make_angles(4, 8), draw(2, 4, 3, 8).transpose(0, 1)
    with mock.patch.object(module, "_rotate") as kernel:
        rotate(angles)(key)
    read = kernel.__getitem__.return_value.call_args.args[0]
    assert (read.data_ptr(), read.stride()) == (key.data_ptr(), key.stride())
    expected = run_both_ways(rotate_plainly(angles), [key], upstream)
    torch.testing.assert_close(run_both_ways(rotate(angles), [key], upstream), expected)
    across = draw(4, 2, 8, 3).transpose(2, 3)
    torch.testing.assert_close(rotate(angles)(across), rotate_plainly(angles)(across))


@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (4, 0, 3, 8), (4, 2, 0, 8)])
def test_no_heads_give_no_heads(shape):
    out, gradient = run_both_ways(rotate(make_angles(shape[0], 8)), [torch.empty(shape)], torch.empty(shape))
    assert out.shape == gradient.shape == shape


@pytest.mark.parametrize(("dtype", "value"), [(torch.float16, 4e4), (torch.bfloat16, 1e38), (torch.float32, 1e38)])
def test_large_values_keep_their_length(dtype, value):
    heads = torch.full((3, 1, 1, 2), value, dtype=dtype)
    with rounding_as_a_gpu():
        turned = rotate(make_angles(3, 2))(heads).double()
    torch.testing.assert_close(
        (turned / value).norm(dim=-1), torch.full((3, 1, 1), math.sqrt(2)).double(), rtol=1e-2, atol=0
    )


def test_two_runs_give_the_same_bits():
    first, second = (
        run_both_ways(rotate(make_angles(5, 6)), [draw(5, 2, 3, 8)], draw(5, 2, 3, 8, seed=1)) for _ in range(2)
    )
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
