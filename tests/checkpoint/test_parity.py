"""Every model we accept computes in the engine what transformers computes, and comes back as it was."""

import json

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_adapt.checkpoint.convert import convert_checkpoint
from megatron_adapt.checkpoint.hf import HFFolder
from megatron_adapt.checkpoint.verify import compare_logits
from megatron_adapt.config import CheckpointSettings, ConvertCheckpoint
from megatron_adapt.errors import CheckpointError, ConfigError

KINDS = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
}
LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def _write_model(folder, kind, *, dtype=torch.float32, seed=0, **values):
    """Write a model of one of the kinds with random weights, norms and biases included."""
    defaults = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    }  # fmt: skip
    if kind == "mistral":
        defaults["sliding_window"] = None
    config = KINDS[kind](**{**defaults, **values})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + name.endswith("norm.weight"))
    model.to(dtype).save_pretrained(folder)
    return folder


def _round_trip(folder):
    small = CheckpointSettings(vocab_pad_multiple=16)
    hf, megatron, again = folder / "hf", folder / "megatron", folder / "again"
    convert_checkpoint(ConvertCheckpoint(source=hf, to="megatron", output=megatron, settings=small))
    convert_checkpoint(ConvertCheckpoint(source=megatron, to="hf", output=again))
    before, after = HFFolder(hf), HFFolder(again)
    assert before.specs == after.specs
    for name in before.names:
        assert torch.equal(before.read(name).view(torch.uint8), after.read(name).view(torch.uint8)), name
    assert json.loads((hf / "config.json").read_text()) == json.loads((again / "config.json").read_text())
    return megatron


@st.composite
def _configs(draw):
    kind = draw(st.sampled_from(sorted(KINDS)))
    groups = draw(st.integers(1, 3))
    heads = groups * draw(st.integers(1, 3))
    width = 2 * draw(st.integers(2, 8))
    values = {
        "num_key_value_heads": groups,
        "num_attention_heads": heads,
        "intermediate_size": draw(st.integers(8, 50)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "vocab_size": draw(st.integers(20, 150)),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-3])),
        "tie_word_embeddings": draw(st.booleans()),
    }
    if kind == "qwen2":  # has no width of its own
        values["hidden_size"] = heads * width
    else:
        values |= {"head_dim": width, "hidden_size": 2 * heads * draw(st.integers(2, 8))}
    theta = draw(st.sampled_from([1e4, 5e5, 1e6]))
    scaling = LLAMA3 if kind == "llama" and draw(st.booleans()) else {"rope_type": "default"}
    return kind, {**values, "rope_parameters": {**scaling, "rope_theta": theta}}


@given(_configs(), st.integers(0, 100))
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
def test_any_shape_goes_there_and_back_and_has_the_logits_of_transformers(tmp_path_factory, chosen, seed):
    _check_parity(tmp_path_factory.mktemp("p"), chosen, seed)


@pytest.mark.slow
@given(_configs(), st.integers(0, 100))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_eighty_shapes_go_there_and_back(tmp_path_factory, chosen, seed):
    _check_parity(tmp_path_factory.mktemp("p"), chosen, seed)


def _check_parity(folder, chosen, seed):
    kind, values = chosen
    _write_model(folder / "hf", kind, seed=seed, **values)
    result = compare_logits(folder / "hf", _round_trip(folder))
    assert result.agrees, result.describe()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_keeps_its_bytes_in_bf16(tmp_path, kind):
    _write_model(tmp_path / "hf", kind, dtype=torch.bfloat16)
    result = compare_logits(tmp_path / "hf", _round_trip(tmp_path))
    assert result.agrees, result.describe()


def test_a_bias_that_the_kind_does_not_have_is_refused(tmp_path):
    _write_model(tmp_path / "hf", "qwen2")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "llama"}))
    with pytest.raises(CheckpointError, match=r"6 tensors that no Llama has, first .*self_attn\..*_proj\.bias"):
        convert_checkpoint(ConvertCheckpoint(source=tmp_path / "hf", to="megatron", output=tmp_path / "megatron"))


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("mistral", {"sliding_window": 16}, "sliding_window 16 is not supported"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}, "sliding_window 16 is"),
        ("llama", {"attention_bias": True}, "attention_bias True is not supported"),
        ("llama", {"mlp_bias": True}, "mlp_bias True is not supported"),
    ],
)
def test_what_the_engine_cannot_compute_is_refused_by_name(tmp_path, kind, values, message):
    _write_model(tmp_path / "hf", kind, **values)
    with pytest.raises(ConfigError, match=message):
        convert_checkpoint(ConvertCheckpoint(source=tmp_path / "hf", to="megatron", output=tmp_path / "megatron"))
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
