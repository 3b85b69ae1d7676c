import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_adapt.checkpoint.convert import convert_checkpoint
from megatron_adapt.checkpoint.verify import compare_logits, compare_tensors, verify_conversion
from megatron_adapt.config import CheckpointSettings, ConvertCheckpoint
from megatron_adapt.errors import CheckpointError
from tests.helpers.tiny import write_llama


def _rope(**values):
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **values}}


def _llama3(original: int) -> dict:
    numbers = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0}
    return _rope(rope_type="llama3", rope_theta=5e5, original_max_position_embeddings=original, **numbers)


CASES = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "one_group": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "theta": _rope(rope_theta=5e5),
    "llama3": _llama3(8192) | {"max_position_embeddings": 16384},
    "llama3_original_64": _llama3(64),
    "wide_heads": {"head_dim": 24},
    "narrow_heads_tied": {"head_dim": 4, "tie_word_embeddings": True},
    "eps": {"rms_norm_eps": 1e-3},
    "bf16": {"dtype": torch.bfloat16},
    "odd_vocab": {"vocab_size": 301},
}


def _convert(folder, **settings):
    write_llama(folder / "hf", **settings)
    convert_checkpoint(
        ConvertCheckpoint(
            source=folder / "hf",
            to="megatron",
            output=folder / "megatron",
            settings=CheckpointSettings(vocab_pad_multiple=64),
        )
    )
    return folder / "hf", folder / "megatron"


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES.keys())
def test_the_engine_computes_the_logits_of_transformers(tmp_path, settings):
    result = compare_logits(*_convert(tmp_path, **settings))
    assert result.num_tokens >= 128
    assert 0 <= result.mean_difference <= result.max_difference < 1e-4
    assert result.top1_agreement == 1
    assert result.agrees


def test_a_converted_checkpoint_is_verified_in_both_directions(tmp_path):
    hf, megatron = _convert(tmp_path)
    assert compare_tensors(hf, megatron, output="megatron") == 21
    assert compare_tensors(hf, megatron / "release", output="hf") == 21


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.k_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_one_changed_bit_is_found(tmp_path, name):
    hf, megatron = _convert(tmp_path)
    path = hf / "model.safetensors"
    tensors = load_file(path)
    tensors[name].view(torch.uint8).view(-1)[-4] ^= 1
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=f"{name}: differs between the two checkpoints"):
        compare_tensors(hf, megatron, output="megatron")


def test_a_matrix_filled_with_zeros_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_adapt.checkpoint.hf.HFFolder.read_mean_row", lambda self, name, rows: torch.zeros(32))
    hf, megatron = _convert(tmp_path)
    with pytest.raises(CheckpointError, match=r"padding rows of embedding.* are zero or not finite"):
        compare_tensors(hf, megatron, output="megatron")


def test_logits_that_differ_stop_the_conversion(tmp_path, monkeypatch):
    hf, megatron = _convert(tmp_path)
    path = hf / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] *= 1.01
    save_file(tensors, path)
    result = compare_logits(hf, megatron)
    assert not result.agrees
    assert "max |d|" in result.describe()
    monkeypatch.setattr("megatron_adapt.checkpoint.verify.compare_tensors", lambda *_, output: 21)
    with pytest.raises(CheckpointError, match="the conversion is wrong for this model"):
        verify_conversion(hf, megatron, output="megatron")
