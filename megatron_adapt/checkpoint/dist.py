"""Megatron's ``torch_dist`` checkpoint folders: read and write single slices, without a process group or megatron.

Reads: ``.metadata`` and the ``.distcp`` files it names. Writes: these, ``common.pt`` and ``metadata.json``.
Guarantees: a slice costs the memory of that slice on reading, whatever the size of the stored chunk; nothing
from outside is unpickled beyond a fixed list of classes.

1. ``DistWriter`` appends every chunk as a ``torch.save`` archive to a ``.distcp`` file and notes its place;
2. at its end it writes ``.metadata``: the pickled ``torch.distributed.checkpoint`` record of tensors and places;
3. ``DistReader`` reads that record with ``_InertUnpickler``;
4. ``_find_values`` looks up where in a chunk's archive the plain values begin, and ``DistReader.read`` takes
   the rows it needs from there.

Source: torch ``distributed/checkpoint/filesystem.py``, megatron-core ``dist_checkpointing/strategies/torch.py``.
"""

import io
import math
import os
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_adapt.checkpoint.root import METADATA_FILE
from megatron_adapt.checkpoint.values import TensorSpec, read_values
from megatron_adapt.errors import CheckpointError
from megatron_adapt.files import write_json

FORMAT_FILE = "metadata.json"
COMMON_FILE = "common.pt"
_MAX_FILE_BYTES = 4 << 30


class DistWriter:
    """Writes a ``torch_dist`` folder chunk by chunk.

    Use as a context manager; a normal exit checks that the chunks cover every tensor and writes the records.
    """

    def __init__(self, folder: Path, specs: Mapping[str, TensorSpec]) -> None:
        """Start in an existing folder; ``specs`` are the global tensors that the chunks will make up."""
        self._folder = folder
        self._specs = dict(specs)
        self._left = {key: math.prod(spec.shape) for key, spec in specs.items()}
        self._chunks: dict[str, list[ChunkStorageMetadata]] = {key: [] for key in specs}
        self._storage: dict[MetadataIndex, _StorageInfo] = {}
        self._objects: list[str] = []
        self._common: dict[str, Any] = {}
        self._num_files = 0
        self._file = self._open_next()

    def _open_next(self) -> io.BufferedWriter:
        path = self._folder / f"__0_{self._num_files}.distcp"
        self._num_files += 1
        return path.open("wb")

    def write(self, key: str, offsets: tuple[int, ...], chunk: torch.Tensor) -> None:
        """Write one chunk of a tensor; its values begin at ``offsets`` of the global tensor.

        Args:
            key: name of the tensor.
            offsets: one per axis.
            chunk: as many axes as the global tensor.
        """
        spec = self._specs[key]
        assert chunk.dtype == spec.dtype, (key, chunk.dtype, spec)
        ends = [start + size for start, size in zip(offsets, chunk.shape, strict=True)]
        assert all(end <= size for end, size in zip(ends, spec.shape, strict=True)), (key, offsets, chunk.shape, spec)
        if self._file.tell() > _MAX_FILE_BYTES:
            self._file.close()
            self._file = self._open_next()
        # A view would drag the whole storage behind it into the archive.
        values = chunk.contiguous()
        if values.untyped_storage().nbytes() != values.nbytes:
            values = values.clone()
        index = MetadataIndex(key, torch.Size(offsets), len(self._chunks[key]))
        self._save(index, values)
        self._chunks[key].append(ChunkStorageMetadata(torch.Size(offsets), chunk.shape))
        self._left[key] -= chunk.numel()

    def write_object(self, key: str, value: Any) -> None:
        """Write a small picklable value, in the form of megatron-core's ``ShardedObject``."""
        self._save(MetadataIndex(key), [value])
        self._objects.append(key)

    def copy_object(self, key: str, source: "DistReader") -> None:
        """Copy a value that ``source`` holds beside its tensors, without unpickling it."""
        offset = self._file.tell()
        self._file.write(source.read_object(key))
        self._place(MetadataIndex(key), offset)
        self._objects.append(key)

    def write_common(self, values: Mapping[str, Any]) -> None:
        """Set what goes to ``common.pt``: plain values that are the same on every rank."""
        self._common = dict(values)

    def _save(self, index: MetadataIndex, value: Any) -> None:
        offset = self._file.tell()
        torch.save(value, self._file)
        self._place(index, offset)

    def _place(self, index: MetadataIndex, offset: int) -> None:
        name = Path(self._file.name).name
        self._storage[index] = _StorageInfo(relative_path=name, offset=offset, length=self._file.tell() - offset)

    def __enter__(self) -> "DistWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is not None:
            return
        unfinished = [key for key, left in self._left.items() if left]
        assert not unfinished, f"not written exactly once: {unfinished[:5]}"
        tensors: dict[str, Any] = {
            key: TensorStorageMetadata(TensorProperties(dtype=spec.dtype), torch.Size(spec.shape), self._chunks[key])
            for key, spec in self._specs.items()
        }
        objects = {key: BytesStorageMetadata() for key in self._objects}
        metadata = Metadata({**tensors, **objects}, storage_data=self._storage)
        with (self._folder / METADATA_FILE).open("wb") as file:
            pickle.dump(metadata, file)
        torch.save(self._common, self._folder / COMMON_FILE)
        backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        write_json(self._folder / FORMAT_FILE, {**backends, "common_backend": "torch", "common_backend_version": 1})


