"""``.metadata``, the index of a ``torch_dist`` checkpoint: which tensors there are and where their chunks lie.

The file is a pickle of classes of ``torch.distributed.checkpoint``. It is read and written here by the names of these
classes: importing them takes seconds and 50 MB, and unpickling them as they are could run code that a file brings.

Source: torch ``distributed/checkpoint/metadata.py``, ``filesystem.py`` (``_StorageInfo``).
"""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch

from megatron_adapt.checkpoint.archive import Inert, InertUnpickler, Place
from megatron_adapt.errors import CheckpointError

Sizes = tuple[int, ...]


class Chunk(NamedTuple):
    """A box of a tensor that is stored in one piece."""

    offsets: Sizes
    sizes: Sizes


@dataclass
class StoredTensor:
    """A global tensor and the chunks that make it up."""

    shape: Sizes
    dtype: torch.dtype
    chunks: list[Chunk] = field(default_factory=list)


@dataclass
class Index:
    """Content of ``.metadata``: tensors by key, the place of every chunk by key and offsets, other values by key."""

    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    places: dict[tuple[str, Sizes], Place] = field(default_factory=dict)
    objects: dict[str, Place] = field(default_factory=dict)


class _Metadata(Inert):
    pass


class _TensorStorageMetadata(Inert):
    pass


class _BytesStorageMetadata(Inert):
    pass


class _ChunkStorageMetadata(Inert):
    pass


class _TensorProperties(Inert):
    state: Any

    def __getstate__(self) -> Any:
        return self.state


class _MetadataIndex(Inert):
    offset: Any = None


class _StorageInfo(Inert):
    pass


class _MemoryFormat(Inert):
    def __reduce__(self) -> tuple[Any, ...]:
        return _MemoryFormat, (0,)


_MODULE = "torch.distributed.checkpoint.metadata"
_NAMES: dict[Any, tuple[str, str]] = {
    **{
        kind: (_MODULE, kind.__name__.removeprefix("_"))
        for kind in (
            _Metadata,
            _TensorStorageMetadata,
            _BytesStorageMetadata,
            _ChunkStorageMetadata,
            _TensorProperties,
            _MetadataIndex,
        )
    },
    _MemoryFormat: (_MODULE, "_MEM_FORMAT_ENCODING"),
    _StorageInfo: ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
}
_DTYPES = [value for value in vars(torch).values() if isinstance(value, torch.dtype)]
_ALLOWED = {
    **{("torch", str(dtype).removeprefix("torch.")): dtype for dtype in _DTYPES},
    ("torch", "Size"): torch.Size,
    **{name: kind for kind, name in _NAMES.items()},
}


class _NamePickler(pickle._Pickler):
    """Writes our records under the names of torch's; the C pickler would import and compare the classes."""

    def save_global(self, obj: Any, name: str | None = None) -> None:
        if obj in _NAMES:
            self.write("c{}\n{}\n".format(*_NAMES[obj]).encode())  # type: ignore[attr-defined]
            self.memoize(obj)  # type: ignore[attr-defined]
        else:
            super().save_global(obj, name)  # type: ignore[misc]

    dispatch: ClassVar[Any] = {**pickle._Pickler.dispatch, type: save_global}


def _make(kind: type[Inert], **values: Any) -> Any:
    record = kind()
    record.__setstate__(values)
    return record


def write_index(path: Path, index: Index) -> None:
    """Write the index; ``torch.distributed.checkpoint`` reads it as its own."""
    described: dict[str, Any] = {}
    places: dict[Any, Any] = {}
    memory_format = _MemoryFormat()
    for key, tensor in index.tensors.items():
        properties = _make(_TensorProperties, state=(tensor.dtype, torch.strided, False, memory_format, False))
        chunks = []
        for at, (offsets, sizes) in enumerate(tensor.chunks):
            chunks.append(_make(_ChunkStorageMetadata, offsets=torch.Size(offsets), sizes=torch.Size(sizes)))
            named = _make(_MetadataIndex, fqn=key, index=at, offset=torch.Size(offsets))
            places[named] = _store(index.places[key, offsets])
        size = torch.Size(tensor.shape)
        described[key] = _make(_TensorStorageMetadata, properties=properties, size=size, chunks=chunks)
    for key, place in index.objects.items():
        described[key] = _make(_BytesStorageMetadata)
        places[_make(_MetadataIndex, fqn=key, index=None)] = _store(place)
    metadata = _make(
        _Metadata,
        state_dict_metadata=described,
        planner_data=None,
        storage_data=places,
        storage_meta=None,
        version=None,
    )
    with path.open("wb") as file:
        _NamePickler(file, protocol=2).dump(metadata)


def _store(place: Place) -> Any:
    return _make(_StorageInfo, relative_path=place.file, offset=place.offset, length=place.length)


def read_index(path: Path) -> Index:
    """Read an index; classes it names beyond the known ones stay without effect.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        metadata = InertUnpickler(path.read_bytes(), _ALLOWED).load()
        return _parse(metadata.state_dict_metadata, metadata.storage_data)
    except (pickle.UnpicklingError, EOFError, AttributeError, LookupError, TypeError, ValueError, RuntimeError):
        raise CheckpointError(f"{path}: damaged; the checkpoint cannot be read, take another one") from None


def _parse(described: Mapping[str, Any], places: Mapping[Any, Any]) -> Index:
    index = Index()
    for key, record in described.items():
        if isinstance(record, _TensorStorageMetadata):
            dtype = record.__dict__["properties"].state[0]
            chunks = [Chunk(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in record.__dict__["chunks"]]
            index.tensors[key] = StoredTensor(tuple(record.__dict__["size"]), dtype, chunks)
    for named, info in places.items():
        place = Place(info.relative_path, info.offset, info.length)
        if named.offset is None:
            index.objects[named.fqn] = place
        else:
            index.places[named.fqn, tuple(named.offset)] = place
    return index
