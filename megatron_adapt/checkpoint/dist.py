"""Megatron's ``torch_dist`` checkpoint folders: read and write single slices, without a process group or megatron.

Reads: ``.metadata`` and the ``.distcp`` files it names. Writes: these, ``common.pt`` and ``metadata.json``.
Guarantees: a slice costs the memory of that slice, whatever the size of the stored chunk; nothing from outside is
unpickled beyond a fixed list of classes; the same calls give the same bytes.

1. ``DistWriter.reserve`` gives a chunk its place in a ``.distcp`` file and writes what stands around the values;
2. ``DistWriter.write_values`` writes values, in any order and from any thread;
3. at its end the writer adds ``.metadata`` (``index``), ``common.pt`` and ``metadata.json``;
4. ``DistReader.read`` finds the chunks that a box touches and where in them the values begin (``archive``), and takes
   the rows it needs from there.

Source: torch ``distributed/checkpoint/filesystem.py``, megatron-core ``dist_checkpointing/strategies/torch.py``.
"""

import io
import math
import os
import pickle
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_adapt.checkpoint.archive import ALIGNMENT, MAX_VALUES_BYTES, Place, find_values, wrap_values
from megatron_adapt.checkpoint.index import Chunk, Index, StoredTensor, read_index, write_index
from megatron_adapt.checkpoint.layout import list_extra_states
from megatron_adapt.checkpoint.root import METADATA_FILE
from megatron_adapt.checkpoint.values import TensorSpec, gather_box, read_values, write_bytes, write_values
from megatron_adapt.checkpoint.writer import TensorFilesWriter
from megatron_adapt.errors import CheckpointError
from megatron_adapt.files import write_json

FORMAT_FILE = "metadata.json"
COMMON_FILE = "common.pt"
MAX_FILE_BYTES = 1 << 30
CHECKPOINT_VERSION = 3.0
"Tells Megatron-LM how query, key and value rows are ordered; see ``layout.list_runs``."


class _Reserved(NamedTuple):
    """A chunk that has its place: where its values begin."""

    descriptor: int
    start: int
    spec: TensorSpec


