"""Every kind of bad input ends in one line that says what to do, before anything is written."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_adapt.checkpoint.convert import convert_checkpoint
from megatron_adapt.checkpoint.hf import HFFolder
from megatron_adapt.config import CheckpointSettings, ConvertCheckpoint
from megatron_adapt.errors import AdaptError
from tests.helpers.tiny import write_byte_tokenizer, write_llama


def _convert(folder, to="megatron", source="hf", **changes):
    settings = CheckpointSettings(vocab_pad_multiple=64)
    output = folder / ("out" if to == "megatron" else "back")
    convert_checkpoint(
        ConvertCheckpoint(source=folder / source, to=to, output=output, **{"settings": settings, **changes})
    )
    return output


def _list_shards(folder):
    return sorted(folder.glob("model-*.safetensors"))


def _remove_shard(folder):
    _list_shards(folder)[1].unlink()


def _cut_shard(folder):
    path = _list_shards(folder)[0]
    path.write_bytes(path.read_bytes()[:-100])


def _cut_header(folder):
    path = _list_shards(folder)[0]
    path.write_bytes(path.read_bytes()[:40])


def _swap_in_index(folder):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first, second, *_ = sorted(set(index["weight_map"].values()))
    index["weight_map"] = {name: second if file == first else file for name, file in index["weight_map"].items()}
    path.write_text(json.dumps(index))


def _forget_in_index(folder):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["model.norm.weight"]
    path.write_text(json.dumps(index))


def _pickle_only(folder):
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    torch.save({}, folder / "pytorch_model-00001-of-00001.bin")


def _change_config(**values):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


CASES = {
    "missing_shard": (
        _remove_shard,
        r"shard model-00002-of-\d+\.safetensors missing, which .*index\.json names; fetch",
    ),
    "truncated": (_cut_shard, r"safetensors: cut off at \d+ bytes, .* ends at \d+; fetch the file again"),
    "truncated_header": (_cut_header, "no safetensors header; the file is cut off or damaged, fetch it again"),
    "wrong_index": (_swap_in_index, r"is not in model-\d+-of-\d+\.safetensors; index and shards do not fit, fetch"),
    "short_index": (_forget_in_index, r"1 tensors missing, first model\.norm\.weight; the checkpoint is incomplete"),
    "pickled": (_pickle_only, r"pickled weights only \(pytorch_model-0.*\.bin\).*make safetensors .*save_pretrained"),
    "larger_tokenizer": (
        lambda folder: write_byte_tokenizer(folder, 310),
        r"has 310 tokens, the model only 300 rows; give the model rows .* tools/resize_vocab\.py",
    ),
    "larger_matrix": (_change_config(vocab_size=290), r"has shape \(300, 32\), its config says \(290, 32\)"),
    "unknown_kind": (_change_config(model_type="mamba"), "model_type 'mamba' is not supported; use one of llama"),
}


@pytest.mark.parametrize(("damage", "message"), CASES.values(), ids=CASES)
def test_a_damaged_folder_is_refused_before_anything_is_written(tmp_path, damage, message):
    write_llama(tmp_path / "hf", max_shard_size="30KB")
    damage(tmp_path / "hf")
    with pytest.raises(AdaptError, match=message):
        _convert(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_tokenizer_smaller_than_the_matrix_is_said_and_the_rows_are_kept(tmp_path, caplog):
    write_llama(tmp_path / "hf")
    write_byte_tokenizer(tmp_path / "hf", 290)
    with caplog.at_level("INFO"):
        _convert(tmp_path)
    assert "10 rows beyond the 290 tokens are kept" in caplog.text


def test_damaged_values_are_named_kept_and_do_not_reach_the_padding(tmp_path, caplog):
    write_llama(tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"][[17, 200]] = torch.nan
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.inf
    save_file(tensors, path)
    _convert(tmp_path, verify=False)
    warned = [record.message for record in caplog.records if "not finite" in record.message]
    assert len(warned) == 2
    assert any("model.embed_tokens.weight has values that are not finite in rows 17, 200;" in one for one in warned)
    assert any("model.layers.1.mlp.up_proj.weight has values that are not finite in rows 3;" in one for one in warned)
    caplog.clear()
    _convert(tmp_path, to="hf", source="out")
    assert "model.embed_tokens.weight has values that are not finite in rows 17, 200;" in caplog.text
    before, after = HFFolder(tmp_path / "hf"), HFFolder(tmp_path / "back")
    for name in before.names:
        assert torch.equal(before.read(name).view(torch.int32), after.read(name).view(torch.int32)), name
    mean = before.read_mean_row("model.embed_tokens.weight", 300)
    finite = before.read("model.embed_tokens.weight").double()[[at for at in range(300) if at not in (17, 200)]]
    assert torch.allclose(mean, finite.mean(0))


def test_a_type_that_a_megatron_checkpoint_cannot_hold_is_refused(tmp_path):
    write_llama(tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(path).items()}, path)
    with pytest.raises(AdaptError, match=r"of type torch\.float8_e4m3fn, which .* cannot hold; .*: --dtype bfloat16"):
        _convert(tmp_path)
    _convert(tmp_path, settings=CheckpointSettings(vocab_pad_multiple=64, dtype="bfloat16"))
