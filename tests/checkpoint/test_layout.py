from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_adapt.checkpoint.layout import (
    check_hf_tensors,
    check_megatron_tensors,
    list_rules,
    list_runs,
    shape_hf,
    shape_megatron,
)
from megatron_adapt.errors import CheckpointError
from megatron_adapt.shape import LlamaShape
from tests.helpers.shapes import SMALL_SHAPE

_SHAPES = st.builds(
    lambda groups, per_group, width, hidden, ffn, layers, tied, qkv_bias: LlamaShape(
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
        qkv_bias=qkv_bias,
    ),
    groups=st.integers(1, 4),
    per_group=st.integers(1, 4),
    width=st.integers(1, 6),
    hidden=st.integers(1, 9),
    ffn=st.integers(1, 7),
    layers=st.integers(1, 3),
    tied=st.booleans(),
    qkv_bias=st.booleans(),
)


def _merge(rule, parts, shape):
    """Make the Megatron tensor of one layer from ``list_runs``; every row must be written exactly once."""
    merged = torch.full(shape_megatron(rule, shape, shape.vocab_size)[int(rule.stacked) :], torch.nan)
    for part, hf_row, row, num_rows in list_runs(rule, shape):
        assert merged[row : row + num_rows].isnan().all()
        merged[row : row + num_rows] = parts[part][hf_row : hf_row + num_rows]
    return merged


@given(_SHAPES)
@settings(max_examples=60, deadline=None)
def test_runs_order_the_rows_as_megatron_does(shape):
    for rule in list_rules(shape):
        parts = [torch.randn(size) for size in shape_hf(rule, shape)]
        if rule.kind == "qkv":
            grouped = [part.reshape(shape.num_query_groups, -1, *part.shape[1:]) for part in parts]
            expected = torch.cat(grouped, dim=1).reshape(-1, *parts[0].shape[1:])
        else:
            expected = torch.cat(parts)
        assert torch.equal(_merge(rule, parts, shape), expected)


def test_qkv_rows_are_ordered_group_by_group():
    rule = next(rule for rule in list_rules(_shape()) if rule.kind == "qkv")
    letters = [("q", "q", "Q", "Q", "r", "r", "R", "R"), ("k", "k", "K", "K"), ("v", "v", "V", "V")]
    rows = [letters[part][at] for part, hf, _, n in list_runs(rule, _shape()) for at in range(hf, hf + n)]
    assert "".join(rows) == "qqQQkkvv" + "rrRRKKVV"


def _shape(tied: bool = False) -> LlamaShape:
    return replace(SMALL_SHAPE, tied=tied)


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
