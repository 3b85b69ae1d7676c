"""Triton's norm, RoPE and gate inside megatron-core's layers: the same losses and gradients as with torch."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.gpt.gpt_layer_specs import HAVE_TE
from torch.nn import functional

from megatron_adapt.config import Layout
from megatron_adapt.engine.attention import pack_documents
from megatron_adapt.engine.kernels import rms_norm as twin_of_norm
from megatron_adapt.engine.llama import build_model
from megatron_adapt.engine.norm import RMSNorm
from megatron_adapt.engine.parallel import make_groups, start_engine
from megatron_adapt.shape import LlamaShape, RopeScaling
from tests.helpers.spawn import run_ranks

pytest.importorskip("triton", reason="triton is not installed")

from megatron_adapt.engine.kernels.gpu.rms_norm import RMSNormFunction
from megatron_adapt.engine.kernels.gpu.rope import RoPEFunction
from megatron_adapt.engine.kernels.gpu.swiglu import SwiGLUFunction

T = 16
SHAPE = LlamaShape(
    num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, num_query_groups=2, kv_channels=8,
    vocab_size=90, max_position_embeddings=64, layernorm_epsilon=1e-5, rotary_base=1e4, tied=False, qkv_bias=True,
    rope_scaling=RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8
    ),
)  # fmt: skip
SHARED = Layout(tensor_model_parallel_size=2, sequence_parallel=True)


def build(layout, kernels):
    model = build_model(
        SHAPE, padded_vocab_size=96, layout=replace(layout, kernels=kernels), seq_length=T, bf16=False
    )  # fmt: skip
    generator = torch.Generator().manual_seed(3 + parallel_state.get_tensor_model_parallel_rank())
    for parameter in model.parameters():
        # What all ranks hold must be the same on all of them.
        is_whole = not getattr(parameter, "tensor_model_parallel", False)
        source = torch.Generator().manual_seed(7) if is_whole else generator
        parameter.data.copy_(torch.randn(parameter.shape, generator=source) * 0.3)
    return model


def run(model, documents=None):
    """Return losses, logits and gradients."""
    ids_BT = torch.randint(0, SHAPE.vocab_size, (2, T + 1), generator=torch.Generator().manual_seed(5))
    inputs = ids_BT[:, :-1], torch.arange(T).expand(2, T), None
    loss_BT = model(*inputs, labels=ids_BT[:, 1:].contiguous(), packed_seq_params=documents)
    loss_BT.sum().backward()
    with torch.no_grad():
        logits = model(*inputs, packed_seq_params=documents)
    return [loss_BT.detach(), logits, *(parameter.grad for parameter in model.parameters())]


def find_difference(found, expected):
    """Return the largest difference of two lists of tensors, each against the largest value of its tensor."""
    assert len(found) == len(expected) > 10
    return max(
        ((one - other).abs().max() / other.abs().max()).item() for one, other in zip(found, expected, strict=True)
    )


def test_losses_logits_and_gradients_are_those_of_torch():
    with start_engine(Layout(), seed=1):
        model = build(Layout(), "triton")
        with (
            mock.patch.object(RMSNormFunction, "apply", wraps=RMSNormFunction.apply) as norms,
            mock.patch.object(RoPEFunction, "apply", wraps=RoPEFunction.apply) as rotations,
            mock.patch.object(SwiGLUFunction, "apply", wraps=SwiGLUFunction.apply) as gates,
        ):
            found = run(model)
        # Twice: for the losses and for the logits.
        counts = [function.call_count / 2 for function in (norms, rotations, gates)]
        assert counts == [2 * SHAPE.num_layers + 1, 2 * SHAPE.num_layers, SHAPE.num_layers]
        twin = build(Layout(), "torch")
        assert find_difference(found, run(twin)) < 1e-6
        assert list(twin.state_dict()) == list(model.state_dict())


def test_the_twins_have_the_losses_of_the_engine_to_the_bit():
    with start_engine(Layout(), seed=1):
        found = run(build(Layout(), "torch"))
        model = build(Layout(), "torch")
        model.config.use_te_activation_func = False
        with mock.patch.object(twin_of_norm._Norm, "apply", lambda x, w, eps: functional.rms_norm(x, w.shape, w, eps)):
            expected = run(model)
    assert all(torch.equal(one, other) for one, other in zip(found[:2], expected[:2], strict=True))
    assert find_difference(found, expected) < 1e-6


def test_documents_are_turned_by_their_places_in_the_window():
    documents = pack_documents(torch.tensor([0, 5, T, T + 9, 2 * T]), T)
    with start_engine(Layout(), seed=1):
        expected = run(build(Layout(), "torch"), documents)
        assert find_difference(run(build(Layout(), "triton"), documents), expected) < 1e-6


def test_layers_that_are_recomputed_have_the_same_gradients():
    layout = Layout(recompute_granularity="full")
    with start_engine(layout, seed=1):
        expected = run(build(Layout(), "triton"))
        assert find_difference(run(build(layout, "triton")), expected) == 0


def _compare_layouts():
    """Return the differences under the layouts of two ranks, and the marks of the norms; one process group for all."""
    differences, marks = [], []
    with start_engine(SHARED, seed=1):
        # Ranks that share windows have a piece of a window twice as long each.
        for layout in (SHARED, Layout(context_parallel_size=2)):
            parallel_state.destroy_model_parallel()
            make_groups(layout)
            model = build(layout, "triton")
            differences.append(find_difference(run(model), run(build(layout, "torch"))))
            marks.append({module.weight.sequence_parallel for module in model.modules() if isinstance(module, RMSNorm)})
    return differences, marks


def test_ranks_that_share_layers_or_windows_have_the_numbers_of_torch():
    for differences, marks in run_ranks(_compare_layouts, 2):
        assert max(differences) < 1e-6
        assert marks == [{True}, {False}]


@pytest.mark.skipif(HAVE_TE, reason="Transformer Engine fills the name")
def test_torch_leaves_the_engine_its_own_rotation(monkeypatch):
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", None)
    with start_engine(Layout(), seed=1):
        build(Layout(), "torch")
        assert rope_utils.fused_apply_rotary_pos_emb is None
        build(Layout(), "triton")
        assert rope_utils.fused_apply_rotary_pos_emb is not None