class DistReader:
    """The tensors of a ``torch_dist`` folder, read when asked for.

    Raises:
        CheckpointError: the folder is no such checkpoint, or a file is missing or cut off.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / METADATA_FILE).is_file():
            raise CheckpointError(
                f"{folder}: no {METADATA_FILE}; this is no torch_dist checkpoint, or it is incomplete"
            )
        metadata = _read_metadata(folder / METADATA_FILE)
        self._tensors = {
            key: value
            for key, value in metadata.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata)
        }
        self._places: dict[tuple[str, tuple[int, ...]], _StorageInfo] = {}
        self._objects: dict[str, _StorageInfo] = {}
        for index, info in metadata.storage_data.items():
            if index.offset is None:
                self._objects[index.fqn] = info
            else:
                self._places[index.fqn, tuple(index.offset)] = info
        self._values: dict[tuple[str, tuple[int, ...]], int] = {}
        _check_files(folder, list(metadata.storage_data.values()))

    @property
    def keys(self) -> list[str]:
        """Keys of all tensors, those of an optimizer included."""
        return list(self._tensors)

    @property
    def object_keys(self) -> list[str]:
        """Keys of the values that are no tensors."""
        return list(self._objects)

    def read_object(self, key: str) -> bytes:
        """Return a value that is no tensor, as the pickle it is stored as."""
        info = self._objects[key]
        with (self.folder / info.relative_path).open("rb") as file:
            return os.pread(file.fileno(), info.length, info.offset)

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
        return tuple(self._tensors[key].size) if key in self._tensors else None

    def dtype(self, key: str) -> torch.dtype:
        """Return the type of a tensor."""
        return self._tensors[key].properties.dtype

    def read(self, key: str, offsets: Sequence[int] | None = None, sizes: Sequence[int] | None = None) -> torch.Tensor:
        """Read a tensor, or the box of ``sizes`` that begins at ``offsets``.

        Raises:
            CheckpointError: no chunk covers a part of it, or a chunk is not stored as plain values.
        """
        tensor = self._tensors[key]
        starts = list(offsets) if offsets is not None else [0] * len(tensor.size)
        shape = list(sizes) if sizes is not None else list(tensor.size)
        values = torch.empty(shape, dtype=tensor.properties.dtype)
        covered = 0
        for chunk in tensor.chunks:
            begin = [max(a, b) for a, b in zip(starts, chunk.offsets, strict=True)]
            end = [min(a + n, b + m) for a, n, b, m in zip(starts, shape, chunk.offsets, chunk.sizes, strict=True)]
            if any(a >= b for a, b in zip(begin, end, strict=True)):
                continue
            box = self._read_chunk(key, chunk, begin, end)
            if list(box.shape) == shape:
                return box
            values[tuple(slice(a - s, b - s) for a, b, s in zip(begin, end, starts, strict=True))] = box
            covered += box.numel()
        if covered != values.numel():
            raise CheckpointError(
                f"{self.folder}: chunks of {key} hold {covered} of {values.numel()} values; the checkpoint is "
                "incomplete, take another one"
            )
        return values

    def _read_chunk(self, key: str, chunk: ChunkStorageMetadata, begin: list[int], end: list[int]) -> torch.Tensor:
        """Read the box [begin, end) of one chunk; rows of its first axis that is not 1 are read whole."""
        info = self._places[key, tuple(chunk.offsets)]
        dtype = self._tensors[key].properties.dtype
        axis = next((at for at, size in enumerate(chunk.sizes) if size > 1), 0)
        row = TensorSpec(tuple(chunk.sizes[axis + 1 :]), dtype)
        first, last = begin[axis] - chunk.offsets[axis], end[axis] - chunk.offsets[axis]
        rows = TensorSpec((*[1] * axis, last - first, *row.shape), dtype)
        place = key, tuple(chunk.offsets)
        with (self.folder / info.relative_path).open("rb") as file:
            if place not in self._values:  # rows are read one by one where new ones are computed from them
                self._values[place] = _find_values(file.fileno(), info, tuple(chunk.sizes), f"{file.name}: {key}")
            start = self._values[place]
            values = read_values(file.fileno(), start + first * row.num_bytes, rows)
        inner = [slice(a - o, b - o) for a, b, o in zip(begin, end, chunk.offsets, strict=True)][axis + 1 :]
        return values[(*[slice(None)] * (axis + 1), *inner)]


class _Inert:
    """Stands for every class that is not needed: it can be built and filled, and does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {})


