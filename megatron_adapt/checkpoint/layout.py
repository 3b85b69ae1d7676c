"""Which tensor of a Hugging Face Llama is which tensor of a Megatron checkpoint, and how to turn one into the other.

``list_rules`` is the only name table of the package. A Megatron checkpoint stores the tensors of all layers stacked
on a leading layer axis, under one key; a rule names that key, the Hugging Face tensors of one layer, and the
tensor operation between them. Every ``merge_`` has a ``split_`` that undoes it bit by bit.

Norm weights carry the names that Transformer Engine's fused layers give them. megatron-core's local layers map
theirs to the same keys when they save, so one checkpoint serves both.

Source: megatron-core 0.16 ``models/gpt/gpt_layer_specs.py`` (``sharded_state_dict_keys_map``),
``transformer/attention.py`` (order of query, key and value rows), ``transformer/mlp.py`` (gate and up rows).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_adapt.errors import CheckpointError
from megatron_adapt.shape import LlamaShape

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


@dataclass(frozen=True, kw_only=True)
class TensorRule:
    """One line of the name table.

    Attributes:
        megatron: key in the Megatron checkpoint.
        hf: names in the Hugging Face folder; ``{layer}`` stands for the layer's number.
        kind: ``copy``; ``vocab`` (a row per token, padded in Megatron); ``qkv``; ``gate_up``.
    """

    megatron: str
    hf: tuple[str, ...]
    kind: Literal["copy", "vocab", "qkv", "gate_up"] = "copy"

    @property
    def stacked(self) -> bool:
        """Whether the Megatron tensor has a leading layer axis."""
        return "{layer}" in self.hf[0]

    def name_hf(self, layer: int) -> list[str]:
        """Return the Hugging Face names of one layer."""
        return [name.format(layer=layer) for name in self.hf]


_LAYER = "model.layers.{layer}."
_LAYER_RULES = (
    TensorRule(
        megatron="decoder.layers.self_attention.linear_qkv.layer_norm_weight",
        hf=(_LAYER + "input_layernorm.weight",),
    ),
    TensorRule(
        megatron="decoder.layers.self_attention.linear_qkv.weight",
        hf=tuple(f"{_LAYER}self_attn.{part}_proj.weight" for part in "qkv"),
        kind="qkv",
    ),
    TensorRule(
        megatron="decoder.layers.self_attention.linear_proj.weight",
        hf=(_LAYER + "self_attn.o_proj.weight",),
    ),
    TensorRule(
        megatron="decoder.layers.mlp.linear_fc1.layer_norm_weight",
        hf=(_LAYER + "post_attention_layernorm.weight",),
    ),
    TensorRule(
        megatron="decoder.layers.mlp.linear_fc1.weight",
        hf=(_LAYER + "mlp.gate_proj.weight", _LAYER + "mlp.up_proj.weight"),
        kind="gate_up",
    ),
    TensorRule(
        megatron="decoder.layers.mlp.linear_fc2.weight",
        hf=(_LAYER + "mlp.down_proj.weight",),
    ),
)
_EXTRA_STATE_MODULES = (
    "self_attention.linear_qkv",
    "self_attention.core_attention",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)


def list_rules(shape: LlamaShape) -> list[TensorRule]:
    """Return the name table of a model; a tied model has no output head."""
    rules = [
        TensorRule(megatron="embedding.word_embeddings.weight", hf=(EMBEDDING,), kind="vocab"),
        *_LAYER_RULES,
        TensorRule(megatron="decoder.final_layernorm.weight", hf=("model.norm.weight",)),
    ]
    if not shape.tied:
        rules.append(TensorRule(megatron="output_layer.weight", hf=(HEAD,), kind="vocab"))
    return rules


def list_extra_states(num_layers: int) -> list[str]:
    """Return the keys of the (empty) quantisation states that stock Megatron-LM asks of a checkpoint.

    megatron-core's local linear layers save one each, Transformer Engine's also the core attention and the
    final norm; a load stops at a key that is not there, and ignores one it does not know.
    """
    layers = [
        f"decoder.layers.{module}._extra_state/shard_{layer}_{num_layers}"
        for module in _EXTRA_STATE_MODULES
        for layer in range(num_layers)
    ]
    return [*layers, "decoder.final_layernorm._extra_state/shard_0_1"]


def list_parts(rule: TensorRule, shape: LlamaShape) -> list[int]:
    """Return the layers a rule goes through; a tensor outside the layers counts as layer 0."""
    return list(range(shape.num_layers)) if rule.stacked else [0]


def shape_hf(rule: TensorRule, shape: LlamaShape) -> list[tuple[int, ...]]:
    """Return the shapes of the Hugging Face tensors of one layer, in the order of the rule's names."""
    hidden, width = shape.hidden_size, shape.kv_channels
    queries, keys = shape.num_attention_heads * width, shape.num_query_groups * width
    if rule.kind == "vocab":
        return [(shape.vocab_size, hidden)]
    if rule.kind == "qkv":
        return [(queries, hidden), (keys, hidden), (keys, hidden)]
    if rule.kind == "gate_up":
        return [(shape.ffn_hidden_size, hidden)] * 2
    if rule.megatron.endswith("linear_proj.weight"):
        return [(hidden, queries)]
    if rule.megatron.endswith("linear_fc2.weight"):
        return [(hidden, shape.ffn_hidden_size)]
    return [(hidden,)]


