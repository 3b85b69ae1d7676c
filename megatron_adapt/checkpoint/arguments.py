"""The model that the ``args`` of a Megatron-LM run describe.

Megatron-LM puts its parsed command line into every checkpoint it writes. ``read_arguments`` makes a ``LlamaShape`` of
it and refuses by name and value what the engine would compute otherwise; ``make_hf_config`` says the same to
transformers. What ``args`` never say is the true vocabulary: they know the padded rows alone.

Source: Megatron-LM ``megatron/training/arguments.py`` (names and defaults), megatron-core 0.16
``models/common/embeddings/rotary_pos_embedding.py`` (numbers of the llama3 scaling).
"""

from collections.abc import Mapping
from typing import Any

from megatron_adapt.errors import CheckpointError, ConfigError
from megatron_adapt.shape import LlamaShape, RopeScaling

_ACCEPTED: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "position_embedding_type": ("learned_absolute", ("rope",)),
    "normalization": ("LayerNorm", ("RMSNorm",)),
    "swiglu": (False, (True,)),
    "add_bias_linear": (True, (False,)),
    "num_experts": (None, (None, 0)),
    "rotary_percent": (1.0, (1.0,)),
    "rotary_interleaved": (False, (False,)),
    "rotary_seq_len_interpolation_factor": (None, (None, 1)),
    "no_rope_freq": (None, (None,)),
    "apply_layernorm_1p": (False, (False,)),
    "apply_residual_connection_post_layernorm": (False, (False,)),
    "qk_layernorm": (False, (False,)),
    "multi_latent_attention": (False, (False,)),
    "window_size": (None, (None,)),
    "softmax_type": ("vanilla", ("vanilla",)),
    "attention_output_gate": (False, (False,)),
    "experimental_attention_variant": (None, (None,)),
    "mtp_num_layers": (None, (None, 0)),
    "hybrid_layer_pattern": (None, (None,)),
    "hybrid_override_pattern": (None, (None,)),
    "heterogeneous_layers_config_path": (None, (None,)),
    "heterogeneous_layers_config_encoded_json": (None, (None,)),
    "use_legacy_models": (False, (False,)),
}
"Name in ``args``: what Megatron-LM takes where they are silent, and what the engine computes the same."

_SCALING_FACTOR = 8.0
_LOW_FREQ_FACTOR, _HIGH_FREQ_FACTOR, _ORIGINAL_POSITIONS = 1.0, 4.0, 8192
"megatron-core has no flags for these."


def read_arguments(args: Mapping[str, Any], padded_vocab_size: int, where: str) -> LlamaShape:
    """Return the model that ``args`` describe.

    Args:
        args: the settings of the run, by name.
        padded_vocab_size: rows of the vocabulary matrices; ``vocab_size`` of the result, until the true one is known.
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: a number is missing.
        ConfigError: the model uses something the engine does not reproduce.
    """
    _refuse_unsupported(args, where)
    names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
    missing = [name for name in names if not isinstance(args.get(name), int)]
    if missing:
        raise CheckpointError(
            f"{where}: its args lack {', '.join(missing)}; put the model's config.json in hf/ beside it"
        )
    heads = args["num_attention_heads"]
    groups = args.get("num_query_groups") if args.get("group_query_attention") else None
    scaling = RopeScaling(
        factor=float(args.get("rope_scaling_factor") or _SCALING_FACTOR),
        low_freq_factor=_LOW_FREQ_FACTOR,
        high_freq_factor=_HIGH_FREQ_FACTOR,
        original_max_position_embeddings=_ORIGINAL_POSITIONS,
    )
    positions = args.get("max_position_embeddings") or args.get("seq_length")
    if not isinstance(positions, int):
        raise CheckpointError(
            f"{where}: its args have neither max_position_embeddings nor seq_length; put the model's config.json in "
            "hf/ beside it"
        )
    return LlamaShape(
        num_layers=args["num_layers"],
        hidden_size=args["hidden_size"],
        ffn_hidden_size=args["ffn_hidden_size"],
        num_attention_heads=heads,
        num_query_groups=groups or heads,
        kv_channels=args.get("kv_channels") or args["hidden_size"] // heads,
        vocab_size=padded_vocab_size,
        max_position_embeddings=positions,
        layernorm_epsilon=float(args.get("norm_epsilon") or args.get("layernorm_epsilon") or 1e-5),
        rotary_base=float(args.get("rotary_base") or 10000),
        rope_scaling=scaling if args.get("use_rope_scaling") else None,
        tied=not args.get("untie_embeddings_and_output_weights", False),
        qkv_bias=bool(args.get("add_qkv_bias", False)),
    )


def _refuse_unsupported(args: Mapping[str, Any], where: str) -> None:
    if args.get("use_rotary_position_embeddings"):  # what position_embedding_type "rope" was called before
        args = {**args, "position_embedding_type": "rope"}
    for name, (default, accepted) in _ACCEPTED.items():
        value = args.get(name, default)
        if value not in accepted:
            raise ConfigError(
                f"{where}: args.{name} {value!r} is not supported, only {accepted[0]!r}; the engine would compute "
                "something else"
            )


def make_hf_config(shape: LlamaShape, dtype: str) -> dict[str, Any]:
    """Return the content of ``config.json``, in the spelling that transformers 4 and 5 both read."""
    kind = "qwen2" if shape.qkv_bias else "llama"
    config: dict[str, Any] = {
        "architectures": ["Qwen2ForCausalLM" if shape.qkv_bias else "LlamaForCausalLM"],
        "model_type": kind,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_query_groups,
        "head_dim": shape.kv_channels,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_position_embeddings,
        "rms_norm_eps": shape.layernorm_epsilon,
        "rope_theta": shape.rotary_base,
        "tie_word_embeddings": shape.tied,
        "torch_dtype": dtype,
    }
    if shape.qkv_bias:
        config["use_sliding_window"] = False
    if shape.rope_scaling is not None:
        config["rope_scaling"] = {"rope_type": "llama3", **vars(shape.rope_scaling)}
    return config
