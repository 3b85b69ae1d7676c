"""Triton's part of head and loss, interpreted: as exact as plain PyTorch, and what its torch twin computes.

The interpreter cuts off where it makes bf16 of fp32; a GPU rounds.
"""

import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

pytest.importorskip("triton", reason="triton is not installed")

from megatron_adapt.engine.kernels import linear_cross_entropy as module
from megatron_adapt.engine.kernels import softmax
from megatron_adapt.engine.kernels.gpu import linear_cross_entropy as gpu
from megatron_adapt.engine.kernels.linear_cross_entropy import Columns, linear_cross_entropy
from megatron_adapt.engine.kernels.softmax import TorchSoftmax, TritonSoftmax

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCKS = (1, 4, 16, 4096)


def compute_ours(hidden_NH, weight_VH, labels_N, mask_N, num_true, z_loss):
    columns = Columns(first=0, num_true=num_true, group=None)
    return linear_cross_entropy(
        hidden_NH, weight_VH, labels_N, columns, loss_mask_N=mask_N, z_loss=z_loss, kernels="triton"
    )


def compute_plain(hidden_NH, weight_VH, labels_N, mask_N, num_true, z_loss):
    logits_NV = hidden_NH @ weight_VH[:num_true].t()
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    loss_N, log_sum_N = cross_entropy(logits_NV, labels_N, reduction="none"), logits_NV.logsumexp(1)
    return loss_N * mask_N, z_loss * log_sum_N**2 * mask_N


def run(compute, tensors, learning, upstream, *rest):
    """Return losses, z-losses and the gradients of what learns."""
    tensors = [tensor.clone().requires_grad_(learns) for tensor, learns in zip(tensors, learning, strict=True)]
    found = compute(*tensors, *rest)
    total = sum((loss_N * of_N).sum() for loss_N, of_N in zip(found, upstream, strict=True))
    gradients = torch.autograd.grad(total, [tensor for tensor in tensors if tensor.requires_grad])
    return [*(loss_N.detach() for loss_N in found), *gradients]


@settings(max_examples=60, deadline=None)
@given(
    num_tokens=st.integers(1, 7), width=st.integers(1, 9), num_true=st.integers(1, 41), num_padding=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES), masked=st.sampled_from(("none", "some", "all")), z_loss=st.sampled_from((0, 0.1)),
    upstream=st.sampled_from(("same", "drawn", "drawn twice")), block=st.sampled_from(BLOCKS),
    rows=st.integers(1, 9),
    learning=st.sampled_from(((True, True), (True, False), (False, True))), seed=st.integers(0, 99),
)  # fmt: skip
def test_error_is_at_most_twice_that_of_plain_pytorch(
    num_tokens, width, num_true, num_padding, dtype, masked, z_loss, upstream, block, rows, learning, seed
):
    draw = torch.Generator().manual_seed(seed)
    hidden_NH = torch.randn(num_tokens, width, generator=draw).to(dtype)
    weight_VH = (torch.randn(num_true + num_padding, width, generator=draw) / width**0.5 * 3).to(dtype)
    labels_N = torch.randint(0, num_true, (num_tokens,), generator=draw)
    mask_N = torch.rand(num_tokens, generator=draw) < {"none": 2, "some": 0.5, "all": 0}[masked]
    of_loss_N, of_z_loss_N = torch.rand(2, num_tokens, generator=draw)
    same_N = torch.full((num_tokens,), 0.7)
    drawn = {"same": (same_N, same_N), "drawn": (of_loss_N, of_loss_N), "drawn twice": (of_loss_N, of_z_loss_N)}
    rest = learning, drawn[upstream], labels_N, mask_N, num_true, z_loss
    with (
        mock.patch.object(module, "_count_rows", return_value=rows),
        mock.patch.object(gpu, "_MAX_BLOCK", block),
    ):
        ours = run(compute_ours, (hidden_NH, weight_VH), *rest)
    plain = run(compute_plain, (hidden_NH, weight_VH), *rest)
    exact = run(compute_plain, (hidden_NH.double(), weight_VH.double()), *rest)
    assert len(ours) == 2 + sum(learning)
    for our, one, reference in zip(ours, plain, exact, strict=True):
        assert our.dtype == one.dtype
        # A handful of values: plain PyTorch is exact now and then.
        floor = 4 * torch.finfo(dtype).eps * (reference.norm() + 1)
        assert (our.double() - reference).norm() <= 2 * (one.double() - reference).norm() + floor