class _InertUnpickler(pickle.Unpickler):
    """Unpickles only what ``allowed`` names; anything else becomes an ``_Inert`` object and runs no code."""

    def __init__(self, raw: bytes, allowed: Mapping[tuple[str, str], Any]) -> None:
        super().__init__(io.BytesIO(raw))
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        return self._allowed.get((module, name), _Inert)

    def persistent_load(self, pid: Any) -> Any:
        return pid


_DTYPES = [value for value in vars(torch).values() if isinstance(value, torch.dtype)]
_METADATA_CLASSES = {
    **{("torch", str(dtype).removeprefix("torch.")): dtype for dtype in _DTYPES},
    ("torch", "Size"): torch.Size,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _StorageInfo,
    **{
        ("torch.distributed.checkpoint.metadata", kind.__name__): kind
        for kind in (
            BytesStorageMetadata,
            ChunkStorageMetadata,
            Metadata,
            MetadataIndex,
            TensorProperties,
            TensorStorageMetadata,
            _MEM_FORMAT_ENCODING,
        )
    },
}


def _read_metadata(path: Path) -> Any:
    try:
        metadata = _InertUnpickler(path.read_bytes(), _METADATA_CLASSES).load()
        if isinstance(metadata.state_dict_metadata, dict) and isinstance(metadata.storage_data, dict):
            return metadata
    except (pickle.UnpicklingError, EOFError, AttributeError, LookupError, TypeError, ValueError, RuntimeError):
        pass
    raise CheckpointError(f"{path}: damaged; the checkpoint cannot be read, take another one") from None


def _check_files(folder: Path, places: Sequence[_StorageInfo]) -> None:
    ends: dict[str, int] = {}
    for info in places:
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    for name, end in ends.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder}: {name} missing, which {METADATA_FILE} names; fetch the file again")
        if path.stat().st_size < end:
            raise CheckpointError(
                f"{path}: cut off at {path.stat().st_size} bytes, {end} are expected; fetch the file again"
            )


class _Slice(io.RawIOBase):
    """Bytes [offset, offset + length) of an open file, as a file of their own."""

    def __init__(self, descriptor: int, offset: int, length: int) -> None:
        self._descriptor, self._offset, self._length, self._at = descriptor, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._at)
        raw = os.pread(self._descriptor, left if size < 0 else min(size, left), self._offset + self._at)
        self._at += len(raw)
        return raw


def _find_values(descriptor: int, info: _StorageInfo, sizes: tuple[int, ...], where: str) -> int:
    """Return the position in the file where the plain values of a chunk begin.

    A chunk is a ``torch.save`` archive: an uncompressed zip file with the values in ``data/0`` and a pickle that
    says how the tensor lies in them.
    """
    try:
        archive = zipfile.ZipFile(_Slice(descriptor, info.offset, info.length))
        names = {name.partition("/")[2]: name for name in archive.namelist()}
        storage, start, shape, stride = _InertUnpickler(archive.read(names["data.pkl"]), _REBUILD).load()
        entry = archive.getinfo(names[f"data/{storage[2]}"])
    except (zipfile.BadZipFile, pickle.UnpicklingError, LookupError, TypeError, ValueError, EOFError):
        raise CheckpointError(f"{where}: damaged or of an unknown form; fetch the checkpoint again") from None
    if math.prod(shape) != math.prod(sizes) or start or entry.compress_type != zipfile.ZIP_STORED:
        raise CheckpointError(f"{where}: not stored as plain values of shape {sizes}; save the checkpoint again")
    if not torch.empty_strided(shape, stride, device="meta").is_contiguous():
        raise CheckpointError(f"{where}: stored with strides {tuple(stride)}; save contiguous tensors")
    # The name and the extra field (alignment) stand between the 30 fixed bytes of the entry's header and its data.
    header = os.pread(descriptor, 30, info.offset + entry.header_offset)
    lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    return info.offset + entry.header_offset + 30 + lengths


def _keep_rebuild(storage: Any, start: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Any:
    """Stand in for ``torch._utils._rebuild_tensor_v2``: return how the tensor lies, instead of the tensor."""
    return storage, start, shape, stride


_REBUILD = {("torch._utils", "_rebuild_tensor_v2"): _keep_rebuild, ("torch", "Size"): torch.Size}
