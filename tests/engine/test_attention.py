"""Core attention equals the formula; a document inside a window equals the document alone, in the whole model too."""

import math
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.transformer.enums import AttnMaskType
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_adapt.config import Layout
from megatron_adapt.engine import attention
from megatron_adapt.engine.attention import SDPACoreAttention, pack_documents
from megatron_adapt.engine.llama import build_model
from megatron_adapt.engine.parallel import start_engine
from megatron_adapt.shape import LlamaShape, RopeScaling

T, B, N, D = 9, 2, 6, 8
VOCAB = 64


def attend_by_formula(query, key, value, hidden_BTT):
    group = query.shape[2] // key.shape[2]
    key, value = (heads.repeat_interleave(group, dim=2) for heads in (key, value))
    scores_BNTT = torch.einsum("tbnd,sbnd->bnts", query, key) / math.sqrt(query.shape[-1])
    weights_BNTT = scores_BNTT.masked_fill(hidden_BTT[:, None], float("-inf")).softmax(dim=-1)
    return torch.einsum("bnts,sbnd->tbnd", weights_BNTT, value).reshape(len(query), query.shape[1], -1)


def make_heads(num_groups):
    generator = torch.Generator().manual_seed(0)
    shapes = [(T, B, N, D), (T, B, num_groups, D), (T, B, num_groups, D)]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def attend(heads, packed=None):
    config = SimpleNamespace(kv_channels=heads[0].shape[-1], context_parallel_size=1)
    core = SDPACoreAttention(config, 1, AttnMaskType.causal, "self")
    return core(*heads, None, packed_seq_params=packed)


class OperatorNames(TorchDispatchMode):
    """Notes the operators that are called."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("num_groups", [1, 2, 6])
def test_attention_equals_the_formula(num_groups):
    heads = make_heads(num_groups)
    hidden_BTT = torch.ones(B, T, T, dtype=torch.bool).triu(1)
    assert torch.allclose(attend(heads), attend_by_formula(*heads, hidden_BTT), atol=1e-5)


@given(begins=st.sets(st.integers(1, B * T - 1)), num_groups=st.sampled_from([1, 2, 6]))
@settings(deadline=None)
def test_attention_inside_documents_equals_the_formula_with_a_mask(begins, num_groups):
    cu_seqlens = torch.tensor(sorted({0, T, B * T} | begins), dtype=torch.int32)
    document_BT = torch.searchsorted(cu_seqlens, torch.arange(B * T), right=True).view(B, T)
    hidden_BTT = (document_BT[:, :, None] != document_BT[:, None]) | torch.ones(T, T, dtype=torch.bool).triu(1)
    heads = make_heads(num_groups)
    context, expected = attend(heads, pack_documents(cu_seqlens, T)), attend_by_formula(*heads, hidden_BTT)
    assert context.shape == expected.shape
    assert torch.allclose(context, expected, atol=1e-5)
    weights = torch.randn(T, B, N * D, generator=torch.Generator().manual_seed(1))
    gradients, wanted = (torch.autograd.grad(found, heads, weights) for found in (context, expected))
    for gradient, other in zip(gradients, wanted, strict=True):
        assert torch.allclose(gradient, other, atol=1e-5)


def attend_as_documented(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    """What torch's documentation says of ``varlen_attn``, whose kernels are for GPUs alone."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert (cu_seq_q[0], cu_seq_q[-1], window_size) == (0, len(query), (-1, 0))
    assert max_q == max_k == cu_seq_q.diff().max()
    assert enable_gqa or query.shape[1] == key.shape[1]
    parts = []
    for start, stop in zip(cu_seq_q[:-1].tolist(), cu_seq_k[1:].tolist(), strict=True):
        heads = (tokens[start:stop].transpose(0, 1)[None] for tokens in (query, key, value))
        found = scaled_dot_product_attention(*heads, is_causal=True, scale=scale, enable_gqa=enable_gqa)
        parts.append(found[0].transpose(0, 1))
    return torch.cat(parts)