def go_through(implement, logits_NV, own_N, factor_N, scale_N):
    """Return logit of the target, logarithm of the sum, and the gradient of a chunk."""
    num_rows, num_columns = logits_NV.shape
    reader = implement(logits_NV.new_empty(num_rows, 1), num_rows + 2, num_columns)
    chunk_NV = reader.logits_NV[:num_rows].copy_(logits_NV)
    found = reader.normalise(chunk_NV, own_N)
    return [*found, reader.differentiate(chunk_NV, factor_N, scale_N)]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5), st.integers(0, 41), st.sampled_from(DTYPES), st.booleans(), st.sampled_from(BLOCKS),
    st.sampled_from((0.1, 3, 30)), st.integers(0, 99),
)  # fmt: skip
def test_a_chunk_is_that_of_the_torch_twin_on_any_rank(num_rows, num_columns, dtype, scaled, block, spread, seed):
    """Targets lie in front of the columns of the rank, among them, or behind; there may be no column."""
    draw = torch.Generator().manual_seed(seed)
    logits_NV = (torch.randn(num_rows, num_columns, generator=draw) * spread).to(dtype)
    own_N = torch.randint(-num_columns - 1, 2 * num_columns + 1, (num_rows,), generator=draw)
    factor_N, scale_N = torch.rand(2, num_rows, generator=draw)
    arguments = logits_NV, own_N, factor_N if scaled else None, scale_N
    with mock.patch.object(gpu, "_MAX_BLOCK", block):
        ours = go_through(TritonSoftmax, *arguments)
    for our, expected in zip(ours, go_through(TorchSoftmax, *arguments), strict=True):
        # The logarithm is fp64, of sums in fp32.
        tolerance = 2 * max(torch.finfo(expected.dtype).eps, torch.finfo(torch.float32).eps)
        torch.testing.assert_close(our, expected, rtol=10 * tolerance, atol=tolerance)


@pytest.mark.parametrize("strided", [False, True])
def test_an_upstream_gradient_may_be_a_view(strided):
    """``sum().backward()`` hands on one number that is read for all tokens."""
    hidden_NH, weight_VH, labels_N = torch.randn(4, 3), torch.randn(5, 3), torch.tensor([0, 1, 4, 2])
    of_loss_N = torch.rand(8)[::2] if strided else torch.tensor(0.5).expand(4)
    rest = (True, True), (of_loss_N, 2 * of_loss_N), labels_N, torch.ones(4) > 0, 5, 0.1
    expected = run(compute_plain, (hidden_NH, weight_VH), *rest)
    torch.testing.assert_close(run(compute_ours, (hidden_NH, weight_VH), *rest), expected)


def test_a_row_may_begin_with_a_block_of_minus_infinity():
    logits_NV = torch.tensor([[-math.inf] * 4 + [1.0, 2.0, -math.inf]])
    with mock.patch.object(gpu, "_MAX_BLOCK", 2):
        found = go_through(TritonSoftmax, logits_NV, torch.tensor([5]), None, torch.ones(1))
    torch.testing.assert_close(found, go_through(TorchSoftmax, logits_NV, torch.tensor([5]), None, torch.ones(1)))
    assert found[1].item() == pytest.approx(2 + math.log(1 + math.exp(-1)))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_shows_in_the_loss(value):
    """So that the step is left out."""
    logits_NV = torch.zeros(2, 5)
    logits_NV[0, 3] = value
    with mock.patch.object(gpu, "_MAX_BLOCK", 2):
        _, log_sum_N, _ = go_through(TritonSoftmax, logits_NV, torch.tensor([0, 0]), None, torch.ones(2))
    assert log_sum_N[0].isnan()
    assert log_sum_N[1].item() == pytest.approx(math.log(5))


def test_rows_are_aligned_and_what_lies_between_them_is_left_alone():
    reader = TritonSoftmax(torch.empty(3, 1, dtype=torch.bfloat16), 3, 65)
    assert reader.logits_NV.stride() == (128, 1)
    whole_NV = torch.full((3, 128), 7.0)
    _, _, of_logits_NV = go_through(TritonSoftmax, whole_NV[:, :65], torch.tensor([64, 0, 1]), None, torch.ones(3))
    highest_N, sum_N, _ = gpu.normalise(whole_NV[:, :65], torch.tensor([64, 0, 1]))
    gpu.differentiate(whole_NV[:, :65], torch.tensor([64, 0, 1]), highest_N, 1 / sum_N, torch.ones(3))
    assert (whole_NV[:, 65:] == 7).all()
    torch.testing.assert_close(whole_NV[:, :65], of_logits_NV)


def test_no_copy_of_a_chunk_in_fp32_is_made():
    hidden_NH, weight_VH = torch.randn(8, 4).bfloat16(), torch.randn(50, 4).bfloat16().requires_grad_()
    labels_N, make, made = torch.arange(8), torch.empty_like, []
    with mock.patch.object(torch, "empty_like", lambda *args, **options: made.append(args) or make(*args, **options)):
        for kernels in ("triton", "torch"):
            linear_cross_entropy(
                hidden_NH, weight_VH, labels_N, Columns(first=0, num_true=50, group=None), kernels=kernels
            )
            made.append(kernels)
    assert made[0] == "triton"
    assert [tuple(args[0].shape) for args in made[1:-1]] == [(8, 50)]


def test_fp64_goes_the_torch_way(monkeypatch):
    monkeypatch.setattr(softmax, "TritonSoftmax", None)
    found = compute_ours(torch.randn(3, 4).double(), torch.randn(5, 4).double(), torch.arange(3), None, 5, 0.0)
    assert found[0].dtype == torch.float64
