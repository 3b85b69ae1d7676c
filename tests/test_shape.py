import json

import pytest

from megatron_adapt.errors import ConfigError
from megatron_adapt.shape import LlamaShape, RopeScaling, pad_vocab_size, read_shape

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 4096}


def make_config(**changes):
    config = {
        "model_type": "llama",
        "num_hidden_layers": 6,
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 100,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
    }
    return {**config, **changes}


def test_parameters_are_those_counted_by_hand():
    shape = read_shape(make_config(), "config.json")
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 176 + 2 * 64
    assert shape.num_parameters == 6 * layer + 64 + 2 * 100 * 64
    tied = read_shape(make_config(tie_word_embeddings=True), "config.json")
    assert tied.num_parameters == 6 * layer + 64 + 100 * 64


def test_both_generations_of_transformers_configs_read_alike():
    old = make_config(rope_scaling={"type": "llama3", **LLAMA3})
    new = make_config(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3})
    del new["rope_theta"]
    assert read_shape(old, "a") == read_shape(new, "b")
    assert read_shape(old, "a").rope_scaling == RopeScaling(**LLAMA3)
    assert read_shape(old, "a").rotary_base == 5e5


def test_absent_fields_take_transformers_defaults():
    config = make_config()
    for name in ("num_key_value_heads", "rms_norm_eps", "rope_theta", "max_position_embeddings"):
        del config[name]
    shape = read_shape(config, "config.json")
    assert (shape.num_query_groups, shape.kv_channels, shape.layernorm_epsilon) == (8, 8, 1e-6)
    assert (shape.rotary_base, shape.max_position_embeddings, shape.tied) == (10000.0, 2048, False)


def test_a_window_that_is_switched_off_is_none():
    read_shape(make_config(model_type="mistral", sliding_window=None), "config.json")
    off = {"use_sliding_window": False, "sliding_window": 4096, "layer_types": ["full_attention"] * 6}
    shape = read_shape(make_config(model_type="qwen2", **off), "config.json")
    assert shape.qkv_bias
    assert shape.num_parameters == read_shape(make_config(), "config.json").num_parameters + 6 * (64 + 2 * 32)


def test_a_shape_written_before_there_were_biases_is_read():
    values = read_shape(make_config(), "config.json").to_dict()
    del values["qkv_bias"]
    assert not LlamaShape.from_dict(values).qkv_bias


def test_head_dim_overrides_the_quotient():
    assert read_shape(make_config(head_dim=32), "config.json").kv_channels == 32


@pytest.mark.parametrize("scaling", [None, {"rope_type": "llama3", **LLAMA3}])
def test_a_shape_survives_json(scaling):
    shape = read_shape(make_config(rope_scaling=scaling), "config.json")
    assert LlamaShape.from_dict(json.loads(json.dumps(shape.to_dict()))) == shape


@pytest.mark.parametrize(("size", "padded"), [(1, 1024), (1024, 1024), (1025, 2048), (32000, 32768)])
def test_vocabulary_is_padded_upwards(size, padded):
    assert pad_vocab_size(size, 1024) == padded


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, r"c\.json: model_type 'gpt2' is not supported; use one of llama, mistral, qwen2"),
        ({"attention_bias": True}, r"c\.json: attention_bias True is not supported; the engine"),
        ({"mlp_bias": True}, r"c\.json: mlp_bias True is not supported"),
        ({"sliding_window": 4096}, r"c\.json: sliding_window 4096 is not supported"),
        ({"model_type": "mistral"}, r"c\.json: sliding_window 4096 is not supported"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 512},
            r"c\.json: sliding_window 512 is not supported",
        ),
        (
            {"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"]},
            r"c\.json: layer_types \['sliding_attention'\] is not supported",
        ),
        ({"hidden_act": "gelu"}, r"c\.json: hidden_act 'gelu' is not supported"),
        ({"num_key_value_heads": 3}, r"c\.json: num_key_value_heads 3 does not divide num_attention_heads 8"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0}},
            r"c\.json: rope scaling of type 'yarn' is not supported; use 'default' or 'llama3'",
        ),
    ],
)
def test_what_the_engine_cannot_reproduce_is_refused(changes, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        read_shape(make_config(**changes), "c.json")


def test_a_config_without_the_sizes_of_a_llama_is_refused():
    config = make_config()
    del config["hidden_size"], config["vocab_size"]
    with pytest.raises(ConfigError, match=r"^c\.json: hidden_size, vocab_size missing; this is not the config of a"):
        read_shape(config, "c.json")


def test_llama3_scaling_names_what_is_missing():
    config = {**make_config(), "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}
    with pytest.raises(ConfigError, match=r"llama3 rope scaling without low_freq_factor, high_freq_factor, original"):
        read_shape(config, "c.json")
