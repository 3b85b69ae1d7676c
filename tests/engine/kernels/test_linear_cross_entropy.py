"""Head and loss in one: as exact as plain PyTorch, the same under every layout, and no work that nobody asked for."""

import importlib.util
import math
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from megatron_adapt.config import Layout, StageSettings, TrainSettings
from megatron_adapt.engine.kernels import linear_cross_entropy as module
from megatron_adapt.engine.kernels import softmax
from megatron_adapt.engine.kernels.linear_cross_entropy import Columns, linear_cross_entropy
from megatron_adapt.engine.llama import LlamaModel, build_model
from megatron_adapt.engine.parallel import make_groups, start_engine
from megatron_adapt.shape import LlamaShape
from megatron_adapt.train.memory import LiveBytes
from megatron_adapt.train.optimizer import build_trainer
from megatron_adapt.train.step import train_step
from tests.helpers.exactness import rounding_as_a_gpu
from tests.helpers.spawn import run_ranks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRITON = pytest.param(
    "triton", marks=pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
)
KERNELS = ("torch", TRITON)


def make_tensors(num_tokens, width, num_columns, dtype=torch.float32, seed=0):
    draw = torch.Generator().manual_seed(seed)
    hidden_NH = torch.randn(num_tokens, width, generator=draw).to(dtype).requires_grad_()
    weight_VH = (torch.randn(num_columns, width, generator=draw) / width**0.5 * 3).to(dtype).requires_grad_()
    return hidden_NH, weight_VH, torch.randint(0, num_columns, (num_tokens,), generator=draw)


def all_of(weight_VH):
    return Columns(first=0, num_true=len(weight_VH), group=None)


def run_ours(hidden_NH, weight_VH, labels_N, upstream_N, **options):
    loss_N, _ = linear_cross_entropy(hidden_NH, weight_VH, labels_N, all_of(weight_VH), **options)
    return [loss_N.detach(), *torch.autograd.grad(loss_N, (hidden_NH, weight_VH), upstream_N.to(loss_N.dtype))]


def run_plain(hidden_NH, weight_VH, labels_N, upstream_N):
    logits_NV = hidden_NH @ weight_VH.t()
    exact = torch.promote_types(logits_NV.dtype, torch.float32)
    loss_N = cross_entropy(logits_NV.to(exact), labels_N, reduction="none")
    return [loss_N.detach(), *torch.autograd.grad(loss_N, (hidden_NH, weight_VH), upstream_N.to(exact))]


def measure_errors(tensors, upstream_N, **options):
    """Return, for the losses and both gradients: our error, plain PyTorch's, and the norm of the fp64 reference."""
    hidden_NH, weight_VH, labels_N = tensors
    in_fp64 = [tensor.detach().double().requires_grad_() for tensor in (hidden_NH, weight_VH)]
    exact = run_plain(*in_fp64, labels_N, upstream_N.double())
    found = (run_ours(*tensors, upstream_N, **options), run_plain(*tensors, upstream_N))
    errors = [[(one.double() - other).norm().item() for one, other in zip(some, exact, strict=True)] for some in found]
    return zip(*errors, [tensor.norm().item() for tensor in exact], strict=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("upstream", ["same", "drawn"])
@pytest.mark.parametrize(
    ("kernels", "num_tokens"), [("torch", 413), pytest.param(*TRITON.values, 71, marks=TRITON.marks)]
)
def test_error_is_at_most_twice_that_of_plain_pytorch(dtype, upstream, kernels, num_tokens, monkeypatch):
    monkeypatch.setattr(module, "_COLUMN_BLOCK", 500)
    monkeypatch.setattr(module, "_count_rows", lambda *_: 56)
    upstream_N = torch.full((num_tokens,), 0.7) if upstream == "same" else torch.rand(num_tokens)
    tensors = make_tensors(num_tokens, 96, 1201, dtype)
    for ours, plain, _ in measure_errors(tensors, upstream_N, kernels=kernels):
        assert ours <= 2 * plain


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 23), st.integers(1, 17), st.integers(1, 41), st.integers(1, 9), st.integers(1, 9), st.booleans(),
    st.sampled_from(DTYPES), st.integers(0, 99),
)  # fmt: skip
def test_any_shape_and_chunk_gives_what_plain_pytorch_gives(
    num_tokens, width, num_columns, rows, block, same, dtype, seed
):
    upstream_N = (
        torch.ones(num_tokens) if same else torch.rand(num_tokens, generator=torch.Generator().manual_seed(seed))
    )
    with (
        mock.patch.object(module, "_count_rows", return_value=rows),
        mock.patch.object(module, "_COLUMN_BLOCK", block),
    ):
        tensors = make_tensors(num_tokens, width, num_columns, dtype, seed)
        for ours, plain, norm in measure_errors(tensors, upstream_N):
            # A handful of values: plain PyTorch is exact now and then.
            assert ours <= 2 * plain + 4 * torch.finfo(dtype).eps * (norm + 1)


