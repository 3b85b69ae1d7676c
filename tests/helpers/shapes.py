"""The shape of a Llama that is counted by hand; tests replace what they look at."""

from megatron_adapt.shape import LlamaShape

SMALL_SHAPE = LlamaShape(
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
    tied=False,
)
