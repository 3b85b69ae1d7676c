"""Plain tensor values between files and memory: one copy, at any offset, no file position shared between calls."""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from megatron_adapt.errors import CheckpointError

BLOCK_BYTES = 4 << 20
"Most bytes of a matrix that are in memory at a time where it is handled row by row."


class _Box(Protocol):
    @property
    def offsets(self) -> tuple[int, ...]: ...

    @property
    def sizes(self) -> tuple[int, ...]: ...


StoredBox = TypeVar("StoredBox", bound=_Box)
"A part of a tensor that is stored in one piece: where it begins, and its shape."


class TensorSpec(NamedTuple):
    """Shape and type of a tensor that is still to be read or written."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor's values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch type of a name such as "bfloat16"."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype), name
    return dtype


def list_row_blocks(spec: TensorSpec, max_bytes: int | None = None) -> Iterator[tuple[int, int]]:
    """Yield [start, stop) of row blocks of at most ``max_bytes`` (``BLOCK_BYTES``; but at least one row)."""
    num_rows = spec.shape[0]
    row_bytes = max(1, spec.num_bytes // max(1, num_rows))
    step = max(1, (max_bytes or BLOCK_BYTES) // row_bytes)
    for start in range(0, num_rows, step):
        yield start, min(start + step, num_rows)


def list_boxes(spec: TensorSpec, max_bytes: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield offsets and sizes of boxes of at most ``max_bytes``, each one run of values, in the order of the values."""
    axis = 0
    while axis + 1 < len(spec.shape) and TensorSpec(spec.shape[axis + 1 :], spec.dtype).num_bytes > max_bytes:
        axis += 1
    inner = spec.shape[axis + 1 :]
    step = max(1, max_bytes // max(1, TensorSpec(inner, spec.dtype).num_bytes))
    zeros = (0,) * len(inner)
    for front in itertools.product(*map(range, spec.shape[:axis])):
        for start in range(0, spec.shape[axis], step):
            rows = min(step, spec.shape[axis] - start)
            yield (*front, start, *zeros), (*[1] * axis, rows, *inner)


def gather_box(
    starts: Sequence[int],
    sizes: Sequence[int],
    stored: Iterable[StoredBox],
    read: Callable[[StoredBox, list[int], list[int]], torch.Tensor],
) -> tuple[torch.Tensor | None, int]:
    """Put the box of ``sizes`` that begins at ``starts`` together from stored boxes that do not overlap.

    Args:
        starts: where the box begins.
        sizes: its shape.
        stored: boxes that may hold a part of it.
        read: reads the values of a stored box from one place up to another, both in the whole tensor.

    Returns:
        The values (None where no stored box touches them), and how many of them the stored boxes hold.
    """
    values: torch.Tensor | None = None
    covered = 0
    for item in stored:
        begin = [max(a, b) for a, b in zip(starts, item.offsets, strict=True)]
        end = [min(a + n, b + m) for a, n, b, m in zip(starts, sizes, item.offsets, item.sizes, strict=True)]
        if any(a >= b for a, b in zip(begin, end, strict=True)):
            continue
        found = read(item, begin, end)
        if tuple(found.shape) == tuple(sizes):
            return found, found.numel()
        values = torch.empty(tuple(sizes), dtype=found.dtype) if values is None else values
        values[tuple(slice(a - s, b - s) for a, b, s in zip(begin, end, starts, strict=True))] = found
        covered += found.numel()
    return values, covered


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous tensor; writing to it writes to the tensor."""
    values: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(values)


def read_values(descriptor: int, offset: int, spec: TensorSpec, buffer: torch.Tensor | None = None) -> torch.Tensor:
    """Read a tensor whose values lie at a byte offset of an open file.

    Args:
        descriptor: the open file.
        offset: where the values begin.
        spec: the tensor.
        buffer: bytes to put the values in, so that no memory is taken; used where it is large enough.

    Raises:
        CheckpointError: the file ends before the tensor does.
    """
    if buffer is not None and spec.num_bytes <= buffer.numel():
        values = buffer[: spec.num_bytes].view(spec.dtype).view(spec.shape)
    else:
        values = torch.empty(spec.shape, dtype=spec.dtype)
    read_into(descriptor, offset, bytes_of(values))
    return values


def read_into(descriptor: int, offset: int, buffer: memoryview) -> None:
    """Fill ``buffer`` from a byte offset of an open file.

    Raises:
        CheckpointError: the file ends before the buffer is full.
    """
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if not count:
            raise CheckpointError(
                f"weights file: ended {len(buffer) - done} bytes early; it changed while it was read, start again"
            )
        done += count


def write_values(descriptor: int, offset: int, values: torch.Tensor) -> None:
    """Write the values of a tensor at a byte offset of an open file."""
    write_bytes(descriptor, offset, bytes_of(values.contiguous()))


def write_bytes(descriptor: int, offset: int, buffer: memoryview) -> None:
    """Write all of ``buffer`` at a byte offset of an open file."""
    done = 0
    while done < len(buffer):
        done += os.pwrite(descriptor, buffer[done:], offset + done)
