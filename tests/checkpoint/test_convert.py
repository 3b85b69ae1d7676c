import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_adapt.checkpoint import slices
from megatron_adapt.checkpoint.convert import convert_checkpoint
from megatron_adapt.checkpoint.dist import DistReader, DistWriter
from megatron_adapt.checkpoint.hf import HFFolder
from megatron_adapt.checkpoint.root import find_checkpoint, name_iteration, read_description, write_description
from megatron_adapt.checkpoint.values import TensorSpec
from megatron_adapt.config import CheckpointSettings, ConvertCheckpoint
from megatron_adapt.errors import CheckpointError, ConfigError
from tests.helpers.tensors import assert_same_tensors, convert_to_hf
from tests.helpers.tiny import write_byte_tokenizer, write_llama

PAD = 64


def _settings(dtype="keep", pad=PAD):
    return CheckpointSettings(vocab_pad_multiple=pad, dtype=dtype)


def _to_megatron(source, output, **changes):
    changes.setdefault("settings", _settings())
    convert_checkpoint(ConvertCheckpoint(source=source, to="megatron", output=output, **changes))
    return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "head_dim": 16},
        {"max_shard_size": "50KB"},
        {"vocab_size": 320},
    ],
    ids=["gqa", "tied", "mha", "mqa_wide", "shards", "no_padding"],
)
def test_there_and_back_gives_the_same_bytes(tmp_path, settings, dtype):
    write_llama(tmp_path / "hf", dtype=dtype, **settings)
    _to_megatron(tmp_path / "hf", tmp_path / "megatron")
    convert_to_hf(tmp_path / "megatron", tmp_path / "again")
    assert_same_tensors(tmp_path / "hf", tmp_path / "again")
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("hf", "again"))
    assert before == after
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_the_old_spelling_of_rope_and_type_comes_back_as_it_was(tmp_path):
    write_llama(tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"], config["dtype"]
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 32
    config |= {"rope_theta": 500000.0, "rope_scaling": scaling, "torch_dtype": "float32"}
    path.write_text(json.dumps(config))
    _to_megatron(tmp_path / "hf", tmp_path / "megatron", verify=True)
    convert_to_hf(tmp_path / "megatron", tmp_path / "again", settings=_settings(dtype="bfloat16"))
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == {**config, "torch_dtype": "bfloat16"}


def test_the_checkpoint_describes_itself(tmp_path):
    write_llama(tmp_path / "hf", dtype=torch.bfloat16)
    root = _to_megatron(tmp_path / "hf", tmp_path / "megatron")
    assert (root / "latest_checkpointed_iteration.txt").read_text() == "release"
    assert find_checkpoint(root) == root / "release"
    description = read_description(root / "release")
    assert (description.true_vocab_size, description.padded_vocab_size) == (300, 320)
    assert (description.step, description.dtype) == (0, "bfloat16")
    assert description.tokenizer_fingerprint
    common = torch.load(root / "release" / "common.pt", weights_only=True)
    assert common == {"iteration": 0, "checkpoint_version": 3.0}
    assert json.loads((root / "stage.json").read_text())["counts"]["true_vocab_size"] == 300


def test_padding_rows_are_the_mean_of_the_others(tmp_path):
    write_llama(tmp_path / "hf")
    root = _to_megatron(tmp_path / "hf", tmp_path / "megatron")
    reader, source = DistReader(root / "release"), HFFolder(tmp_path / "hf")
    for key, name in (
        ("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        ("output_layer.weight", "lm_head.weight"),
    ):
        padded, rows = reader.read(key), source.read(name)
        assert padded.shape == (320, 32)
        assert torch.equal(padded[:300], rows)
        assert torch.allclose(padded[300:], rows.double().mean(0).float().expand(20, -1), atol=1e-7)


def test_types_are_converted_by_rounding_once(tmp_path):
    write_llama(tmp_path / "hf")
    _to_megatron(tmp_path / "hf", tmp_path / "megatron", settings=_settings(dtype="bfloat16"), verify=True)
    convert_to_hf(tmp_path / "megatron", tmp_path / "again", settings=_settings(dtype="float32"), verify=True)
    before, after = HFFolder(tmp_path / "hf"), HFFolder(tmp_path / "again")
    assert all(torch.equal(before.read(name).bfloat16().float(), after.read(name)) for name in before.names)
    assert read_description(tmp_path / "megatron" / "release").dtype == "bfloat16"


def test_mixed_types_need_a_choice(tmp_path):
    write_llama(tmp_path / "hf", dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"] = tensors["model.layers.1.self_attn.k_proj.weight"].float()
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"k_proj.* is torch\.float32, .* choose a type: --dtype bfloat16"):
        _to_megatron(tmp_path / "hf", tmp_path / "megatron")
    assert not (tmp_path / "megatron").exists()
    _to_megatron(tmp_path / "hf", tmp_path / "megatron", settings=_settings(dtype="bfloat16"))


def test_a_training_checkpoint_is_exported_without_its_optimizer(tmp_path):
    write_llama(tmp_path / "hf")
    root = _to_megatron(tmp_path / "hf", tmp_path / "megatron")
    reader = DistReader(root / "release")
    step = root / name_iteration(10)
    step.mkdir()
    specs = {key: TensorSpec(reader.shape(key), reader.dtype(key)) for key in reader.keys}
    specs["optimizer.state.exp_avg.output_layer.weight"] = TensorSpec((320, 32), torch.float32)
    with DistWriter(step, specs) as writer:
        for key, spec in specs.items():
            values = reader.read(key) + 1 if key in reader.keys else torch.zeros(spec.shape)
            writer.write(key, (0,) * len(spec.shape), values)
    write_description(step, read_description(root / "release"))
    (root / "latest_checkpointed_iteration.txt").write_text("10")
    convert_to_hf(root, tmp_path / "latest")
    convert_to_hf(step, tmp_path / "named")
    convert_to_hf(root / "release", tmp_path / "release")
    assert_same_tensors(tmp_path / "latest", tmp_path / "named")
    assert_same_tensors(tmp_path / "hf", tmp_path / "release")
    before, after = HFFolder(tmp_path / "hf"), HFFolder(tmp_path / "latest")
    assert all(torch.equal(before.read(name) + 1, after.read(name)) for name in before.names)


def test_spare_rows_of_a_published_model_survive(tmp_path):
    write_llama(tmp_path / "hf", vocab_size=310, tokenizer=False)
    write_byte_tokenizer(tmp_path / "hf", 300)
    _to_megatron(tmp_path / "hf", tmp_path / "megatron")
    convert_to_hf(tmp_path / "megatron", tmp_path / "again")
    assert_same_tensors(tmp_path / "hf", tmp_path / "again")


def test_a_folder_without_tokenizer_goes_there_and_back(tmp_path):
    write_llama(tmp_path / "hf", tokenizer=False)
    _to_megatron(tmp_path / "hf", tmp_path / "megatron")
    convert_to_hf(tmp_path / "megatron", tmp_path / "again")
    assert_same_tensors(tmp_path / "hf", tmp_path / "again")


def test_a_tokenizer_larger_than_the_model_stops_the_import(tmp_path):
    write_llama(tmp_path / "hf")
    write_byte_tokenizer(tmp_path / "larger", 310)
    with pytest.raises(CheckpointError, match="has 310 tokens, the model only 300 rows"):
        _to_megatron(tmp_path / "hf", tmp_path / "megatron", tokenizer=tmp_path / "larger")
    assert not (tmp_path / "megatron").exists()


@pytest.mark.parametrize("size", [290, 310])
def test_an_export_with_the_wrong_tokenizer_is_refused(tmp_path, size):
    write_llama(tmp_path / "hf")
    _to_megatron(tmp_path / "hf", tmp_path / "megatron")
    write_byte_tokenizer(tmp_path / "wrong", size)
    with pytest.raises(CheckpointError, match=f"has {size} tokens, the checkpoint's vocabulary has 300"):
        convert_to_hf(tmp_path / "megatron", tmp_path / "again", tokenizer=tmp_path / "wrong")
    assert not (tmp_path / "again").exists()


def test_a_config_of_another_model_is_refused_on_export(tmp_path):
    write_llama(tmp_path / "hf")
    root = _to_megatron(tmp_path / "hf", tmp_path / "megatron")
    path = root / "hf" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": 1e-5}))
    with pytest.raises(CheckpointError, match=r"config\.json is that of another model"):
        convert_to_hf(root, tmp_path / "again")


def test_the_wrong_direction_is_named(tmp_path):
    write_llama(tmp_path / "hf")
    root = _to_megatron(tmp_path / "hf", tmp_path / "megatron")
    with pytest.raises(ConfigError, match="is a Megatron checkpoint already; add --to hf"):
        _to_megatron(root, tmp_path / "x")
    with pytest.raises(ConfigError, match="is a Hugging Face folder already; add --to megatron"):
        convert_to_hf(tmp_path / "hf", tmp_path / "x")


def test_an_existing_output_is_kept_unless_told_otherwise(tmp_path):
    write_llama(tmp_path / "hf")
    root = _to_megatron(tmp_path / "hf", tmp_path / "megatron")
    before = (root / "stage.json").read_bytes()
    with pytest.raises(ConfigError, match="exists already"):
        _to_megatron(tmp_path / "hf", root)
    assert (root / "stage.json").read_bytes() == before
    _to_megatron(tmp_path / "hf", root, overwrite=True)


def test_slices_and_chunks_of_any_size_give_the_same_tensors(tmp_path, monkeypatch):
    write_llama(tmp_path / "hf", dtype=torch.bfloat16, max_shard_size="20KB")
    monkeypatch.setattr(slices, "SLICE_BYTES", 5 * 64)
    monkeypatch.setattr(slices, "CHUNK_BYTES", 7 * 64)
    root = _to_megatron(tmp_path / "hf", tmp_path / "megatron", verify=True)
    assert len(DistReader(root / "release")._index.places) > 100
    convert_to_hf(root, tmp_path / "again", verify=True)
    assert_same_tensors(tmp_path / "hf", tmp_path / "again")
