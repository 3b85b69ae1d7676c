import io
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_adapt.checkpoint.archive import Place
from megatron_adapt.checkpoint.dist import DistReader, DistWriter
from megatron_adapt.checkpoint.values import TensorSpec
from megatron_adapt.errors import CheckpointError
from tests.helpers.evil import MakesFolder


def _write(folder, tensor: torch.Tensor, *, rows_per_chunk: int = 1, cut_columns: bool = False) -> None:
    """Write ``tensor`` [A, B, C] as a grid of chunks."""
    with DistWriter(folder, {"x": TensorSpec(tuple(tensor.shape), tensor.dtype)}) as writer:
        middle = tensor.shape[2] // 2
        for start in range(0, tensor.shape[0], rows_per_chunk):
            rows = tensor[start : start + rows_per_chunk]
            if cut_columns and middle:
                writer.write("x", (start, 0, 0), rows[..., :middle])
                writer.write("x", (start, 0, middle), rows[..., middle:])
            else:
                writer.write("x", (start, 0, 0), rows)
        writer.write_object("state/shard_0_1", {"k": 1})
        writer.write_common({"iteration": 3})


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_box_is_read_from_any_chunks(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("c")
    size = [data.draw(st.integers(1, 5)) for _ in range(3)]
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    tensor = torch.randn(size).to(dtype)
    _write(folder, tensor, rows_per_chunk=data.draw(st.integers(1, 3)), cut_columns=data.draw(st.booleans()))
    reader = DistReader(folder)
    assert reader.shape("x") == tuple(size)
    assert reader.dtype("x") == dtype
    assert torch.equal(reader.read("x"), tensor)
    begin = [data.draw(st.integers(0, n - 1)) for n in size]
    end = [data.draw(st.integers(a + 1, n)) for a, n in zip(begin, size, strict=True)]
    box = tuple(slice(a, b) for a, b in zip(begin, end, strict=True))
    assert torch.equal(reader.read("x", begin, [b - a for a, b in zip(begin, end, strict=True)]), tensor[box])


def test_torch_reads_what_we_write(tmp_path):
    tensor = torch.randn(3, 4, 5)
    _write(tmp_path, tensor, cut_columns=True)
    state = {"x": torch.empty(3, 4, 5)}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    assert torch.equal(state["x"], tensor)
    assert torch.load(tmp_path / "common.pt", weights_only=True) == {"iteration": 3}


def test_we_read_what_torch_writes(tmp_path):
    tensor = torch.randn(6, 5)
    dcp.save({"x": tensor, "step": 3}, checkpoint_id=tmp_path, no_dist=True)
    reader = DistReader(tmp_path)
    assert reader.keys == ["x"]
    assert reader.shape("y") is None
    assert torch.equal(reader.read("x", (2, 1), (3, 2)), tensor[2:5, 1:3])


def test_large_checkpoints_are_spread_over_files(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_adapt.checkpoint.dist.MAX_FILE_BYTES", 2000)
    tensor = torch.randn(4, 10, 10)
    _write(tmp_path, tensor)
    assert len(list(tmp_path.glob("*.distcp"))) > 1
    assert torch.equal(DistReader(tmp_path).read("x"), tensor)


def test_a_view_does_not_drag_its_storage_along(tmp_path):
    big = torch.randn(1000, 1, 10)
    with DistWriter(tmp_path, {"x": TensorSpec((1, 1, 10), torch.float32)}) as writer:
        writer.write("x", (0, 0, 0), big[:1])
    assert (tmp_path / "__0_0.distcp").stat().st_size < 5000


def test_a_missing_file_is_named(tmp_path):
    _write(tmp_path, torch.randn(2, 2, 2))
    (tmp_path / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp missing, which \.metadata names"):
        DistReader(tmp_path)


def test_a_file_that_is_cut_off_is_found_at_once(tmp_path):
    _write(tmp_path, torch.randn(2, 2, 2))
    path = tmp_path / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: cut off at \d+ bytes, \d+ are expected"):
        DistReader(tmp_path)


def test_a_damaged_chunk_is_refused(tmp_path):
    _write(tmp_path, torch.randn(2, 2, 2))
    path = tmp_path / "__0_0.distcp"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(CheckpointError, match="x: damaged or of an unknown form"):
        DistReader(tmp_path).read("x")


def test_a_folder_without_index_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no \.metadata; this is no torch_dist checkpoint"):
        DistReader(tmp_path)


@pytest.mark.parametrize("raw", [b"", b"noise", pickle.dumps({"a": 1})], ids=["empty", "noise", "other"])
def test_a_damaged_index_is_refused(tmp_path, raw):
    (tmp_path / ".metadata").write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"\.metadata: damaged"):
        DistReader(tmp_path)


def test_an_index_with_foreign_code_does_not_run_it(tmp_path):
    target = tmp_path / "ran"
    (tmp_path / ".metadata").write_bytes(pickle.dumps(MakesFolder(target)))
    with pytest.raises(CheckpointError, match="damaged"):
        DistReader(tmp_path)
    assert not target.exists()


def test_chunks_that_do_not_cover_a_tensor_are_refused(tmp_path):
    _write(tmp_path, torch.randn(3, 2, 2))
    reader = DistReader(tmp_path)
    reader._sorted["x"]._chunks.pop()
    with pytest.raises(CheckpointError, match="chunks of x hold 8 of 12 values"):
        reader.read("x")


def test_a_chunk_with_other_strides_is_refused(tmp_path):
    _write(tmp_path, torch.randn(2, 2, 2))
    raw = io.BytesIO()
    torch.save(torch.randn(1, 2, 2).transpose(1, 2), raw)
    path = tmp_path / "__0_0.distcp"
    reader = DistReader(tmp_path)
    reader._index.places["x", (0, 0, 0)] = Place(path.name, 0, len(raw.getvalue()))
    path.write_bytes(raw.getvalue())
    with pytest.raises(CheckpointError, match="stored with strides"):
        reader.read("x", (0, 0, 0), (1, 2, 2))
