import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_adapt.checkpoint.layout import (
    check_hf_tensors,
    check_megatron_tensors,
    list_rules,
    merge_gate_up,
    merge_qkv,
    merge_tensors,
    shape_hf,
    shape_megatron,
    split_gate_up,
    split_qkv,
    split_tensor,
)
from megatron_adapt.errors import CheckpointError
from megatron_adapt.shape import LlamaShape

_SHAPES = st.builds(
    lambda groups, per_group, width, hidden, ffn, layers, tied: LlamaShape(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=groups * per_group,
        num_query_groups=groups,
        kv_channels=width,
        vocab_size=11,
        max_position_embeddings=16,
        layernorm_epsilon=1e-5,
        rotary_base=1e4,
        rope_scaling=None,
        tied=tied,
    ),
    groups=st.integers(1, 4),
    per_group=st.integers(1, 4),
    width=st.integers(1, 6),
    hidden=st.integers(1, 9),
    ffn=st.integers(1, 7),
    layers=st.integers(1, 3),
    tied=st.booleans(),
)


@given(_SHAPES)
@settings(max_examples=60, deadline=None)
def test_split_undoes_merge_for_every_rule(shape):
    for rule in list_rules(shape):
        parts = [torch.randn(size) for size in shape_hf(rule, shape)]
        merged = merge_tensors(rule, parts, shape)
        expected = shape_megatron(rule, shape, shape.vocab_size)
        assert tuple(merged.shape) == (expected[1:] if rule.stacked else expected)
        again = split_tensor(rule, merged, shape)
        assert len(again) == len(parts)
        assert all(torch.equal(a, b) for a, b in zip(again, parts, strict=True))


def test_qkv_rows_are_ordered_group_by_group():
    rows = {name: torch.tensor([[float(n)]]) for n, name in enumerate(("q0", "q1", "q2", "q3", "k0", "k1", "v0", "v1"))}
    q = torch.cat([rows[f"q{n}"] for n in range(4)])
    k, v = (torch.cat([rows[f"{part}{n}"] for n in range(2)]) for part in "kv")
    expected = torch.cat([rows[name] for name in ("q0", "q1", "k0", "v0", "q2", "q3", "k1", "v1")])
    assert torch.equal(merge_qkv(q, k, v, num_query_groups=2), expected)
    assert all(
        torch.equal(a, b)
        for a, b in zip(split_qkv(expected, num_query_groups=2, heads_per_group=2), (q, k, v), strict=True)
    )


def test_gate_lies_above_up():
    gate, up = torch.zeros(3, 2), torch.ones(3, 2)
    assert torch.equal(merge_gate_up(gate, up), torch.tensor([[0.0] * 2] * 3 + [[1.0] * 2] * 3))
    assert all(torch.equal(a, b) for a, b in zip(split_gate_up(torch.cat([gate, up])), (gate, up), strict=True))


def _shape(tied: bool = False) -> LlamaShape:
    return LlamaShape(
        num_layers=2,
        hidden_size=8,
        ffn_hidden_size=12,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=2,
        vocab_size=11,
        max_position_embeddings=16,
        layernorm_epsilon=1e-5,
        rotary_base=1e4,
        rope_scaling=None,
        tied=tied,
    )


def _hf_shapes(shape: LlamaShape) -> dict[str, tuple[int, ...]]:
    return {
        name: size
        for rule in list_rules(shape)
        for layer in (range(shape.num_layers) if rule.stacked else [0])
        for name, size in zip(rule.name_hf(layer), shape_hf(rule, shape), strict=True)
    }


def test_a_missing_tensor_is_named():
    shapes = _hf_shapes(_shape())
    del shapes["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(CheckpointError, match=r"DIR: 1 tensors missing, first model\.layers\.1\.mlp\.up_proj"):
        check_hf_tensors(shapes, _shape(), "DIR")


def test_a_tensor_the_engine_would_ignore_is_refused():
    shapes = {**_hf_shapes(_shape()), "model.layers.0.self_attn.q_proj.bias": (8,)}
    with pytest.raises(CheckpointError, match=r"1 tensors that no Llama has, first .*q_proj\.bias"):
        check_hf_tensors(shapes, _shape(), "DIR")


def test_rotary_tables_and_the_head_of_a_tied_model_are_passed_over():
    shapes = {**_hf_shapes(_shape(tied=True)), "lm_head.weight": (11, 8)}
    shapes["model.layers.0.self_attn.rotary_emb.inv_freq"] = (1,)
    check_hf_tensors(shapes, _shape(tied=True), "DIR")


def test_a_matrix_that_differs_from_the_config_is_refused_with_both_shapes():
    shapes = {**_hf_shapes(_shape()), "model.embed_tokens.weight": (12, 8)}
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight has shape \(12, 8\), its config says \(11, 8\)"):
        check_hf_tensors(shapes, _shape(), "DIR")


def test_a_megatron_checkpoint_may_hold_more_than_the_model_but_not_less():
    shape = _shape()
    sizes = {rule.megatron: shape_megatron(rule, shape, 16) for rule in list_rules(shape)}
    check_megatron_tensors({**sizes, "optimizer.state.exp_avg.x": (3,)}.get, shape, 16, "DIR")
    with pytest.raises(CheckpointError, match=r"embedding.* has shape \(16, 8\), its config says \(32, 8\)"):
        check_megatron_tensors(sizes.get, shape, 32, "DIR")
    del sizes["output_layer.weight"]
    with pytest.raises(CheckpointError, match=r"1 tensors missing, first output_layer\.weight"):
        check_megatron_tensors(sizes.get, shape, 16, "DIR")
