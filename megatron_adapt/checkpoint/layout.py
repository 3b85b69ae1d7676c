"""Which rows of a Hugging Face Llama are which rows of a Megatron checkpoint.

``list_rules`` is the only name table of the package. A Megatron checkpoint stores the tensors of all layers stacked
on a leading layer axis, under one key; a rule names that key, the Hugging Face tensors of one layer, and the
order of their rows (``list_runs``): the two sides hold the same rows, so that one table serves both directions.

Norm weights carry the names that Transformer Engine's fused layers give them. megatron-core's local layers map
theirs to the same keys when they save, so one checkpoint serves both.

Source: megatron-core 0.16 ``models/gpt/gpt_layer_specs.py`` (``sharded_state_dict_keys_map``),
``transformer/attention.py`` (order of query, key and value rows), ``transformer/mlp.py`` (gate and up rows).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from megatron_adapt.errors import CheckpointError
from megatron_adapt.shape import LlamaShape

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
STACKED_PREFIX = "decoder.layers."
"Keys with a leading layer axis begin so."


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
_QKV_BIAS_RULE = TensorRule(
    megatron="decoder.layers.self_attention.linear_qkv.bias",
    hf=tuple(f"{_LAYER}self_attn.{part}_proj.bias" for part in "qkv"),
    kind="qkv",
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
        *([_QKV_BIAS_RULE] if shape.qkv_bias else []),
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
    if rule is _QKV_BIAS_RULE:
        return [(queries,), (keys,), (keys,)]
    if rule.kind == "qkv":
        return [(queries, hidden), (keys, hidden), (keys, hidden)]
    if rule.kind == "gate_up":
        return [(shape.ffn_hidden_size, hidden)] * 2
    if rule.megatron.endswith("linear_proj.weight"):
        return [(hidden, queries)]
    if rule.megatron.endswith("linear_fc2.weight"):
        return [(hidden, shape.ffn_hidden_size)]
    return [(hidden,)]


def list_hf_tensors(shape: LlamaShape) -> Iterator[tuple[TensorRule, str, tuple[int, ...]]]:
    """Yield rule, name and shape of every Hugging Face tensor of a model."""
    for rule in list_rules(shape):
        sizes = shape_hf(rule, shape)
        for layer in list_parts(rule, shape):
            for name, size in zip(rule.name_hf(layer), sizes, strict=True):
                yield rule, name, size


def shape_megatron(rule: TensorRule, shape: LlamaShape, padded_vocab_size: int) -> tuple[int, ...]:
    """Return the shape of the Megatron tensor, with its layer axis where it has one."""
    if rule.kind == "vocab":
        return (padded_vocab_size, shape.hidden_size)
    parts = shape_hf(rule, shape)
    one = (sum(part[0] for part in parts), *parts[0][1:])
    return (shape.num_layers, *one) if rule.stacked else one


class Run(NamedTuple):
    """Rows that lie side by side on both sides.

    Attributes:
        part: which Hugging Face tensor of the rule.
        hf_row: first row there.
        row: first row in the Megatron tensor of the layer.
        num_rows: how many.
    """

    part: int
    hf_row: int
    row: int
    num_rows: int


def list_runs(rule: TensorRule, shape: LlamaShape) -> list[Run]:
    """Return which rows of the Hugging Face tensors of one layer are which rows of the Megatron tensor.

    ``qkv`` interleaves the projections group by group: the queries of group g, key g, value g, for every g. No row is
    permuted within a head: both sides rotate halves, not pairs. ``gate_up`` puts the gate rows above the up rows; this
    is the global tensor, in memory each tensor-parallel rank holds its share of both.
    """
    if rule.kind != "qkv":
        runs, row = [], 0
        for part, (num_rows, *_) in enumerate(shape_hf(rule, shape)):
            runs.append(Run(part, 0, row, num_rows))
            row += num_rows
        return runs
    width = shape.kv_channels
    queries = shape.num_attention_heads // shape.num_query_groups * width
    runs = []
    for group in range(shape.num_query_groups):
        row = group * (queries + 2 * width)
        runs.append(Run(0, group * queries, row, queries))
        runs.append(Run(1, group * width, row + queries, width))
        runs.append(Run(2, group * width, row + queries + width, width))
    return runs


def check_hf_tensors(shapes: Mapping[str, tuple[int, ...]], shape: LlamaShape, where: str) -> None:
    """Refuse a Hugging Face folder whose tensors are not exactly those of its config.

    Args:
        shapes: shape of every tensor in the folder.
        shape: what ``config.json`` says.
        where: the folder, for messages.

    Raises:
        CheckpointError: a tensor is missing, unknown or of another shape.
    """
    expected = {name: size for _, name, size in list_hf_tensors(shape)}
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
