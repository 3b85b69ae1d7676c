"""A transformers model as the plain tensors of a megatron-core model: fused by views and cats, apart from the package.

Names are those of megatron-core's local layers; ``name_fused`` gives those of Transformer Engine's.
"""

from argparse import Namespace
from typing import Any

import torch
from transformers import PreTrainedModel

_FUSED_NAMES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


def fuse_weights(model: PreTrainedModel, padded_vocab_size: int) -> dict[str, torch.Tensor]:
    """Return the weights by name; rows that pad the vocabulary are 9."""
    config, state = model.config, model.state_dict()

    def pad(rows_VH: torch.Tensor) -> torch.Tensor:
        return torch.cat([rows_VH, torch.full((padded_vocab_size - len(rows_VH), rows_VH.shape[1]), 9.0).to(rows_VH)])

    groups, width = config.num_key_value_heads, state["model.layers.0.self_attn.k_proj.weight"].shape[0]
    fused = {"embedding.word_embeddings.weight": pad(state["model.embed_tokens.weight"])}
    for layer in range(config.num_hidden_layers):
        old, new = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        for kind in ("weight", "bias"):
            if f"{old}self_attn.q_proj.{kind}" in state:
                parts = [state[f"{old}self_attn.{name}_proj.{kind}"] for name in "qkv"]
                parts = [part.view(groups, part.shape[0] // groups, *part.shape[1:]) for part in parts]
                rows = torch.cat(parts, dim=1)
                fused[f"{new}self_attention.linear_qkv.{kind}"] = rows.flatten(0, 1).clone()
        gate, up = (state[f"{old}mlp.{name}_proj.weight"] for name in ("gate", "up"))
        fused |= {
            f"{new}input_layernorm.weight": state[f"{old}input_layernorm.weight"],
            f"{new}self_attention.linear_proj.weight": state[f"{old}self_attn.o_proj.weight"],
            f"{new}pre_mlp_layernorm.weight": state[f"{old}post_attention_layernorm.weight"],
            f"{new}mlp.linear_fc1.weight": torch.cat([gate, up]),
            f"{new}mlp.linear_fc2.weight": state[f"{old}mlp.down_proj.weight"],
        }
    assert width % groups == 0
    fused["decoder.final_layernorm.weight"] = state["model.norm.weight"]
    if not config.tie_word_embeddings:
        fused["output_layer.weight"] = pad(state["lm_head.weight"])
    return fused


def name_fused(name: str) -> str:
    """Return the name that a tensor has in Transformer Engine's fused layers."""
    for local, fused in _FUSED_NAMES.items():
        name = name.replace(local, fused)
    return name


def make_arguments(model: PreTrainedModel, padded_vocab_size: int, **changes: Any) -> Namespace:
    """Return what Megatron-LM's parsed command line says of a model."""
    config = model.config
    said: dict[str, Any] = {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "group_query_attention": config.num_key_value_heads != config.num_attention_heads,
        "num_query_groups": config.num_key_value_heads,
        "kv_channels": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "seq_length": 64,
        "position_embedding_type": "rope",
        "rotary_base": 10000,
        "rotary_percent": 1.0,
        "use_rope_scaling": False,
        "norm_epsilon": config.rms_norm_eps,
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": config.model_type == "qwen2",
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
        "padded_vocab_size": padded_vocab_size,
        "make_vocab_size_divisible_by": 64,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "tokenizer_type": "HuggingFaceTokenizer",
        "params_dtype": torch.bfloat16,
        "num_experts": None,
        "consumed_train_samples": 448,
    }
    return Namespace(**{**said, **changes})