def shape_megatron(rule: TensorRule, shape: LlamaShape, padded_vocab_size: int) -> tuple[int, ...]:
    """Return the shape of the Megatron tensor, with its layer axis where it has one."""
    if rule.kind == "vocab":
        return (padded_vocab_size, shape.hidden_size)
    parts = shape_hf(rule, shape)
    one = (sum(part[0] for part in parts), *parts[0][1:])
    return (shape.num_layers, *one) if rule.stacked else one


def merge_tensors(rule: TensorRule, tensors: Sequence[torch.Tensor], shape: LlamaShape) -> torch.Tensor:
    """Make the Megatron tensor of one layer (without layer axis); ``split_tensor`` is the inverse."""
    if rule.kind == "qkv":
        q, k, v = tensors
        return merge_qkv(q, k, v, num_query_groups=shape.num_query_groups)
    if rule.kind == "gate_up":
        gate, up = tensors
        return merge_gate_up(gate, up)
    return tensors[0]


def split_tensor(rule: TensorRule, tensor: torch.Tensor, shape: LlamaShape) -> list[torch.Tensor]:
    """Make the Hugging Face tensors of one layer; ``merge_tensors`` is the inverse."""
    if rule.kind == "qkv":
        heads_per_group = shape.num_attention_heads // shape.num_query_groups
        return list(split_qkv(tensor, num_query_groups=shape.num_query_groups, heads_per_group=heads_per_group))
    if rule.kind == "gate_up":
        return list(split_gate_up(tensor))
    return [tensor]


def merge_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, num_query_groups: int) -> torch.Tensor:
    """Interleave the projections group by group: [queries of group g, key g, value g] for every g.

    Args:
        q: [N * D, H].
        k: [G * D, H].
        v: [G * D, H].
        num_query_groups: G, the number of key-value heads.

    Returns:
        [(N + 2 G) * D, H]. No row is permuted within a head: both sides rotate halves, not pairs.
    """
    hidden = q.shape[-1]
    grouped = [part.reshape(num_query_groups, -1, hidden) for part in (q, k, v)]
    return torch.cat(grouped, dim=1).reshape(-1, hidden)


def split_qkv(
    qkv: torch.Tensor, *, num_query_groups: int, heads_per_group: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Take the projections apart again; the inverse of ``merge_qkv``.

    Args:
        qkv: [(N + 2 G) * D, H].
        num_query_groups: G.
        heads_per_group: N / G.

    Returns:
        q [N * D, H], k [G * D, H], v [G * D, H].
    """
    hidden = qkv.shape[-1]
    grouped = qkv.reshape(num_query_groups, -1, hidden)
    width = grouped.shape[1] // (heads_per_group + 2)
    q, k, v = grouped[:, : -2 * width], grouped[:, -2 * width : -width], grouped[:, -width:]
    return q.reshape(-1, hidden), k.reshape(-1, hidden), v.reshape(-1, hidden)


def merge_gate_up(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Put the gate rows above the up rows: two [F, H] to [2 F, H].

    This is the global tensor of a checkpoint. In memory each tensor-parallel rank holds its share of both.
    """
    return torch.cat([gate, up])


def split_gate_up(merged: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return gate and up rows; the inverse of ``merge_gate_up``."""
    gate, up = merged.chunk(2)
    return gate, up


def check_hf_tensors(shapes: Mapping[str, tuple[int, ...]], shape: LlamaShape, where: str) -> None:
    """Refuse a Hugging Face folder whose tensors are not exactly those of its config.

    Args:
        shapes: shape of every tensor in the folder.
        shape: what ``config.json`` says.
        where: the folder, for messages.

    Raises:
        CheckpointError: a tensor is missing, unknown or of another shape.
    """
    expected = {
        name: size
        for rule in list_rules(shape)
        for layer in list_parts(rule, shape)
        for name, size in zip(rule.name_hf(layer), shape_hf(rule, shape), strict=True)
    }
    _compare_shapes({name: size for name, size in shapes.items() if not _is_redundant(name, shape)}, expected, where)


def _is_redundant(name: str, shape: LlamaShape) -> bool:
    """Tell whether a tensor only repeats what others say: rotary tables of old Llama files, a tied head."""
    return name.endswith("rotary_emb.inv_freq") or (shape.tied and name == HEAD)


def check_megatron_tensors(
    shape_of: Callable[[str], tuple[int, ...] | None], shape: LlamaShape, padded_vocab_size: int, where: str
) -> None:
    """Refuse a Megatron checkpoint that lacks a tensor of the model or has it in another shape.

    Other keys (optimizer, random states) are allowed: a checkpoint of a training run has them.

    Args:
        shape_of: returns the shape of a key, or None when the checkpoint has no such tensor.
        shape: the model.
        padded_vocab_size: rows of the vocabulary matrices.
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: as said.
    """
    expected = {rule.megatron: shape_megatron(rule, shape, padded_vocab_size) for rule in list_rules(shape)}
    found = {key: size for key in expected if (size := shape_of(key)) is not None}
    _compare_shapes(found, expected, where)


def _compare_shapes(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: str) -> None:
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    if missing:
        raise CheckpointError(
            f"{where}: {len(missing)} tensors missing, first {missing[0]}; the checkpoint is incomplete, fetch it again"
        )
    if unknown:
        raise CheckpointError(
            f"{where}: {len(unknown)} tensors that no Llama has, first {unknown[0]}; "
            "the engine would ignore them, so this model is not supported"
        )
    for name, size in expected.items():
        if tuple(found[name]) != tuple(size):
            raise CheckpointError(
                f"{where}: {name} has shape {tuple(found[name])}, its config says {tuple(size)}; "
                "config and weights do not belong together, fetch both again"
            )
