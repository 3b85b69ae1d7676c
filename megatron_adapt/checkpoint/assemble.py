"""Tensors under the names of ``layout``, put together from boxes that are stored elsewhere, when they are read.

``Source`` is what conversion and comparison read from. ``dist.DistReader`` is one as it stands; ``AssembledSource``
presents a checkpoint that is cut otherwise (``foreign``, ``legacy``) in the same way: every tensor is the boxes that
make it up, each with a function that reads a part of it. Cost: memory of the box that is asked for.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from megatron_adapt.checkpoint.layout import STACKED_PREFIX
from megatron_adapt.checkpoint.values import TensorSpec, gather_box
from megatron_adapt.errors import CheckpointError

ReadBox = Callable[[Sequence[int], Sequence[int], torch.Tensor | None], torch.Tensor]
"Takes offsets, sizes and a buffer, and returns the values."


class Source(Protocol):
    """Tensors of a model under the names of ``layout``; may be used by several threads."""

    folder: Path

    @property
    def keys(self) -> list[str]:
        """Keys of all tensors."""

    @property
    def files(self) -> list[Path]:
        """Files that hold them."""

    def shape(self, key: str) -> tuple[int, ...] | None:
        """Return the shape of a tensor, or None when there is no such key."""

    def dtype(self, key: str) -> torch.dtype:
        """Return the type of a tensor."""

    def read(
        self,
        key: str,
        offsets: Sequence[int] | None = None,
        sizes: Sequence[int] | None = None,
        buffer: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Read a tensor, or the box of ``sizes`` that begins at ``offsets``."""


class Part(NamedTuple):
    """A box of one layer of a tensor (of the whole, where it has no layers).

    Attributes:
        offsets: where the box begins.
        sizes: its shape.
        inner: where it begins in what ``read`` reads from.
        dtype: type of its values.
        read: reads from there.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    inner: tuple[int, ...]
    dtype: torch.dtype
    read: ReadBox


class AssembledSource:
    """Tensors put together from parts.

    Raises:
        CheckpointError: parts of one tensor are of different types.
    """

    def __init__(self, folder: Path, files: Sequence[Path], tensors: Mapping[str, Sequence[Sequence[Part]]]) -> None:
        """Take the parts by key and layer; a tensor without layer axis counts as one layer."""
        self.folder = folder
        self._files = list(files)
        self._tensors = {key: [list(parts) for parts in layers] for key, layers in tensors.items()}
        self._specs: dict[str, TensorSpec] = {}
        for key, layers in self._tensors.items():
            dtypes = {part.dtype for parts in layers for part in parts}
            if len(dtypes) > 1:
                named = " and ".join(sorted(map(str, dtypes)))
                raise CheckpointError(f"{folder}: {key} is stored as {named}; save the checkpoint in one type")
            ends = zip(*([o + n for o, n in zip(p.offsets, p.sizes, strict=True)] for p in layers[0]), strict=True)
            lead = (len(layers),) if key.startswith(STACKED_PREFIX) else ()
            self._specs[key] = TensorSpec((*lead, *map(max, ends)), dtypes.pop())

    @property
    def keys(self) -> list[str]:
        """Keys of all tensors."""
        return list(self._specs)

    @property
    def files(self) -> list[Path]:
        """Files that hold them."""
        return self._files

    def shape(self, key: str) -> tuple[int, ...] | None:
        """Return the shape of a tensor, or None when there is no such key."""
        return self._specs[key].shape if key in self._specs else None

    def dtype(self, key: str) -> torch.dtype:
        """Return the type of a tensor."""
        return self._specs[key].dtype

    def read(
        self,
        key: str,
        offsets: Sequence[int] | None = None,
        sizes: Sequence[int] | None = None,
        buffer: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Read a tensor, or the box of ``sizes`` that begins at ``offsets``, into ``buffer`` where that saves a copy.

        Raises:
            CheckpointError: no part covers some of it, or a file is damaged.
        """
        shape = self._specs[key].shape
        starts = [0] * len(shape) if offsets is None else list(offsets)
        sizes = list(shape if sizes is None else sizes)
        if not key.startswith(STACKED_PREFIX):
            return self._read_layer(key, 0, starts, sizes, buffer)
        if sizes[0] == 1:
            return self._read_layer(key, starts[0], starts[1:], sizes[1:], buffer)[None]
        layers = range(starts[0], starts[0] + sizes[0])
        return torch.stack([self._read_layer(key, layer, starts[1:], sizes[1:], None) for layer in layers])

    def _read_layer(
        self, key: str, layer: int, starts: Sequence[int], sizes: Sequence[int], buffer: torch.Tensor | None
    ) -> torch.Tensor:
        def read_part(part: Part, begin: list[int], end: list[int]) -> torch.Tensor:
            inner = [i + a - o for i, a, o in zip(part.inner, begin, part.offsets, strict=True)]
            return part.read(inner, [b - a for a, b in zip(begin, end, strict=True)], buffer)

        values, covered = gather_box(starts, sizes, self._tensors[key][layer], read_part)
        if values is None or covered != values.numel():
            raise CheckpointError(
                f"{self.folder}: {key} of layer {layer} is stored for {covered} of {math.prod(sizes)} values; the "
                "checkpoint is incomplete, take another one"
            )
        return values
