"""Cut the copying of a model into slices of a few MiB, and do them in order by a few threads.

A slice is a run of rows that lie side by side in a Hugging Face tensor and in its Megatron tensor: reading and writing
one is a single call each. ``list_slices`` goes through the name table of ``layout``; ``run_steps`` does the slices and
tells now and then how many are done, so that a conversion that was killed can go on behind them.

Cost: memory of ``NUM_THREADS`` slices; files are read and written front to back.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import torch

from megatron_adapt.checkpoint.layout import list_parts, list_rules, list_runs, shape_hf
from megatron_adapt.shape import LlamaShape

NUM_THREADS = 3
SLICE_BYTES = 2 << 20
CHUNK_BYTES = 64 << 20
"Most bytes of a chunk of a Megatron checkpoint; a rank that needs a part of a chunk reads all of it."
SAVE_BYTES = 256 << 20
"So many bytes are written between two notes of how far the work is; a restart does at most these again."
Step = TypeVar("Step")


class Slice(NamedTuple):
    """Rows of a Hugging Face tensor and of the Megatron tensor that holds them.

    Attributes:
        hf: name of the Hugging Face tensor.
        hf_row: first row there.
        key: key of the Megatron tensor.
        layer: number of the layer, or None where the Megatron tensor has no layer axis.
        row: first row in the Megatron tensor of that layer.
        num_rows: rows, or values of a tensor with one axis.
    """

    hf: str
    hf_row: int
    key: str
    layer: int | None
    row: int
    num_rows: int

    def place(self, inner: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return offsets and sizes of the slice in the Megatron tensor; ``inner`` is the shape of a row."""
        zeros = (0,) * len(inner)
        if self.layer is None:
            return (self.row, *zeros), (self.num_rows, *inner)
        return (self.layer, self.row, *zeros), (1, self.num_rows, *inner)


def count_chunk_rows(row_bytes: int) -> int:
    """Return how many rows a chunk of a Megatron tensor has."""
    return max(1, CHUNK_BYTES // row_bytes)


def list_slices(shape: LlamaShape, itemsizes: dict[str, int]) -> list[Slice]:
    """Return the slices of all tensors of a model; none crosses a chunk of ``count_chunk_rows``.

    Args:
        shape: the model; rows that pad a vocabulary matrix belong to no slice.
        itemsizes: bytes of a value by Megatron key.
    """
    slices = []
    for rule in list_rules(shape):
        inner = shape_hf(rule, shape)[0][1:]
        row_bytes = itemsizes[rule.megatron] * torch.Size(inner).numel()
        chunk_rows, most_rows = count_chunk_rows(row_bytes), max(1, SLICE_BYTES // row_bytes)
        for layer in list_parts(rule, shape):
            names = rule.name_hf(layer)
            for part, hf_row, row, num_rows in list_runs(rule, shape):
                done = 0
                while done < num_rows:
                    at = row + done
                    count = min(num_rows - done, most_rows, chunk_rows - at % chunk_rows)
                    where = layer if rule.stacked else None
                    slices.append(Slice(names[part], hf_row + done, rule.megatron, where, at, count))
                    done += count
    return slices


class _Work:
    """What the threads of ``run_steps`` share; every method holds the lock for a moment only."""

    def __init__(self, start: int, total: int) -> None:
        self.changed = threading.Condition()
        self.error: BaseException | None = None
        self.first_open = start
        "All steps before this one are done."
        self.unsaved_bytes = 0
        self.stopped = False
        self._next, self._total = start, total
        self._ahead: set[int] = set()

    def take(self) -> int | None:
        with self.changed:
            if self.stopped or self._next >= self._total:
                return None
            self._next += 1
            return self._next - 1

    def finish(self, at: int, num_bytes: int) -> None:
        with self.changed:
            self._ahead.add(at)
            while self.first_open in self._ahead:
                self._ahead.remove(self.first_open)
                self.first_open += 1
            self.unsaved_bytes += num_bytes
            if self.unsaved_bytes >= SAVE_BYTES or self.first_open == self._total:
                self.changed.notify_all()

    def fail(self, error: BaseException) -> None:
        with self.changed:
            self.error = self.error or error
            self.stopped = True
            self.changed.notify_all()

    def wait(self) -> int:
        """Wait until enough was written to be noted or all is done; return how many steps are done."""
        with self.changed:
            self.changed.wait_for(
                lambda: self.error or self.unsaved_bytes >= SAVE_BYTES or self.first_open == self._total
            )
            self.unsaved_bytes = 0
            return self.first_open


def run_steps(
    steps: Sequence[Step],
    act: Callable[[Step, torch.Tensor], int],
    *,
    start: int = 0,
    save: Callable[[int], None] | None = None,
) -> None:
    """Do the steps from number ``start`` on, a few at a time.

    Args:
        steps: what to do, in order.
        act: does one step, in any thread, and returns the bytes it wrote; it gets ``SLICE_BYTES`` of memory to use.
        start: steps before this one are done.
        save: is told in this thread how many steps are done, every ``SAVE_BYTES`` and at the end.

    Raises:
        BaseException: the first that ``act`` or ``save`` raised; no further step is begun.
    """
    work = _Work(start, len(steps))

    def run_thread() -> None:
        try:
            buffer = torch.empty(SLICE_BYTES, dtype=torch.uint8)
            while (at := work.take()) is not None:
                work.finish(at, act(steps[at], buffer))
        except BaseException as error:  # handed to the thread that waits
            work.fail(error)

    threads = [threading.Thread(target=run_thread, daemon=True) for _ in range(NUM_THREADS)]
    with _single_threaded_torch():
        for thread in threads:
            thread.start()
        try:
            while True:
                done = work.wait()
                if work.error is not None:
                    break
                if save is not None:
                    save(done)
                if done == len(steps):
                    break
        except BaseException as error:
            work.fail(error)
        for thread in threads:
            thread.join()
    if work.error is not None:
        raise work.error


@contextmanager
def _single_threaded_torch() -> Iterator[None]:
    """Keep torch from starting threads of its own below ours."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
