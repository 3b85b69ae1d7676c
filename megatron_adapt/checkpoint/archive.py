"""The ``torch.save`` archive around the values of one tensor: what stands before and behind them, and where they begin.

A chunk of a ``torch_dist`` checkpoint is such an archive: an uncompressed zip file with a pickle that says how the
tensor lies (``data.pkl``) and its plain values (``data/0``). ``wrap_values`` makes the bytes around the values without
having the values, so that these can be written slice by slice, in any order and by several threads. ``find_values``
finds the values in an archive of any origin. Nothing that a file names is called on the way.

Guarantees: values begin at a multiple of 4096 bytes where the archive does; the same shape and type give the same
bytes. The checksum of the values is zero, as ``torch.serialization.set_crc32_options(False)`` leaves it: torch does not
look at it.

Source: torch ``caffe2/serialize/inline_container.cc``, ``torch/_utils.py`` (``_rebuild_tensor_v2``).
"""

import io
import math
import os
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch.storage import _dtype_to_storage_type_map

from megatron_adapt.errors import CheckpointError

ALIGNMENT = 4096
MAX_VALUES_BYTES = 1 << 30
"Most bytes of values in one archive; from 4 GiB on a zip file has another form, which is not written here."
_LOCAL, _CENTRAL, _END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
_ZIP_VERSION, _UTF8 = 20, 0x800
_PADDING_FIELD = 0x4246
"Marks an extra field that only fills space, as torch marks it."


class Place(NamedTuple):
    """Bytes of a file."""

    file: str
    offset: int
    length: int


class _Storage:
    """Stands for the values of a tensor while its pickle is made."""


class _Layout:
    """Pickles as a tensor does whose values are stored in one piece."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape

    def __reduce__(self) -> tuple[Any, ...]:
        stride = torch.empty(self._shape, device="meta").stride()
        return torch._utils._rebuild_tensor_v2, (_Storage(), 0, self._shape, stride, False, OrderedDict())


class _LayoutPickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, storage_id: tuple[Any, ...]) -> None:
        super().__init__(file, protocol=2)
        self._storage_id = storage_id

    def persistent_id(self, obj: Any) -> Any:
        return self._storage_id if isinstance(obj, _Storage) else None


def can_store(dtype: torch.dtype) -> bool:
    """Tell whether ``wrap_values`` knows a type."""
    return dtype in _dtype_to_storage_type_map()


def wrap_values(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[bytes, bytes]:
    """Return the bytes before and behind the values of a tensor; together they are what ``torch.load`` reads.

    Args:
        shape: shape of the tensor, at most ``MAX_VALUES_BYTES`` of values.
        dtype: its type; see ``can_store``.
    """
    count = math.prod(shape)
    num_bytes = count * dtype.itemsize
    assert num_bytes < 1 << 32, (shape, dtype)
    storage = getattr(torch, _dtype_to_storage_type_map()[dtype])
    pickled = io.BytesIO()
    _LayoutPickler(pickled, ("storage", storage, "0", "cpu", count)).dump(_Layout(tuple(shape)))
    head, central = b"", b""
    for name, raw in (("data.pkl", pickled.getvalue()), ("byteorder", b"little"), ("version", b"3\n")):
        fields = _describe(name, len(raw), zlib.crc32(raw))
        central += _entry(fields, name, len(head))
        head += _LOCAL + fields + _name(name) + raw
    fields = _describe("data/0", num_bytes, 0)
    central += _entry(fields, "data/0", len(head))
    without_padding = len(head) + len(_LOCAL + fields + _name("data/0")) + 4
    padding = -without_padding % ALIGNMENT
    head += _LOCAL + fields[:-2] + struct.pack("<H", 4 + padding) + _name("data/0")
    head += struct.pack("<HH", _PADDING_FIELD, padding) + bytes(padding)
    numbers = (0, 0, 4, 4, len(central), len(head) + num_bytes, 0)
    return head, central + _END + struct.pack("<HHHHIIH", *numbers)


def _name(name: str) -> bytes:
    return f"archive/{name}".encode()


def _describe(name: str, size: int, checksum: int) -> bytes:
    """Return the fields that the local and the central header of an entry share."""
    numbers = (_ZIP_VERSION, _UTF8, zipfile.ZIP_STORED, 0, 0, checksum, size, size, len(_name(name)), 0)
    return struct.pack("<HHHHHIIIHH", *numbers)


def _entry(fields: bytes, name: str, offset: int) -> bytes:
    return _CENTRAL + struct.pack("<H", _ZIP_VERSION) + fields + struct.pack("<HHHII", 0, 0, 0, 0, offset) + _name(name)


class Inert:
    """Stands for every class that is not needed: it can be built and filled, and does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


class InertUnpickler(pickle.Unpickler):
    """Unpickles only what ``allowed`` names; anything else becomes an ``Inert`` object and runs no code."""

    def __init__(self, raw: bytes, allowed: Mapping[tuple[str, str], Any]) -> None:
        super().__init__(io.BytesIO(raw))
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        """Look a class up by its name."""
        return self._allowed.get((module, name), Inert)

    def persistent_load(self, pid: Any) -> Any:
        """Return the name of a storage in place of its values."""
        return pid


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


def find_values(descriptor: int, place: Place, sizes: tuple[int, ...], where: str) -> int:
    """Return the position in an open file where the plain values of an archive begin.

    Args:
        descriptor: the open file.
        place: where the archive lies in it.
        sizes: shape that the tensor must have.
        where: file and tensor, for messages.

    Raises:
        CheckpointError: the archive is damaged, or holds the tensor in another form.
    """
    try:
        archive = zipfile.ZipFile(_Slice(descriptor, place.offset, place.length))
        names = {name.partition("/")[2]: name for name in archive.namelist()}
        storage, start, shape, stride = InertUnpickler(archive.read(names["data.pkl"]), _REBUILD).load()
        entry = archive.getinfo(names[f"data/{storage[2]}"])
    except (zipfile.BadZipFile, pickle.UnpicklingError, LookupError, TypeError, ValueError, EOFError):
        raise CheckpointError(f"{where}: damaged or of an unknown form; fetch the checkpoint again") from None
    if math.prod(shape) != math.prod(sizes) or start or entry.compress_type != zipfile.ZIP_STORED:
        raise CheckpointError(f"{where}: not stored as plain values of shape {sizes}; save the checkpoint again")
    if not torch.empty_strided(shape, stride, device="meta").is_contiguous():
        raise CheckpointError(f"{where}: stored with strides {tuple(stride)}; save contiguous tensors")
    # The name and the extra field (alignment) stand between the 30 fixed bytes of the entry's header and its data.
    header = os.pread(descriptor, 30, place.offset + entry.header_offset)
    lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    return place.offset + entry.header_offset + 30 + lengths


def _keep_rebuild(storage: Any, start: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Any:
    """Stand in for ``torch._utils._rebuild_tensor_v2``: return how the tensor lies, instead of the tensor."""
    return storage, start, shape, stride


_REBUILD = {("torch._utils", "_rebuild_tensor_v2"): _keep_rebuild, ("torch", "Size"): torch.Size}
