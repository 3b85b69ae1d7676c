import itertools
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_adapt.checkpoint.assemble import AssembledSource, Part
from megatron_adapt.errors import CheckpointError

STACKED = "decoder.layers.mlp.linear_fc2.weight"


def _read(tensor, offsets, sizes, buffer):
    return tensor[tuple(slice(a, a + n) for a, n in zip(offsets, sizes, strict=True))]


def _part(layer: torch.Tensor, begin: list[int], end: list[int], margin: int = 0) -> Part:
    """Return a box of a layer, stored in a tensor of its own behind ``margin`` foreign rows."""
    box = layer[tuple(slice(a, b) for a, b in zip(begin, end, strict=True))]
    own = torch.cat([torch.full((margin, *box.shape[1:]), -1.0).to(box), box])
    inner = (margin, *[0] * (box.dim() - 1))
    return Part(tuple(begin), tuple(box.shape), inner, box.dtype, partial(_read, own))


def _cuts(data, size: int) -> list[tuple[int, int]]:
    inner = data.draw(st.sets(st.integers(1, size - 1))) if size > 1 else set()
    return list(itertools.pairwise([0, *sorted(inner), size]))


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_any_box_is_put_together_from_any_parts(data):
    size = [data.draw(st.integers(1, 5)) for _ in range(3)]
    whole = torch.randn(size)
    layers = []
    for layer in whole:
        rows, columns = _cuts(data, size[1]), _cuts(data, size[2])
        parts = [
            _part(layer, [a, c], [b, d], data.draw(st.integers(0, 2)))
            for (a, b), (c, d) in itertools.product(rows, columns)
        ]
        layers.append(data.draw(st.permutations(parts)))
    source = AssembledSource(Path("x"), [], {STACKED: layers, "plain": layers[:1]})
    assert source.shape(STACKED) == tuple(size)
    assert source.shape("plain") == tuple(size[1:])
    assert source.shape("other") is None
    begin = [data.draw(st.integers(0, n - 1)) for n in size]
    end = [data.draw(st.integers(a + 1, n)) for a, n in zip(begin, size, strict=True)]
    sizes = [b - a for a, b in zip(begin, end, strict=True)]
    box = tuple(slice(a, b) for a, b in zip(begin, end, strict=True))
    assert torch.equal(source.read(STACKED, begin, sizes), whole[box])
    assert torch.equal(source.read("plain", begin[1:], sizes[1:]), whole[0][box[1:]])
    assert torch.equal(source.read(STACKED), whole)


def test_a_box_that_parts_do_not_cover_is_refused():
    layer = torch.randn(4, 4)
    source = AssembledSource(Path("x"), [], {STACKED: [[_part(layer, [0, 0], [2, 4]), _part(layer, [2, 2], [4, 4])]]})
    assert torch.equal(source.read(STACKED, (0, 1, 2), (1, 3, 2))[0], layer[1:4, 2:])
    with pytest.raises(CheckpointError, match="of layer 0 is stored for 12 of 16 values; the checkpoint is incomplete"):
        source.read(STACKED)


def test_parts_of_two_types_are_refused():
    layer = torch.randn(2, 2)
    parts = [_part(layer, [0, 0], [1, 2]), _part(layer.bfloat16(), [1, 0], [2, 2])]
    with pytest.raises(CheckpointError, match=r"is stored as torch\.bfloat16 and torch\.float32; save the checkpoint"):
        AssembledSource(Path("x"), [], {STACKED: [parts]})
