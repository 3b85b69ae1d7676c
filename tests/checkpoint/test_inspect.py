import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from megatron_adapt.checkpoint.convert import convert_checkpoint
from megatron_adapt.checkpoint.dist import COMMON_FILE
from megatron_adapt.checkpoint.inspect import inspect_checkpoint
from megatron_adapt.config import CheckpointSettings, ConvertCheckpoint, InspectCheckpoint
from megatron_adapt.errors import CheckpointError
from tests.helpers.tiny import write_byte_tokenizer, write_llama


@pytest.fixture
def megatron(tmp_path):
    write_llama(tmp_path / "hf", dtype=torch.bfloat16)
    settings = CheckpointSettings(vocab_pad_multiple=64)
    convert_checkpoint(
        ConvertCheckpoint(source=tmp_path / "hf", to="megatron", output=tmp_path / "megatron", settings=settings)
    )
    return tmp_path / "megatron"


def _inspect(folder, tmp_path, capsys):
    inspect_checkpoint(InspectCheckpoint(folder=folder, json=tmp_path / "found.json"))
    return capsys.readouterr().out, json.loads((tmp_path / "found.json").read_text())


def test_a_megatron_checkpoint_tells_its_vocabulary_its_position_and_every_tensor(tmp_path, megatron, capsys):
    text, found = _inspect(megatron, tmp_path, capsys)
    assert found["vocabulary"] | {"tokenizer": ""} == {
        "true size": 300, "rows": 320, "padding rows": 20, "tokenizer": "",
    }  # fmt: skip
    assert found["vocabulary"]["tokenizer"].startswith("300 tokens, fingerprint ")
    assert found["position"] == {"step": 0, "iteration": 0, "checkpoint_version": 3.0}
    tensors = {item["name"]: item for item in found["tensors"]}
    assert tensors["decoder.layers.mlp.linear_fc2.weight"] == {
        "name": "decoder.layers.mlp.linear_fc2.weight", "count": 1, "shape": [2, 32, 48], "dtype": "bfloat16",
        "bytes": 2 * 2 * 32 * 48,
    }  # fmt: skip
    assert found["values"] == found["parameters"] + 2 * 20 * 32
    assert "decoder.layers.mlp.linear_fc2.weight" in text
    assert "vocabulary  padding rows: 20" in text
    assert "position    step: 0" in text


def test_a_hugging_face_folder_lists_the_tensors_of_all_layers_once(tmp_path, megatron, capsys):
    text, found = _inspect(tmp_path / "hf", tmp_path, capsys)
    assert found["format"] == "Hugging Face"
    tensors = {item["name"]: item for item in found["tensors"]}
    assert tensors["model.layers.*.mlp.up_proj.weight"]["count"] == 2
    assert sum(item["count"] for item in found["tensors"]) == 21
    assert found["values"] == found["parameters"]
    assert "x32" in text


def test_another_tokenizer_beside_the_weights_shows(tmp_path, megatron, capsys):
    write_byte_tokenizer(megatron / "hf", 290)
    _, found = _inspect(megatron, tmp_path, capsys)
    assert found["vocabulary"]["tokenizer"].startswith("290 tokens")
    assert found["vocabulary"]["tokenizer expected"].startswith("fingerprint ")


def test_a_checkpoint_of_another_program_is_described_as_far_as_it_goes(tmp_path, megatron, capsys):
    (megatron / "release" / "adapt.json").unlink()
    torch.save({"args": Fraction(1), "iteration": 7}, megatron / "release" / COMMON_FILE)
    text, found = _inspect(megatron / "release", tmp_path, capsys)
    assert found["vocabulary"] | {"tokenizer": ""} == {
        "true size": "unknown, there is no adapt.json", "rows": 320, "tokenizer": "",
    }  # fmt: skip
    assert found["position"] == {"step": 7}
    assert found["model"]["num_layers"] == 2
    assert "output_layer.weight" in text


def test_a_folder_that_is_no_checkpoint_is_one_line_and_exit_code_2(tmp_path):
    with pytest.raises(CheckpointError, match="no Hugging Face model folder"):
        inspect_checkpoint(InspectCheckpoint(folder=tmp_path))
    tool = Path(__file__).parents[2] / "tools" / "inspect_checkpoint.py"
    done = subprocess.run([sys.executable, tool, "--folder", tmp_path], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
