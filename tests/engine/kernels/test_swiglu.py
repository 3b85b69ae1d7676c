"""SwiGLU: as exact as the engine's own line for any shape, the twin with its bits, and only the input is kept."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from megatron_adapt.engine.kernels.swiglu import swiglu
from megatron_adapt.train.memory import LiveBytes
from tests.helpers.exactness import DTYPES, allow, draw, measure_errors, run_both_ways

pytest.importorskip("triton", reason="triton is not installed")

from megatron_adapt.engine.kernels.gpu import swiglu as module

KERNELS = ("torch", "triton")


def gate(kernels):
    return lambda gate_and_up: swiglu(gate_and_up, kernels=kernels)


def plain(gate_and_up):
    """Do what megatron-core's MLP does."""
    first, second = gate_and_up.chunk(2, -1)
    return functional.silu(first) * (second + 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_at_most_twice_that_of_plain_pytorch(dtype):
    for ours, of_plain, _ in measure_errors(
        gate("triton"), plain, [4 * draw(31, 3, 666)], draw(31, 3, 333, seed=1), dtype
    ):
        assert ours <= 2 * of_plain


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 40), st.sampled_from([8, 16]), st.sampled_from(DTYPES), st.integers(0, 99)
)  # fmt: skip
def test_any_shape_and_block_gives_what_plain_pytorch_gives(num_rows, width, block, dtype, seed):
    inputs, upstream = [4 * draw(num_rows, 2 * width, seed=seed)], draw(num_rows, width, seed=seed + 1)
    with mock.patch.object(module, "_BLOCK", block):
        for ours, of_plain, norm in measure_errors(gate("triton"), plain, inputs, upstream, dtype):
            assert ours <= allow(of_plain, norm, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_twin_has_the_numbers_of_the_engine_to_the_bit(dtype):
    inputs, upstream = [4 * draw(7, 3, 50).to(dtype)], draw(7, 3, 25, seed=1).to(dtype)
    found, expected = (run_both_ways(compute, inputs, upstream) for compute in (gate("torch"), plain))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("kernels", KERNELS)
def test_rows_that_lie_apart_and_upstream_gradients_that_share_memory_are_read_where_they_are(kernels):
    upstream = draw(1, 8).expand(5, 8)
    for strided in (draw(5, 40)[:, 7:23], draw(16, 5).t(), draw(3, 5, 16).transpose(0, 1)[:, 0]):
        found = run_both_ways(gate(kernels), [strided], upstream)
        torch.testing.assert_close(found, run_both_ways(plain, [strided.clone()], upstream))


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_no_rows_give_no_rows(kernels, shape):
    out, gradient = run_both_ways(gate(kernels), [torch.empty(shape)], torch.empty(*shape[:-1], 4))
    assert out.shape == (*shape[:-1], 4)
    assert gradient.shape == shape


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(("dtype", "value"), [(torch.float16, 6e4), (torch.bfloat16, 1e30), (torch.float32, 1e30)])
def test_gates_far_from_zero_are_open_or_shut(kernels, dtype, value):
    gates, up = torch.tensor([value, -value, 0.0], dtype=dtype), torch.full((3,), 0.5, dtype=dtype)
    out, gradient = run_both_ways(gate(kernels), [torch.cat([gates, up])], torch.ones(3, dtype=dtype))
    torch.testing.assert_close(out, torch.tensor([value / 2, 0.0, 0.0], dtype=dtype))
    torch.testing.assert_close(gradient, torch.tensor([0.5, 0.0, 0.25, value, 0.0, 0.0], dtype=dtype))


@pytest.mark.parametrize("kernels", KERNELS)
def test_two_runs_give_the_same_bits(kernels):
    first, second = (run_both_ways(gate(kernels), [draw(9, 34)], draw(9, 17, seed=1)) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_the_twin_keeps_its_input_alone():
    with LiveBytes() as live:
        gate_and_up = torch.zeros(100, 64, requires_grad=True)
        out = gate("torch")(gate_and_up)
        assert live.live == gate_and_up.nbytes + out.nbytes
        of_engine = plain(gate_and_up)
        # What comes out, silu(gate) and up + 0.0.
        assert live.live == gate_and_up.nbytes + out.nbytes + 3 * of_engine.nbytes