@given(begins=st.sets(st.integers(1, B * T - 1)), num_groups=st.sampled_from([1, 2, 6]))
@settings(deadline=None)
def test_all_documents_at_once_equal_one_by_one(begins, num_groups):
    """With the kernel that a GPU has replaced by what it is said to do."""
    packed = pack_documents(torch.tensor(sorted({0, T, B * T} | begins)), T)
    heads = make_heads(num_groups)
    expected = attend(heads, packed)
    with mock.patch.multiple(attention, varlen_attn=attend_as_documented, _takes_documents=lambda _: True):
        context = attend(heads, packed)
    assert context.shape == expected.shape
    assert torch.equal(context, expected)
    weights = torch.randn(T, B, N * D, generator=torch.Generator().manual_seed(1))
    gradients, wanted = (torch.autograd.grad(found, heads, weights) for found in (context, expected))
    for gradient, other in zip(gradients, wanted, strict=True):
        assert torch.allclose(gradient, other, atol=1e-6)


@pytest.mark.parametrize(
    ("is_cuda", "dtype", "width", "takes"),
    [
        (True, torch.bfloat16, 128, True),
        (True, torch.float16, 256, True),
        (True, torch.float32, 128, False),
        (True, torch.bfloat16, 12, False),
        (True, torch.bfloat16, 264, False),
        (False, torch.bfloat16, 128, False),
    ],
)
def test_documents_go_to_one_call_where_flash_attention_takes_the_heads(is_cuda, dtype, width, takes):
    query = SimpleNamespace(is_cuda=is_cuda, dtype=dtype, shape=(T, B, N, width))
    assert attention._takes_documents(query) == takes
    with mock.patch.object(attention, "_HAS_VARLEN", False):
        assert not attention._takes_documents(query)


@pytest.mark.skipif(not attention._HAS_VARLEN, reason="this torch has no varlen_attn that knows causal attention")
@pytest.mark.parametrize("num_groups", [1, 2, 6])
def test_the_operator_of_torch_takes_the_call_forward_and_backward(num_groups):
    """On tensors without memory: it says what it takes and gives, and computes nothing."""
    packed = pack_documents(torch.tensor([0, 4, T, B * T]), T)
    packed.cu_seqlens_kv = packed.cu_seqlens_kv.to("meta")
    sizes = [(T, B, number, D) for number in (N, num_groups, num_groups)]
    heads = [torch.empty(size, dtype=torch.bfloat16, device="meta", requires_grad=True) for size in sizes]
    with mock.patch.object(attention, "_takes_documents", return_value=True), OperatorNames() as names:
        context = attend(heads, packed)
        context.backward(torch.empty_like(context))
    assert (context.shape, context.dtype) == ((T, B, N * D), torch.bfloat16)
    assert [tensor.grad.shape for tensor in heads] == [tensor.shape for tensor in heads]
    assert names.seen.count("torch_attn::_varlen_attn") == 1
    assert names.seen.count("torch_attn::_varlen_attn_backward") == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("num_groups", [1, 2, 6])
def test_on_a_gpu_all_documents_at_once_are_as_near_to_fp64_as_one_by_one(num_groups):
    packed = pack_documents(torch.tensor([0, 4, T, B * T]), T)
    heads = [tensor.detach().to("cuda", torch.bfloat16).requires_grad_() for tensor in make_heads(num_groups)]
    assert attention._takes_documents(heads[0])

    def run(heads):
        context = attend(heads, packed)
        weights = torch.randn(T, B, N * D, generator=torch.Generator().manual_seed(1)).to(context)
        return [context, *torch.autograd.grad(context, heads, weights)]

    at_once = run(heads)
    exact = run([tensor.detach().double().requires_grad_() for tensor in heads])
    with mock.patch.object(attention, "_takes_documents", return_value=False):
        one_by_one = run(heads)
    for found, other, wanted in zip(at_once, one_by_one, exact, strict=True):
        error, allowed = ((tensor.double() - wanted).abs().max() for tensor in (found, other))
        assert error <= 2 * allowed + 1e-3


# ---------------------------------------------------------------- the whole model

