import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_adapt.checkpoint.hf import HFFolder, HFWriter, read_hf_shape
from megatron_adapt.checkpoint.values import TensorSpec
from megatron_adapt.errors import CheckpointError
from tests.helpers.tiny import write_llama


def _random_tensors() -> dict[str, torch.Tensor]:
    return {
        "a": torch.randn(7, 3),
        "b": torch.randn(5, 4).bfloat16(),
        "c": torch.randn(6).half(),
        "d": torch.arange(9).reshape(3, 3),
    }


def test_reader_agrees_with_the_safetensors_library(tmp_path):
    tensors = _random_tensors()
    save_file(tensors, tmp_path / "model.safetensors")
    folder = HFFolder(tmp_path)
    assert set(folder.names) == set(tensors)
    for name, tensor in tensors.items():
        assert folder.shape(name) == tuple(tensor.shape)
        assert folder.dtype(name) == tensor.dtype
        assert torch.equal(folder.read(name), tensor)
        assert torch.equal(folder.read_rows(name, 1, 3), tensor[1:3])
    assert torch.equal(folder.gather_rows("a", [6, 0, 6]), tensors["a"][[6, 0, 6]])
    assert torch.allclose(folder.read_mean_row("b", 4), tensors["b"][:4].double().mean(0))


@given(st.integers(1, 200))
@settings(max_examples=20, deadline=None)
def test_what_the_writer_writes_the_library_reads(tmp_path_factory, max_shard_bytes):
    folder = tmp_path_factory.mktemp("w")
    tensors = _random_tensors()
    specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    with HFWriter(folder, specs, max_shard_bytes=max_shard_bytes) as writer:
        for name, tensor in reversed(tensors.items()):
            if name == "a":
                writer.write_rows(name, 4, tensor[4:])
                writer.write_rows(name, 0, tensor[:4])
            else:
                writer.write(name, tensor)
        final = writer.count_final_bytes()
    assert final == {file: file.stat().st_size for file in folder.glob("*.safetensors")}
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found.update(load_file(file))
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    again = HFFolder(folder)
    assert all(torch.equal(again.read(name), tensor) for name, tensor in tensors.items())


def test_bytes_before_the_first_open_tensor_are_final(tmp_path):
    specs = {name: TensorSpec((2, 3), torch.float32) for name in "abc"}
    with HFWriter(tmp_path, specs) as writer:
        assert writer.count_final_bytes() == {}
        writer.write("b", torch.ones(2, 3))
        assert writer.count_final_bytes() == {}
        writer.write_rows("a", 1, torch.ones(1, 3))
        writer.write_rows("a", 0, torch.ones(1, 3))
        (path, final), *_ = writer.count_final_bytes().items()
        assert final == path.stat().st_size
        writer.write("c", torch.ones(2, 3))
    assert path.stat().st_size == final + 24


def test_payload_bits_of_nan_survive(tmp_path):
    bits = torch.tensor([0x7FC1, -0x3F, 0x7F81], dtype=torch.int16)
    with HFWriter(tmp_path, {"x": TensorSpec((3,), torch.bfloat16)}) as writer:
        writer.write("x", bits.view(torch.bfloat16))
    assert torch.equal(HFFolder(tmp_path).read("x").view(torch.int16), bits)


def test_a_tensor_not_fully_written_is_a_bug_that_shows(tmp_path):
    with pytest.raises(AssertionError, match="not written exactly once"):
        with HFWriter(tmp_path, {"x": TensorSpec((3, 2), torch.float32)}) as writer:
            writer.write_rows("x", 0, torch.zeros(2, 2))


def test_a_missing_shard_is_named(tmp_path):
    write_llama(tmp_path, max_shard_size="50KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"shard {shard.name} missing, which model.safetensors.index.json names"):
        HFFolder(tmp_path)


def test_a_file_that_is_cut_off_is_found_before_any_tensor_is_read(tmp_path):
    write_llama(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cut off at \d+ bytes, .* ends at \d+; fetch"):
        HFFolder(tmp_path)


@pytest.mark.parametrize("raw", [b"", b"\x10", b"\xff" * 64], ids=["empty", "short", "noise"])
def test_a_file_without_a_header_is_refused(tmp_path, raw):
    (tmp_path / "model.safetensors").write_bytes(raw)
    with pytest.raises(CheckpointError, match="no safetensors header; the file is cut off or damaged"):
        HFFolder(tmp_path)


def test_a_damaged_header_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes((8).to_bytes(8, "little") + b"{ no json" + b" " * 8)
    with pytest.raises(CheckpointError, match="the safetensors header is damaged"):
        HFFolder(tmp_path)


def test_sizes_that_do_not_fit_the_shape_are_refused(tmp_path):
    header = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match=r"x has 4 bytes for shape \(2,\)"):
        HFFolder(tmp_path)


def test_an_unknown_type_is_refused(tmp_path):
    header = json.dumps({"x": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match="x is of type F4; convert the weights to bfloat16 first"):
        HFFolder(tmp_path)


def test_pickled_weights_are_refused_with_the_way_out(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"pickled weights only \(pytorch_model.bin\).*save_pretrained\(OUT\)"):
        HFFolder(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        HFFolder(tmp_path)


def test_an_index_that_does_not_fit_its_shards_is_refused(tmp_path):
    write_llama(tmp_path, max_shard_size="50KB")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    names = list(content["weight_map"])
    shards = sorted(set(content["weight_map"].values()))
    content["weight_map"][names[0]] = next(shard for shard in shards if shard != content["weight_map"][names[0]])
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="index and shards do not fit"):
        HFFolder(tmp_path)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="no weight_map; the index is damaged"):
        HFFolder(tmp_path)


def test_a_tensor_that_is_not_there_is_named(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no tensor b; the checkpoint is incomplete"):
        HFFolder(tmp_path).read("b")


def test_a_folder_without_config_is_no_model(tmp_path):
    with pytest.raises(CheckpointError, match="no Hugging Face model folder"):
        read_hf_shape(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="a list, not an object"):
        read_hf_shape(tmp_path)