def test_gradient_with_z_loss_is_that_of_the_formula_for_any_upstream_gradient(monkeypatch):
    monkeypatch.setattr(module, "_count_rows", lambda *_: 2)
    hidden_NH, weight_VH, labels_N = make_tensors(5, 4, 7, torch.float64)

    def compute(hidden_NH, weight_VH):
        return linear_cross_entropy(hidden_NH, weight_VH, labels_N, all_of(weight_VH), z_loss=0.1)

    log_sum_N = (hidden_NH @ weight_VH.t()).logsumexp(1)
    plain_N = cross_entropy(hidden_NH @ weight_VH.t(), labels_N, reduction="none")
    torch.testing.assert_close(compute(hidden_NH, weight_VH), (plain_N, 0.1 * log_sum_N**2))
    assert torch.autograd.gradcheck(compute, (hidden_NH, weight_VH))
    summed = torch.autograd.grad(sum(compute(hidden_NH, weight_VH)).sum(), (hidden_NH, weight_VH))
    expected = torch.autograd.grad((plain_N + 0.1 * log_sum_N**2).sum(), (hidden_NH, weight_VH))
    torch.testing.assert_close(summed, expected)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("of_z_loss", [0.0, 1.0, 3.0])
def test_loss_and_z_loss_have_the_gradient_of_a_formula_each(kernels, of_z_loss):
    """Logits (1, 2) and (0, -1), z_loss 0.5: the second token is the second column, upstream 1 and ``of_z_loss``."""
    hidden_NH = torch.tensor([[1.0, 2.0], [0.0, -1.0]], requires_grad=True)
    weight_VH, labels_N = torch.eye(2, requires_grad=True), torch.tensor([0, 1])
    loss_N, z_loss_N = linear_cross_entropy(
        hidden_NH, weight_VH, labels_N, all_of(weight_VH), z_loss=0.5, kernels=kernels
    )
    high, low = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))
    log_sums = 2 + math.log(1 + math.exp(-1)), math.log(1 + math.exp(-1))
    assert loss_N.tolist() == pytest.approx([log_sums[0] - 1, log_sums[1] + 1])
    assert z_loss_N.tolist() == pytest.approx([0.5 * log_sum**2 for log_sum in log_sums])
    (loss_N.sum() + of_z_loss * z_loss_N.sum()).backward()
    factors = [1 + of_z_loss * log_sum for log_sum in log_sums]
    expected = [[low * factors[0] - 1, high * factors[0]], [high * factors[1], low * factors[1] - 1]]
    torch.testing.assert_close(hidden_NH.grad, torch.tensor(expected))


def test_without_a_weight_there_is_no_z_loss():
    hidden_NH, weight_VH, labels_N = make_tensors(9, 4, 7)
    _, z_loss_N = linear_cross_entropy(hidden_NH, weight_VH, labels_N, all_of(weight_VH))
    assert not z_loss_N.any()
    assert not z_loss_N.requires_grad


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_second_backward_pass_gives_the_same_gradients(kernels):
    hidden_NH, weight_VH, labels_N = make_tensors(9, 4, 7)
    loss = 3 * linear_cross_entropy(hidden_NH, weight_VH, labels_N, all_of(weight_VH), kernels=kernels)[0].sum()
    first = torch.autograd.grad(loss, (hidden_NH, weight_VH), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, (hidden_NH, weight_VH)), first)