class DistWriter(TensorFilesWriter):
    """Writes a ``torch_dist`` folder."""

    def __init__(self, folder: Path, specs: Mapping[str, TensorSpec], max_file_bytes: int | None = None) -> None:
        """Start in an existing folder; ``specs`` are the global tensors that the chunks will make up.

        A file that holds more than ``max_file_bytes`` (``MAX_FILE_BYTES``) is closed, and another one begun.
        """
        super().__init__(folder, specs)
        self._max_file_bytes = max_file_bytes or MAX_FILE_BYTES
        self._index = Index({key: StoredTensor(spec.shape, spec.dtype) for key, spec in specs.items()})
        self._reserved: dict[tuple[str, tuple[int, ...]], _Reserved] = {}
        self._common: dict[str, Any] = {}
        self._open_next()

    def _open_next(self) -> None:
        self._name = f"__0_{len(self._files)}.distcp"
        self._open(self._name)
        self._end = 0

    def _take(self, length: int) -> Place:
        """Reserve ``length`` bytes of the last file, or of a new one once it is full."""
        if self._end > self._max_file_bytes:
            self._open_next()
        place = Place(self._name, self._end, length)
        self._end += -(-length // ALIGNMENT) * ALIGNMENT
        return place

    def reserve(self, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> None:
        """Give the chunk of a tensor that begins at ``offsets`` its place; its values follow by ``write_values``."""
        tensor = self._index.tensors[key]
        ends = [start + size for start, size in zip(offsets, sizes, strict=True)]
        assert all(end <= size for end, size in zip(ends, tensor.shape, strict=True)), (key, offsets, sizes, tensor)
        spec = TensorSpec(tuple(sizes), tensor.dtype)
        head, tail = wrap_values(spec.shape, spec.dtype)
        place = self._take(len(head) + spec.num_bytes + len(tail))
        descriptor = self._files[place.file]
        write_bytes(descriptor, place.offset, memoryview(head))
        write_bytes(descriptor, place.offset + len(head) + spec.num_bytes, memoryview(tail))
        tensor.chunks.append(Chunk(offsets, spec.shape))
        self._index.places[key, offsets] = place
        self._reserved[key, offsets] = _Reserved(descriptor, place.offset + len(head), spec)

    def write(self, key: str, offsets: tuple[int, ...], chunk: torch.Tensor) -> None:
        """Write a chunk of a tensor, a very large one in parts; its values begin at ``offsets`` of the global tensor.

        Args:
            key: name of the tensor.
            offsets: one per axis.
            chunk: as many axes as the global tensor.
        """
        if chunk.nbytes > MAX_VALUES_BYTES and chunk.numel() > 1:
            axis = next(at for at, size in enumerate(chunk.shape) if size > 1)
            for half in chunk.chunk(2, axis):
                self.write(key, offsets, half)
                offsets = (*offsets[:axis], offsets[axis] + half.shape[axis], *offsets[axis + 1 :])
            return
        self.reserve(key, offsets, tuple(chunk.shape))
        self.write_values(key, offsets, 0, chunk)

    def write_values(self, key: str, offsets: tuple[int, ...], start: int, values: torch.Tensor) -> None:
        """Write values of a reserved chunk, from its value number ``start`` on; every value exactly once."""
        reserved = self._reserved[key, offsets]
        assert values.dtype == reserved.spec.dtype, (key, values.dtype, reserved.spec)
        assert start + values.numel() <= math.prod(reserved.spec.shape), (key, offsets, start, values.shape)
        write_values(reserved.descriptor, reserved.start + start * values.itemsize, values)
        self.count_written(key, values.numel())

    def write_object(self, key: str, value: Any) -> None:
        """Write a small picklable value, in the form of megatron-core's ``ShardedObject``."""
        raw = io.BytesIO()
        torch.save([value], raw)
        self._write_object(key, raw.getvalue())

    def copy_object(self, key: str, source: "DistReader") -> None:
        """Copy a value that ``source`` holds beside its tensors, without unpickling it."""
        self._write_object(key, source.read_object(key))

    def _write_object(self, key: str, raw: bytes) -> None:
        place = self._take(len(raw))
        write_bytes(self._files[place.file], place.offset, memoryview(raw))
        self._index.objects[key] = place

    def write_common(self, values: Mapping[str, Any]) -> None:
        """Set what goes to ``common.pt``: plain values that are the same on every rank."""
        self._common = dict(values)

    def write_release_state(self, num_layers: int) -> None:
        """Write what stock Megatron-LM asks of weights beside them: empty quantisation states, and step 0."""
        for key in list_extra_states(num_layers):
            self.write_object(key, None)
        self.write_common({"iteration": 0, "checkpoint_version": CHECKPOINT_VERSION})

    def _finish(self) -> None:
        write_index(self._folder / METADATA_FILE, self._index)
        torch.save(self._common, self._folder / COMMON_FILE)
        backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        write_json(self._folder / FORMAT_FILE, {**backends, "common_backend": "torch", "common_backend_version": 1})


class DistReader:
    """The tensors of a ``torch_dist`` folder, read when asked for; may be used by several threads.

    Raises:
        CheckpointError: the folder is no such checkpoint, or a file is missing or cut off.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / METADATA_FILE).is_file():
            raise CheckpointError(
                f"{folder}: no {METADATA_FILE}; this is no torch_dist checkpoint, or it is incomplete"
            )
        self._index = read_index(folder / METADATA_FILE)
        self._sorted = {key: _SortedChunks(tensor.chunks) for key, tensor in self._index.tensors.items()}
        self._values: dict[tuple[str, tuple[int, ...]], int] = {}
        self._places = [*self._index.places.values(), *self._index.objects.values()]
        _check_files(folder, self._places)

    @property
    def keys(self) -> list[str]:
        """Keys of all tensors, those of an optimizer included."""
        return list(self._index.tensors)

    @property
    def object_keys(self) -> list[str]:
        """Keys of the values that are no tensors."""
        return list(self._index.objects)

    @property
    def files(self) -> list[Path]:
        """Files that hold the values, and the index."""
        return [self.folder / METADATA_FILE, *(self.folder / name for name in sorted({p.file for p in self._places}))]

    def read_object(self, key: str) -> bytes:
        """Return a value that is no tensor, as the pickle it is stored as."""
        place = self._index.objects[key]
        with (self.folder / place.file).open("rb") as file:
            return os.pread(file.fileno(), place.length, place.offset)

    def read_common(self) -> dict[str, Any]:
        """Return the values of ``common.pt``: settings and counts, nothing that runs code.

        Raises:
            CheckpointError: the file is damaged, or holds more than plain values.
        """
        path = self.folder / COMMON_FILE
        try:
            common: dict[str, Any] = torch.load(path, weights_only=True)
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise CheckpointError(
                f"{path}: damaged, or not plain values ({type(error).__name__}); save it again"
            ) from None
        return common

    def shape(self, key: str) -> tuple[int, ...] | None:
        """Return the global shape of a tensor, or None when there is no such key."""
        return self._index.tensors[key].shape if key in self._index.tensors else None

    def dtype(self, key: str) -> torch.dtype:
        """Return the type of a tensor."""
        return self._index.tensors[key].dtype

    def read(
        self,
        key: str,
        offsets: Sequence[int] | None = None,
        sizes: Sequence[int] | None = None,
        buffer: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Read a tensor, or the box of ``sizes`` that begins at ``offsets``, into ``buffer`` where that saves a copy.

        Raises:
            CheckpointError: no chunk covers a part of it, or a chunk is not stored as plain values.
        """
        tensor = self._index.tensors[key]
        starts = list(offsets) if offsets is not None else [0] * len(tensor.shape)
        shape = list(sizes) if sizes is not None else list(tensor.shape)

        def read_chunk(chunk: Chunk, begin: list[int], end: list[int]) -> torch.Tensor:
            return self._read_chunk(key, chunk, begin, end, buffer)

        values, covered = gather_box(starts, shape, self._sorted[key].find(starts, shape), read_chunk)
        if values is None or covered != values.numel():
            raise CheckpointError(
                f"{self.folder}: chunks of {key} hold {covered} of {math.prod(shape)} values; the checkpoint is "
                "incomplete, take another one"
            )
        return values

    def _read_chunk(
        self, key: str, chunk: Chunk, begin: list[int], end: list[int], buffer: torch.Tensor | None
    ) -> torch.Tensor:
        """Read the box [begin, end) of one chunk; rows of its first axis that is not 1 are read whole."""
        place, at = self._index.places[key, chunk.offsets], (key, chunk.offsets)
        dtype = self._index.tensors[key].dtype
        axis = next((at for at, size in enumerate(chunk.sizes) if size > 1), 0)
        row = TensorSpec(chunk.sizes[axis + 1 :], dtype)
        first, last = begin[axis] - chunk.offsets[axis], end[axis] - chunk.offsets[axis]
        rows = TensorSpec((*[1] * axis, last - first, *row.shape), dtype)
        with (self.folder / place.file).open("rb", buffering=0) as file:
            if at not in self._values:  # rows are read one by one where new ones are computed from them
                self._values[at] = find_values(file.fileno(), place, chunk.sizes, f"{file.name}: {key}")
            values = read_values(file.fileno(), self._values[at] + first * row.num_bytes, rows, buffer)
        inner = [slice(a - o, b - o) for a, b, o in zip(begin, end, chunk.offsets, strict=True)][axis + 1 :]
        return values[(*[slice(None)] * (axis + 1), *inner)]


class _SortedChunks:
    """The chunks of a tensor, sorted by where they begin on the first axis (the layer, or the row of a matrix)."""

    def __init__(self, chunks: Iterable[Chunk]) -> None:
        self._chunks = sorted(chunks)
        self._starts = [chunk.offsets[0] if chunk.offsets else 0 for chunk in self._chunks]
        self._longest = max((chunk.sizes[0] if chunk.sizes else 1 for chunk in self._chunks), default=0)

    def find(self, starts: Sequence[int], sizes: Sequence[int]) -> list[Chunk]:
        """Return the chunks that may hold a part of a box; others surely do not."""
        if not starts:
            return self._chunks
        first = bisect_left(self._starts, starts[0] - self._longest + 1)
        return self._chunks[first : bisect_left(self._starts, starts[0] + sizes[0])]


def _check_files(folder: Path, places: Sequence[Place]) -> None:
    ends: dict[str, int] = {}
    for place in places:
        ends[place.file] = max(ends.get(place.file, 0), place.offset + place.length)
    for name, end in ends.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder}: {name} missing, which {METADATA_FILE} names; fetch the file again")
        if path.stat().st_size < end:
            raise CheckpointError(
                f"{path}: cut off at {path.stat().st_size} bytes, {end} are expected; fetch the file again"
            )
