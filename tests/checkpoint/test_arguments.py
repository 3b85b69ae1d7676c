import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_adapt.checkpoint.arguments import make_hf_config, read_arguments
from megatron_adapt.errors import CheckpointError, ConfigError
from megatron_adapt.shape import LlamaShape, RopeScaling, read_shape

ARGS = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "max_position_embeddings": 128,
}
SCALING = RopeScaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)


@given(
    st.integers(1, 4), st.integers(1, 3), st.sampled_from([8, 16]), st.sampled_from([1e-5, 1e-6]),
    st.sampled_from([1e4, 5e5]), st.sampled_from([None, SCALING]), st.booleans(), st.booleans(),
)  # fmt: skip
def test_the_config_that_is_made_says_the_same_model(groups, per_group, width, epsilon, base, scaling, tied, qkv_bias):
    shape = LlamaShape(
        num_layers=3,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=groups * per_group,
        num_query_groups=groups,
        kv_channels=width,
        vocab_size=300,
        max_position_embeddings=4096,
        layernorm_epsilon=epsilon,
        rotary_base=base,
        rope_scaling=scaling,
        tied=tied,
        qkv_bias=qkv_bias,
    )
    assert read_shape(make_hf_config(shape, "bfloat16"), "config.json") == shape


def test_what_args_leave_out_is_megatron_lms_default():
    shape = read_arguments(ARGS, 320, "x")
    assert (shape.num_query_groups, shape.kv_channels, shape.vocab_size) == (4, 8, 320)
    assert (shape.layernorm_epsilon, shape.rotary_base, shape.rope_scaling) == (1e-5, 10000.0, None)
    assert (shape.tied, shape.qkv_bias) == (True, False)


def test_query_groups_count_only_where_they_are_switched_on():
    args = {**ARGS, "num_query_groups": 1}
    assert read_arguments({**args, "group_query_attention": False}, 320, "x").num_query_groups == 4
    assert read_arguments({**args, "group_query_attention": True}, 320, "x").num_query_groups == 1


def test_positions_are_those_of_the_model_and_not_the_sequences_of_the_run():
    assert read_arguments({**ARGS, "seq_length": 64}, 320, "x").max_position_embeddings == 128
    args = {**ARGS, "max_position_embeddings": None, "seq_length": 64}
    assert read_arguments(args, 320, "x").max_position_embeddings == 64


def test_older_names_of_settings_are_known():
    args = {**ARGS, "use_rotary_position_embeddings": True, "layernorm_epsilon": 1e-6}
    del args["position_embedding_type"]
    assert read_arguments(args, 320, "x").layernorm_epsilon == 1e-6


@pytest.mark.parametrize("name", ["position_embedding_type", "normalization", "swiglu", "add_bias_linear"])
def test_silence_means_the_default_of_megatron_lm_and_that_is_no_llama(name):
    args = {key: value for key, value in ARGS.items() if key != name}
    with pytest.raises(ConfigError, match=rf"x: args\.{name} .* is not supported, only"):
        read_arguments(args, 320, "x")


def test_missing_numbers_are_named_together():
    args = {key: value for key, value in ARGS.items() if key not in ("hidden_size", "ffn_hidden_size")}
    with pytest.raises(
        CheckpointError, match=r"x: its args lack hidden_size, ffn_hidden_size; put .* config\.json in hf"
    ):
        read_arguments(args, 320, "x")