@pytest.mark.parametrize("num_masked", [1, 4, 9])
@pytest.mark.parametrize("kernels", KERNELS)
def test_a_masked_token_has_no_loss_and_leaves_no_gradient(num_masked, kernels):
    tensors = make_tensors(9, 4, 7)
    mask_N = torch.arange(9) >= num_masked
    loss_N, of_hidden_NH, of_weight_VH = run_ours(*tensors, torch.ones(9), loss_mask_N=mask_N, kernels=kernels)
    expected = run_plain(*tensors, mask_N.float())
    torch.testing.assert_close(loss_N, expected[0] * mask_N)
    torch.testing.assert_close([of_hidden_NH, of_weight_VH], expected[1:])
    assert not of_hidden_NH[:num_masked].any()


@pytest.mark.parametrize(
    ("hidden_learns", "weight_learns", "num_masked", "num_products"),
    [(True, True, 0, 3), (True, False, 0, 2), (False, True, 0, 2), (False, False, 0, 1), (True, True, 64, 1.5)],
)
@pytest.mark.parametrize("kernels", KERNELS)
def test_only_what_is_asked_for_is_computed(hidden_learns, weight_learns, num_masked, num_products, kernels):
    hidden_NH, weight_VH, labels_N = make_tensors(128, 16, 300)
    hidden_NH.requires_grad_(hidden_learns)
    weight_VH.requires_grad_(weight_learns)
    mask_N = torch.arange(128) >= num_masked if num_masked else None
    with FlopCounterMode(display=False) as counter:
        loss_N, _ = linear_cross_entropy(
            hidden_NH, weight_VH, labels_N, all_of(weight_VH), loss_mask_N=mask_N, kernels=kernels
        )
        if loss_N.requires_grad:
            loss_N.sum().backward()
    assert counter.get_total_flops() == num_products * 2 * 128 * 16 * 300
    assert (hidden_NH.grad is not None, weight_VH.grad is not None) == (hidden_learns, weight_learns)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        linear_cross_entropy(hidden_NH, weight_VH, labels_N, all_of(weight_VH), kernels=kernels)
    assert counter.get_total_flops() == 2 * 128 * 16 * 300


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_that_of_the_gradients_and_of_a_chunk(dtype, adds, monkeypatch):
    monkeypatch.setattr(module, "_count_rows", lambda *_: 56)
    num_tokens, width, num_columns = 8192, 8, 1000
    tensors = make_tensors(num_tokens, width, num_columns, dtype)
    sums_VH = torch.zeros(num_columns, width) if adds else None
    with LiveBytes() as live:
        run_ours(*tensors, torch.ones(num_tokens), weight_sums_VH=sums_VH)
    gradients = num_tokens * width * dtype.itemsize + (0 if adds else num_columns * width * 4)
    chunk = 56 * num_columns * (4 + dtype.itemsize)
    assert live.peak < gradients + 2 * chunk + 100 * num_tokens < num_tokens * num_columns * dtype.itemsize / 2


@pytest.mark.parametrize(
    ("num_columns", "dtype", "rows"),
    [(0, torch.float32, 7 << 20), (4096, torch.float32, 1792), (131_072, torch.float32, 512)],
)
def test_a_chunk_has_tokens_enough_for_its_products(num_columns, dtype, rows):
    assert module._count_rows(num_columns, "cpu", dtype) == rows