LENGTHS = ((5, 1, 1, 9), (1, 14, 1))
"Lengths of the documents of two windows of 16 tokens, the pieces at their edges included."
SCALED = RopeScaling(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)


def build(rope_scaling=None):
    shape = LlamaShape(
        num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=2, kv_channels=8,
        vocab_size=VOCAB, max_position_embeddings=64, layernorm_epsilon=1e-5, rotary_base=1e4,
        rope_scaling=rope_scaling, tied=False,
    )  # fmt: skip
    model = build_model(shape, padded_vocab_size=VOCAB, layout=Layout(), seq_length=16, bf16=False)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def make_windows():
    windows = torch.randint(0, VOCAB, (2, 17), generator=torch.Generator().manual_seed(5))
    lengths = [length for window in LENGTHS for length in window]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    positions_BT = torch.cat([torch.arange(length) for length in lengths]).view(2, 16)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous(), cu_seqlens, positions_BT


def run_documents(model, ids_BT, positions_BT, labels_BT, packed):
    """Return the logits [B * T, V] and the gradient of every parameter."""
    logits_BTV = model(ids_BT, positions_BT, None, packed_seq_params=packed)
    model.zero_grad(set_to_none=True)
    model(ids_BT, positions_BT, None, labels=labels_BT, packed_seq_params=packed).sum().backward()
    return logits_BTV.detach().flatten(0, 1), [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("rope_scaling", [None, SCALED], ids=["rope", "llama3-rope"])
def test_document_in_a_window_equals_the_document_alone(rope_scaling):
    ids_BT, labels_BT, cu_seqlens, reset_BT = make_windows()
    running_BT = torch.arange(16).expand(2, 16)
    with start_engine(Layout(), seed=1):
        model = build(rope_scaling)
        packed = pack_documents(cu_seqlens, 16)
        logits_NV, gradients = run_documents(model, ids_BT, running_BT, labels_BT, packed)
        parts = []
        lengths = cu_seqlens.diff().tolist()
        for ids, labels in zip(ids_BT.flatten().split(lengths), labels_BT.flatten().split(lengths), strict=True):
            parts.append(run_documents(model, ids[None], torch.arange(len(ids))[None], labels[None], None))
        assert torch.allclose(logits_NV, torch.cat([logits for logits, _ in parts]), atol=1e-5)
        for found, *alone in zip(gradients, *(gradient for _, gradient in parts), strict=True):
            expected = torch.stack(alone).sum(0)
            assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
        # Positions count in no way but by their differences, so there is nothing to reset.
        assert torch.equal(logits_NV, run_documents(model, ids_BT, reset_BT, labels_BT, packed)[0])
        whole_NV, _ = run_documents(model, ids_BT, running_BT, labels_BT, None)
        changed_N = (logits_NV - whole_NV).abs().amax(-1) > 1e-2
        first_document_N = torch.tensor([place < LENGTHS[row][0] for row in (0, 1) for place in range(16)])
        assert torch.equal(changed_N, ~first_document_N)


@pytest.mark.parametrize("recompute", ["full", "core_attn"])
def test_documents_survive_recomputation(recompute):
    ids_BT, labels_BT, cu_seqlens, positions_BT = make_windows()
    batch = (ids_BT, positions_BT, labels_BT, pack_documents(cu_seqlens, 16))
    with start_engine(Layout(), seed=1):
        model = build()
        _, expected = run_documents(model, *batch)
        if recompute == "full":
            model.config.recompute_granularity = "full"
            model.config.recompute_method = "uniform"
            model.config.recompute_num_layers = 1
        else:
            for layer in model.decoder.layers:
                layer.self_attention.checkpoint_core_attention = True
        calls = []
        model.decoder.layers[0].self_attention.core_attention.register_forward_hook(lambda *_: calls.append(1))
        _, gradients = run_documents(model, *batch)
        assert len(calls) == 3, "two forward passes, and once again in the backward pass"
        for found, wanted in zip(gradients, expected, strict=True):
            assert torch.equal(found, wanted)
