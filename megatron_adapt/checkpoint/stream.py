"""Copy the weights of a model between the two formats, slice by slice.

Reads and writes: the tensors of ``hf`` and ``dist``, and nothing else; ``convert`` does the rest. Guarantees: every
value is written once; what is read goes to its place by the table of ``layout``; a copy that was killed goes on behind
the slices that were noted.

1. ``spec_megatron`` / ``spec_hf`` say which tensors there will be;
2. ``stream_to_megatron`` reserves the chunks (``_reserve_chunks``), copies the slices and fills the vocabulary matrices
   up (``_write_padding``);
3. ``stream_to_hf`` copies them back and leaves the padding out.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from megatron_adapt.checkpoint.archive import can_store
from megatron_adapt.checkpoint.assemble import Source
from megatron_adapt.checkpoint.dist import DistWriter
from megatron_adapt.checkpoint.finite import FiniteWatch
from megatron_adapt.checkpoint.hf import HFFolder, HFWriter
from megatron_adapt.checkpoint.layout import (
    EMBEDDING,
    HEAD,
    STACKED_PREFIX,
    TensorRule,
    list_hf_tensors,
    list_parts,
    list_rules,
    shape_megatron,
)
from megatron_adapt.checkpoint.resume import PartialFolder
from megatron_adapt.checkpoint.slices import Slice, count_chunk_rows, list_slices, run_steps
from megatron_adapt.checkpoint.sums import FollowingHasher
from megatron_adapt.checkpoint.values import TensorSpec
from megatron_adapt.errors import CheckpointError
from megatron_adapt.logs import Advance, show_progress
from megatron_adapt.shape import LlamaShape


def stream_to_megatron(
    source: HFFolder,
    target: Path,
    shape: LlamaShape,
    *,
    padded_vocab_size: int,
    dtype: torch.dtype | None,
    progress: PartialFolder,
) -> None:
    """Write the tensors of a Hugging Face folder as a ``torch_dist`` folder.

    Args:
        source: checked weights.
        target: existing folder; what is in it was written by the same call before it was killed.
        shape: the model.
        padded_vocab_size: rows of the vocabulary matrices in the output; the mean of the old rows fills them up.
        dtype: type to write, or None to keep that of the source.
        progress: how far that call came, and where to note how far this one comes.

    Raises:
        CheckpointError: ``dtype`` is None and tensors that share one Megatron tensor are of different types.
    """
    specs = spec_megatron(source, shape, padded_vocab_size, dtype)
    slices = list_slices(shape, {key: spec.dtype.itemsize for key, spec in specs.items()})
    slices = _add_padding(slices, shape, padded_vocab_size)
    watch = FiniteWatch(str(source.folder))
    with DistWriter(target, specs) as writer, _show_bytes(slices, specs, progress.done) as advance:
        for key, spec in specs.items():
            _reserve_chunks(writer, key, spec)

        def copy_slice(item: Slice, buffer: torch.Tensor) -> int:
            spec = specs[item.key]
            if item.row == item.hf_row == shape.vocab_size:
                num_bytes = _write_padding(source, writer, item, spec)
            else:
                rows = source.read_rows(item.hf, item.hf_row, item.hf_row + item.num_rows, buffer).to(spec.dtype)
                watch.check(item.hf, item.hf_row, rows)
                num_bytes = _write_rows(writer, item, spec, rows)
            advance(num_bytes / 1e6)
            return num_bytes

        for item in slices[: progress.done]:
            writer.count_written(item.key, item.num_rows * _row_shape(item, specs[item.key]).numel())
        run_steps(slices, copy_slice, start=progress.done, save=_save_synced(writer, progress))
        writer.write_release_state(shape.num_layers)


def spec_megatron(
    source: HFFolder, shape: LlamaShape, padded_vocab_size: int, dtype: torch.dtype | None
) -> dict[str, TensorSpec]:
    """Return the tensors that ``stream_to_megatron`` writes, by key.

    Raises:
        CheckpointError: the types do not fit together.
    """
    specs = {
        rule.megatron: TensorSpec(
            shape_megatron(rule, shape, padded_vocab_size), dtype or _common_dtype(source, rule, shape)
        )
        for rule in list_rules(shape)
    }
    for key, spec in specs.items():
        if not can_store(spec.dtype):
            raise CheckpointError(
                f"{source.folder}: {key} would be of type {spec.dtype}, which a Megatron checkpoint cannot hold; "
                "choose another: --dtype bfloat16"
            )
    return specs


def spec_hf(source: Source, shape: LlamaShape, dtype: torch.dtype | None) -> dict[str, TensorSpec]:
    """Return the tensors that ``stream_to_hf`` writes, by name."""
    return {name: TensorSpec(size, dtype or source.dtype(rule.megatron)) for rule, name, size in list_hf_tensors(shape)}


def _row_shape(item: Slice, spec: TensorSpec) -> torch.Size:
    return torch.Size(spec.shape[1 if item.layer is None else 2 :])


def _reserve_chunks(writer: DistWriter, key: str, spec: TensorSpec) -> None:
    """Reserve the chunks of a tensor: a layer each, or rows of it where a layer is large."""
    stacked = key.startswith(STACKED_PREFIX)
    layers, inner = (spec.shape[:1], spec.shape[1:]) if stacked else ((), spec.shape)
    row = TensorSpec(inner[1:], spec.dtype)
    step = count_chunk_rows(row.num_bytes)
    for layer in range(layers[0]) if stacked else [None]:
        for start in range(0, inner[0], step):
            item = Slice("", 0, key, layer, start, min(step, inner[0] - start))
            writer.reserve(key, *item.place(row.shape))


def _write_rows(writer: DistWriter, item: Slice, spec: TensorSpec, rows: torch.Tensor) -> int:
    """Write a slice into its chunk and return its bytes."""
    inner = _row_shape(item, spec)
    step = count_chunk_rows(TensorSpec(tuple(inner), spec.dtype).num_bytes)
    first = item.row // step * step
    offsets, _ = item._replace(row=first).place(tuple(inner))
    writer.write_values(item.key, offsets, (item.row - first) * inner.numel(), rows)
    return rows.nbytes


def _add_padding(slices: Sequence[Slice], shape: LlamaShape, padded_vocab_size: int) -> list[Slice]:
    """Add the rows that fill a vocabulary matrix up, behind the slices of the matrix."""
    added: list[Slice] = []
    for item in slices:
        added.append(item)
        if item.layer is None and item.hf in (EMBEDDING, HEAD) and item.row + item.num_rows == shape.vocab_size:
            num_rows = padded_vocab_size - shape.vocab_size
            if num_rows:
                added.append(item._replace(hf_row=shape.vocab_size, row=shape.vocab_size, num_rows=num_rows))
    return added


def _write_padding(source: HFFolder, writer: DistWriter, item: Slice, spec: TensorSpec) -> int:
    """Write the mean of a matrix in every row of the padding; the matrix was just read, so it is in the file cache."""
    mean_H = source.read_mean_row(item.hf, item.row).to(spec.dtype)
    for row in range(item.row, item.row + item.num_rows):
        _write_rows(writer, item._replace(row=row, num_rows=1), spec, mean_H)
    return item.num_rows * mean_H.nbytes


def stream_to_hf(
    source: Source, target: Path, shape: LlamaShape, *, dtype: torch.dtype | None, progress: PartialFolder
) -> dict[str, str]:
    """Write the model tensors of a Megatron checkpoint as safetensors; the inverse of ``stream_to_megatron``.

    Args:
        source: checked checkpoint; keys that are no model tensors (optimizer, random states) are passed over.
        target: existing folder; what is in it was written by the same call before it was killed.
        shape: the model, with its true vocabulary: rows beyond it are padding and dropped.
        dtype: type to write, or None to keep that of the source.
        progress: how far that call came, and where to note how far this one comes.

    Returns:
        SHA-256 of the files, by name.
    """
    specs = spec_hf(source, shape, dtype)
    slices = list_slices(shape, {rule.megatron: source.dtype(rule.megatron).itemsize for rule in list_rules(shape)})
    watch = FiniteWatch(str(source.folder))
    with (
        FollowingHasher() as hasher,
        HFWriter(target, specs) as writer,
        _show_bytes(slices, specs, progress.done) as advance,
    ):

        def copy_slice(item: Slice, buffer: torch.Tensor) -> int:
            spec = specs[item.hf]
            rows = source.read(item.key, *item.place(spec.shape[1:]), buffer).reshape(item.num_rows, *spec.shape[1:])
            rows = rows.to(spec.dtype)
            watch.check(item.hf, item.hf_row, rows)
            writer.write_rows(item.hf, item.hf_row, rows)
            advance(rows.nbytes / 1e6)
            return rows.nbytes

        for item in slices[: progress.done]:
            writer.count_written(item.hf, item.num_rows * torch.Size(specs[item.hf].shape[1:]).numel())

        save_synced = _save_synced(writer, progress)

        def save(done: int) -> None:
            hasher.follow(writer.count_final_bytes())
            save_synced(done)

        run_steps(slices, copy_slice, start=progress.done, save=save)
        return {path.name: digest for path, digest in hasher.finish(writer.count_final_bytes()).items()}


def _save_synced(writer: DistWriter | HFWriter, progress: PartialFolder) -> Callable[[int], None]:
    def save(done: int) -> None:
        writer.sync()
        progress.save(done)

    return save


def _common_dtype(source: HFFolder, rule: TensorRule, shape: LlamaShape) -> torch.dtype:
    names = [name for layer in list_parts(rule, shape) for name in rule.name_hf(layer)]
    for name in names:
        if source.dtype(name) != source.dtype(names[0]):
            raise CheckpointError(
                f"{source.folder}: {name} is {source.dtype(name)}, {names[0]} is {source.dtype(names[0])}, but a "
                "Megatron checkpoint holds both in one tensor; choose a type: --dtype bfloat16"
            )
    return source.dtype(names[0])


@contextmanager
def _show_bytes(slices: Sequence[Slice], specs: Mapping[str, TensorSpec], done: int) -> Iterator[Advance]:
    """Show progress in MB; ``done`` slices were copied before. May be called by several threads."""
    total = sum(spec.num_bytes for spec in specs.values()) / 1e6 * (1 - done / len(slices))
    lock = threading.Lock()
    with show_progress("converting", total, "MB") as advance:

        def advance_locked(amount: float = 1, note: str = "") -> None:
            with lock:
                advance(amount, note)

        yield advance_locked
