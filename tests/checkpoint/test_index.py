import pickle

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_adapt.checkpoint.archive import Place
from megatron_adapt.checkpoint.index import Chunk, Index, StoredTensor, read_index, write_index
from megatron_adapt.errors import CheckpointError

OURS = Index(
    tensors={
        "a": StoredTensor((4, 2), torch.bfloat16, [Chunk((0, 0), (3, 2)), Chunk((3, 0), (1, 2))]),
        "b": StoredTensor((5,), torch.float32, [Chunk((0,), (5,))]),
    },
    places={
        ("a", (0, 0)): Place("x.distcp", 0, 10),
        ("a", (3, 0)): Place("y.distcp", 3, 11),
        ("b", (0,)): Place("x.distcp", 10, 12),
    },
    objects={"state/shard_0_1": Place("x.distcp", 30, 7)},
)


def _make_torchs() -> Metadata:
    tensors = {
        "a": TensorStorageMetadata(
            TensorProperties(dtype=torch.bfloat16),
            torch.Size((4, 2)),
            [
                ChunkStorageMetadata(torch.Size((0, 0)), torch.Size((3, 2))),
                ChunkStorageMetadata(torch.Size((3, 0)), torch.Size((1, 2))),
            ],
        ),
        "b": TensorStorageMetadata(
            TensorProperties(dtype=torch.float32),
            torch.Size((5,)),
            [ChunkStorageMetadata(torch.Size((0,)), torch.Size((5,)))],
        ),
    }
    places = {
        MetadataIndex("a", torch.Size((0, 0)), 0): _StorageInfo("x.distcp", 0, 10),
        MetadataIndex("a", torch.Size((3, 0)), 1): _StorageInfo("y.distcp", 3, 11),
        MetadataIndex("b", torch.Size((0,)), 0): _StorageInfo("x.distcp", 10, 12),
        MetadataIndex("state/shard_0_1"): _StorageInfo("x.distcp", 30, 7),
    }
    return Metadata({**tensors, "state/shard_0_1": BytesStorageMetadata()}, storage_data=places)


def test_torch_unpickles_our_index_as_its_own_records(tmp_path):
    write_index(tmp_path / ".metadata", OURS)
    found, expected = pickle.loads((tmp_path / ".metadata").read_bytes()), _make_torchs()
    assert type(found) is Metadata
    assert found == expected
    assert [key.index for key in found.storage_data] == [key.index for key in expected.storage_data]


def test_what_torch_writes_and_what_we_write_reads_alike(tmp_path):
    (tmp_path / "torch").write_bytes(pickle.dumps(_make_torchs()))
    write_index(tmp_path / "ours", OURS)
    assert read_index(tmp_path / "torch") == read_index(tmp_path / "ours") == OURS


def test_an_index_that_ends_early_is_damaged(tmp_path):
    write_index(tmp_path / ".metadata", OURS)
    raw = (tmp_path / ".metadata").read_bytes()
    for length in range(0, len(raw), 97):
        (tmp_path / ".metadata").write_bytes(raw[:length])
        with pytest.raises(CheckpointError, match=r"\.metadata: damaged; the checkpoint cannot be read"):
            read_index(tmp_path / ".metadata")
