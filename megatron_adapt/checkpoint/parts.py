"""Write a model part by part, so that a resize or a reshape that was killed goes on behind the parts that are done.

Matrices that the caller writes whole come first, one after the other (``write_matrix``); then ``copy_part`` copies the
parts of all other tensors, a few at a time. How many are done is noted every 256 MiB (``slices``).
"""

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

from megatron_adapt.checkpoint import slices
from megatron_adapt.checkpoint.dist import DistWriter
from megatron_adapt.checkpoint.hf import HFWriter
from megatron_adapt.checkpoint.resume import PartialFolder
from megatron_adapt.checkpoint.values import TensorSpec, list_boxes, list_row_blocks
from megatron_adapt.logs import show_progress


class Part(NamedTuple):
    """A box of a tensor that is copied as it is.

    Attributes:
        name: the tensor.
        offsets: where the box begins.
        sizes: of the box.
        chunk: where the chunk begins that the box lies in.
        start: number of values of the chunk before the box.
    """

    name: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    chunk: tuple[int, ...] = ()
    start: int = 0


def cut_parts(name: str, spec: TensorSpec) -> Iterator[Part]:
    """Cut a tensor of a Megatron checkpoint into chunks of ``slices.CHUNK_BYTES``, and these into parts."""
    for chunk, sizes in list_boxes(spec, slices.CHUNK_BYTES):
        start = 0
        for offsets, part in list_boxes(TensorSpec(sizes, spec.dtype), slices.SLICE_BYTES):
            begin = tuple(one + other for one, other in zip(chunk, offsets, strict=True))
            yield Part(name, begin, part, chunk, start)
            start += math.prod(part)


def cut_rows(name: str, spec: TensorSpec) -> Iterator[Part]:
    """Cut a tensor of a Hugging Face folder into runs of rows of ``slices.SLICE_BYTES``."""
    for start, stop in list_row_blocks(spec, slices.SLICE_BYTES):
        yield Part(name, (start,), (stop - start, *spec.shape[1:]))


def write_model(
    title: str,
    writer: HFWriter | DistWriter,
    *,
    matrices: Mapping[str, TensorSpec],
    write_matrix: Callable[[str], None],
    parts: Sequence[Part],
    copy_part: Callable[[Part, torch.Tensor], int],
    total_bytes: int,
    progress: PartialFolder,
) -> None:
    """Write every matrix and every part that an earlier run did not.

    Args:
        title: what the progress bar says.
        writer: what the two functions write to.
        matrices: tensors that are written whole; may be none.
        write_matrix: writes all of one.
        parts: the rest of the model.
        copy_part: copies one in any thread, with ``slices.SLICE_BYTES`` of memory to use, and returns its bytes.
        total_bytes: bytes of the model.
        progress: how far that run came, and where to note how far this one comes.
    """

    def save(done: int) -> None:
        writer.sync()
        progress.save(done)

    with _show_bytes(title, total_bytes) as advance:
        for number, (name, spec) in enumerate(matrices.items(), start=1):
            if number <= progress.done:
                writer.count_written(name, math.prod(spec.shape))
            else:
                write_matrix(name)
                save(number)
            advance(spec.num_bytes)
        start = max(0, progress.done - len(matrices))
        for part in parts[:start]:
            writer.count_written(part.name, math.prod(part.sizes))

        def copy_and_show(part: Part, buffer: torch.Tensor) -> int:
            num_bytes = copy_part(part, buffer)
            advance(num_bytes)
            return num_bytes

        slices.run_steps(parts, copy_and_show, start=start, save=lambda done: save(len(matrices) + done))


@contextmanager
def _show_bytes(title: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Show progress in MB; may be called by several threads."""
    lock = threading.Lock()
    with show_progress(title, total_bytes / 1e6, "MB") as advance:

        def advance_locked(num_bytes: int) -> None:
            with lock:
                advance(num_bytes / 1e6)

        yield advance_locked
