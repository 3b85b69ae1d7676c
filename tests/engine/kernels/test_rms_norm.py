"""RMSNorm: as exact as plain PyTorch for any rows, the same bits in every run, and little is kept."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from megatron_adapt.engine.kernels.rms_norm import rms_norm
from megatron_adapt.train.memory import LiveBytes
from tests.helpers.exactness import DTYPES, allow, draw, measure_errors, run_both_ways

pytest.importorskip("triton", reason="triton is not installed")

from megatron_adapt.engine.kernels.gpu import rms_norm as module

KERNELS = ("torch", "triton")
EPS = 1e-5


def normalise(kernels):
    return lambda hidden, weight_H: rms_norm(hidden, weight_H, EPS, kernels=kernels)


def plain(hidden, weight_H):
    return functional.rms_norm(hidden, weight_H.shape, weight_H, EPS)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_at_most_twice_that_of_plain_pytorch(kernels, dtype):
    inputs = [draw(61, 3, 333), draw(333, seed=1)]
    for ours, of_plain, _ in measure_errors(normalise(kernels), plain, inputs, draw(61, 3, 333, seed=2), dtype):
        assert ours <= 2 * of_plain


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 23), st.integers(2, 70), st.sampled_from([1, 16, 64]), st.integers(1, 5), st.sampled_from(KERNELS),
    st.sampled_from(DTYPES), st.integers(0, 99),
)  # fmt: skip
def test_any_rows_and_tiles_give_what_plain_pytorch_gives(num_rows, width, tile, num_sums, kernels, dtype, seed):
    inputs, upstream = [draw(num_rows, width, seed=seed), draw(width, seed=seed + 1)], draw(num_rows, width, seed=7)
    with mock.patch.object(module, "_TILE", tile), mock.patch.object(module, "_NUM_SUMS", num_sums):
        for ours, of_plain, norm in measure_errors(normalise(kernels), plain, inputs, upstream, dtype):
            assert ours <= allow(of_plain, norm, dtype)


@pytest.mark.parametrize("kernels", KERNELS)
def test_rows_that_lie_apart_and_upstream_gradients_that_share_memory_are_read_where_they_are(kernels):
    hidden, weight_H = draw(5, 40), draw(16)
    upstream = draw(1, 16).expand(5, 16)
    for strided in (hidden[:, 7:23], draw(16, 5).t(), draw(3, 5, 16).transpose(0, 1)[:, 0]):
        found = run_both_ways(normalise(kernels), [strided, weight_H], upstream)
        expected = run_both_ways(plain, [strided.clone(), weight_H], upstream)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_no_rows_leave_a_gradient_of_zeros(kernels, shape):
    out, of_hidden, of_weight_H = run_both_ways(normalise(kernels), [torch.empty(shape), draw(8)], torch.empty(shape))
    assert out.shape == of_hidden.shape == shape
    assert not of_weight_H.any()


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(("dtype", "value"), [(torch.float16, 6e4), (torch.bfloat16, 1e18), (torch.float32, 1e18)])
def test_squares_of_large_values_do_not_overflow(kernels, dtype, value):
    hidden = torch.tensor([[value, -value, value, value]], dtype=dtype)
    weight_H, upstream = torch.ones(4, dtype=dtype), torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=dtype)
    out, of_hidden, of_weight_H = run_both_ways(normalise(kernels), [hidden, weight_H], upstream)
    torch.testing.assert_close(out, hidden.sign())
    torch.testing.assert_close(of_weight_H, torch.tensor([1.0, -2.0, 3.0, 4.0], dtype=dtype))
    assert of_hidden.isfinite().all()


@pytest.mark.parametrize("kernels", KERNELS)
def test_two_runs_give_the_same_bits(kernels):
    inputs, upstream = [draw(700, 24), draw(24, seed=1)], draw(700, 24, seed=2)
    first, second = (run_both_ways(normalise(kernels), inputs, upstream) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("learns", [(True, False), (False, True)])
def test_only_the_gradient_that_is_asked_for_is_computed(kernels, learns):
    inputs = [draw(6, 8).requires_grad_(learns[0]), draw(8).requires_grad_(learns[1])]
    normalise(kernels)(*inputs).backward(draw(6, 8, seed=1))
    expected = run_both_ways(plain, inputs, draw(6, 8, seed=1))[1:]
    for tensor, gradient, is_asked in zip(inputs, expected, learns, strict=True):
        assert (tensor.grad is not None) == is_asked
        if is_asked:
            torch.testing.assert_close(tensor.grad, gradient)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_twin_has_the_bits_of_torch_and_keeps_one_number_a_row_beside_its_input(dtype):
    hidden, weight_H = draw(500, 64).to(dtype).requires_grad_(), draw(64).to(dtype).requires_grad_()
    with LiveBytes() as live:
        before = live.live
        out = normalise("torch")(hidden, weight_H)
        kept = live.live - before
    assert torch.equal(out, plain(hidden, weight_H))
    assert kept == out.nbytes + 500 * 4
    with LiveBytes() as live:
        plain(hidden, weight_H).sum()
        assert live.peak > out.nbytes + 500 * 64 * 4
