"""Compare the tensors of checkpoints by their bytes."""

from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories

from megatron_adapt.checkpoint.convert import convert_checkpoint
from megatron_adapt.checkpoint.dist import DistReader
from megatron_adapt.checkpoint.hf import HFFolder
from megatron_adapt.config import ConvertCheckpoint


def convert_to_hf(source: Path, output: Path, **changes: Any) -> Path:
    """Convert a Megatron checkpoint; return the output."""
    convert_checkpoint(ConvertCheckpoint(source=source, to="hf", output=output, **changes))
    return output


def assert_same_tensors(left: Path, right: Path) -> None:
    """Compare names, shapes, types and bytes of two Hugging Face folders."""
    a, b = HFFolder(left), HFFolder(right)
    assert a.specs.keys() == b.specs.keys()
    for name in a.names:
        assert a.specs[name] == b.specs[name], name
        assert torch.equal(a.read(name).view(torch.uint8), b.read(name).view(torch.uint8)), name


def compare_shards(state: dict[str, Any], reader: DistReader) -> dict[tuple[str, tuple[int, ...]], int]:
    """Compare every shard of a sharded state with its box of the checkpoint; return the boxes and their sizes.

    Args:
        state: sharded tensors alone; its factories are applied in place.
        reader: the checkpoint they were loaded from.
    """
    apply_factories(state)
    boxes = {}
    for shard in nested_values(state):
        expected = reader.read(shard.key, shard.global_offset, (1,) * shard.prepend_axis_num + shard.local_shape)
        assert torch.equal(shard.data, expected.view(shard.local_shape)), shard
        boxes[shard.key, shard.global_offset] = shard.data.numel()
    return boxes