@pytest.mark.parametrize("num_masked", [0, 4, 9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_weight_gradient_is_added_to_sums_that_are_there(dtype, num_masked, monkeypatch):
    monkeypatch.setattr(module, "_count_rows", lambda *_: 3)
    tensors, mask_N = make_tensors(9, 4, 7, dtype), torch.arange(9) >= num_masked
    sums_VH = torch.arange(28.0).view(7, 4)
    loss_N, of_hidden_NH, of_weight_VH = run_ours(*tensors, torch.ones(9), loss_mask_N=mask_N, weight_sums_VH=sums_VH)
    expected = run_ours(*tensors, torch.ones(9), loss_mask_N=mask_N)
    assert loss_N.equal(expected[0])
    assert of_hidden_NH.equal(expected[1])
    assert of_weight_VH._nnz() == 0
    added_VH = sums_VH - torch.arange(28.0).view(7, 4)
    torch.testing.assert_close(added_VH, expected[2].float(), atol=1e-5, rtol=torch.finfo(dtype).eps)


def test_sums_in_fp32_are_not_rounded_to_the_type_of_the_weight(monkeypatch):
    monkeypatch.setattr(module, "_count_rows", lambda *_: 16)
    tensors = make_tensors(64, 16, 100, torch.bfloat16)
    sums_VH = torch.zeros(100, 16)
    run_ours(*tensors, torch.ones(64), weight_sums_VH=sums_VH)
    rounded_VH = run_ours(*tensors, torch.ones(64))[2]
    assert not sums_VH.equal(rounded_VH.float())
    assert sums_VH.bfloat16().equal(rounded_VH)


def test_sums_take_a_gradient_for_an_upstream_one_of_1_only(monkeypatch):
    hidden_NH, weight_VH, labels_N = make_tensors(9, 4, 7)
    for upstream_N in (torch.full((9,), 0.5), torch.arange(9.0)):
        sums_VH = torch.zeros(7, 4)
        with pytest.raises(ValueError, match="the weight gradient was added for 1"):
            run_ours(hidden_NH, weight_VH, labels_N, upstream_N, weight_sums_VH=sums_VH)
    loss_N, _ = linear_cross_entropy(hidden_NH, weight_VH, labels_N, all_of(weight_VH), weight_sums_VH=sums_VH)
    sums_VH.zero_()
    loss_N.sum().backward(retain_graph=True)
    assert not sums_VH.any(), "the forward pass has added it"
    (2 * loss_N.sum()).backward()
    expected = run_plain(hidden_NH, weight_VH, labels_N, torch.full((9,), 2.0))
    torch.testing.assert_close(sums_VH, expected[2])


def test_nothing_is_added_without_a_gradient():
    hidden_NH, weight_VH, labels_N = make_tensors(9, 4, 7)
    sums_VH = torch.zeros(7, 4)
    with torch.no_grad():
        linear_cross_entropy(hidden_NH, weight_VH, labels_N, all_of(weight_VH), weight_sums_VH=sums_VH)
    linear_cross_entropy(hidden_NH, weight_VH.detach(), labels_N, all_of(weight_VH), weight_sums_VH=sums_VH)
    assert not sums_VH.any()


T, LAYOUTS = 16, [
    Layout(),
    Layout(tensor_model_parallel_size=2),
    Layout(tensor_model_parallel_size=2, sequence_parallel=True),
    Layout(pipeline_model_parallel_size=2),
]  # fmt: skip
if importlib.util.find_spec("triton"):
    LAYOUTS.append(Layout(tensor_model_parallel_size=2, kernels="triton"))


def _compute_unfused(model, labels, logits):
    """Do what megatron-core does, with padding columns that no softmax sees."""
    first = parallel_state.get_tensor_model_parallel_rank() * logits.shape[-1]
    logits[..., max(model.true_vocab_size - first, 0) :] = torch.finfo(logits.dtype).min
    return GPTModel.compute_language_model_loss(model, labels, logits)


def _learn(layout, tied, bf16):
    """Do two steps; return losses, gradient norms and the gradients of the first step."""
    # The second tensor-parallel rank of a tied model holds nothing but padding.
    shape = LlamaShape(
        num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=2, kv_channels=8,
        vocab_size=60 if tied else 90, max_position_embeddings=64, layernorm_epsilon=1e-5, rotary_base=1e4,
        rope_scaling=None, tied=tied,
    )  # fmt: skip
    model = build_model(shape, padded_vocab_size=128, layout=layout, seq_length=T, bf16=bf16)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    stage = StageSettings(name="one", tokens=1, blend={"en": 1.0}, lr=1e-3, lr_warmup_fraction=0.0)
    trainer = build_trainer([model], TrainSettings(bf16=bf16, clip_grad=1e6), stage, 4)
    trainer.optimizer.reload_model_params()
    draw = np.random.default_rng(0)
    windows, mask = draw.integers(0, shape.vocab_size, (4, T + 1)), draw.random((4, T)) < 0.8
    first = train_step(trainer, windows, 1, loss_mask=mask)
    # Adam turns rounding of a small gradient into a whole step, so the gradients of a later step say little.
    gradients = {name: parameter.main_grad.clone() for name, parameter in model.named_parameters()}
    second = train_step(trainer, windows, 1)
    return [first.loss, first.grad_norm, second.loss, second.grad_norm], gradients


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("bf16", [False, True])
def test_a_model_learns_from_either_kernels_alike(bf16, monkeypatch):
    with start_engine(Layout(), seed=1):
        numbers, gradients = _learn(Layout(kernels="torch"), False, bf16)
        monkeypatch.setattr(softmax, "TorchSoftmax", None)
        with rounding_as_a_gpu():
            found, learned = _learn(Layout(kernels="triton"), False, bf16)
    tolerance = 2 * torch.finfo(torch.bfloat16).eps if bf16 else 1e-6
    assert found == pytest.approx(numbers, rel=tolerance)
    for name, gradient in gradients.items():
        assert (learned[name] - gradient).norm() <= tolerance * gradient.norm(), name


def _compare_layouts():
    """Return the largest relative differences of numbers and gradients, by layout; one process group for all."""
    found = []
    with start_engine(LAYOUTS[0], seed=1):
        for layout in LAYOUTS:
            parallel_state.destroy_model_parallel()
            make_groups(layout)
            for tied in (False, True):
                # Chunks of a few tokens; the second rank has fewer true columns than the first.
                with mock.patch.multiple(module, _CHUNK_VALUES={"cpu": 300}, _MIN_ROWS=3):
                    numbers, gradients = _learn(layout, tied, bf16=False)
                with (
                    mock.patch.object(LlamaModel, "_postprocess", GPTModel._postprocess),
                    mock.patch.object(LlamaModel, "compute_language_model_loss", _compute_unfused),
                ):
                    expected_numbers, expected_gradients = _learn(layout, tied, bf16=False)
                assert len(gradients) > 4
                differences = [
                    # A rank with nothing but padding has a gradient of zeros.
                    (gradient - expected).abs().max().item() / (expected.abs().max().item() or 1)
                    for gradient, expected in zip(gradients.values(), expected_gradients.values(), strict=True)
                ]
                found.append((layout, tied, numbers, expected_numbers, max(differences)))
    return found


@pytest.mark.slow
def test_losses_and_gradients_are_those_of_megatron_core_under_every_layout():
    for found in run_ranks(_compare_layouts, 2):
        assert len(found) == 2 * len(LAYOUTS)
        for layout, tied, numbers, expected, difference in found:
            assert numbers == pytest.approx(expected, rel=1e-6), (layout, tied)
            assert difference < 1e-6, (layout, tied)


@pytest.mark.parametrize("sums_VH", [None, torch.zeros(5, 4)], ids=["returned", "added"])
def test_a_gradient_that_is_not_finite_goes_on_without_another_pass(sums_VH, monkeypatch):
    """Other ranks, that do not see it, would not take part in the pass."""
    hidden_NH, weight_VH = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    columns = Columns(first=0, num_true=5, group=None)
    loss_N, _ = linear_cross_entropy(hidden_NH, weight_VH, torch.tensor([0, 1, 2]), columns, weight_sums_VH=sums_VH)
    monkeypatch.setattr(module, "_go_through", None)
    loss_N.backward(torch.tensor([1.0, math.nan, 1.0]))
    assert hidden_NH.grad.isnan().all()
    assert (weight_VH.grad if sums_VH is None else sums_VH).isnan().all()
