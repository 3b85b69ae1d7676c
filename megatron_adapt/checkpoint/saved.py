"""Files of ``torch.save``, read without running anything that they name.

Reads: ``common.pt`` of a ``torch_dist`` folder and the ``model_optim_rng.pt`` of a partition, which hold the settings
of the run (``args``), random states and enumerations of whatever version of Megatron-LM wrote them, beside the tensors.
Guarantees: no class and no function that the file names is imported or called: what is not on a short list of
containers and types becomes an ``Inert`` object (``torch.load`` with ``weights_only`` would refuse the whole file
instead, see Megatron-LM issue 1884). Values of tensors are not read: a ``SavedTensor`` knows where they lie.

Cost: the pickle of the file, without the values; a box of a tensor when it is asked for.
Source: torch ``torch/serialization.py``, ``torch/_utils.py`` (``_rebuild_tensor_v2``, ``_rebuild_parameter``).
"""

import collections
import math
import os
import pickle
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.storage import _dtype_to_storage_type_map

from megatron_adapt.checkpoint.archive import Inert, InertUnpickler
from megatron_adapt.checkpoint.values import TensorSpec, read_values
from megatron_adapt.errors import CheckpointError

_DAMAGE = (
    *(pickle.UnpicklingError, LookupError, TypeError, ValueError, AttributeError, EOFError),
    *(RuntimeError, OverflowError, zlib.error),
)


class Arguments(Inert):
    """Settings of a run: stands for ``argparse.Namespace``; ``vars`` tells them."""


class _Foreign(Inert):
    """Stands for any other class; may be filled like a dictionary, a list or a set, and forgets it."""

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """Forget a value."""

    def extend(self, values: Any) -> None:
        """Forget values."""

    def add(self, value: Any) -> None:
        """Forget a value."""


class _Storage(NamedTuple):
    """Values that several tensors may share: position in the file, type (None: the tensor says it), bytes."""

    start: int
    dtype: torch.dtype | None
    num_bytes: int


class SavedTensor(NamedTuple):
    """A tensor whose values stay in the file.

    Attributes:
        path: the file.
        start: where its values begin.
        spec: shape and type.
        is_plain: whether they lie row by row; others cannot be read.
    """

    path: Path
    start: int
    spec: TensorSpec
    is_plain: bool

    def read(self, offsets: Sequence[int], sizes: Sequence[int], buffer: torch.Tensor | None = None) -> torch.Tensor:
        """Read the box of ``sizes`` that begins at ``offsets``; rows of the first axis are read whole.

        Raises:
            CheckpointError: the values do not lie row by row, or the file ends early.
        """
        if not self.is_plain:
            raise CheckpointError(
                f"{self.path}: a tensor of shape {self.spec.shape} is stored with strides; save it again"
            )
        row = TensorSpec(self.spec.shape[1:], self.spec.dtype)
        rows = TensorSpec((sizes[0], *row.shape), row.dtype)
        with self.path.open("rb", buffering=0) as file:
            values = read_values(file.fileno(), self.start + offsets[0] * row.num_bytes, rows, buffer)
        return values[(slice(None), *(slice(a, a + n) for a, n in zip(offsets[1:], sizes[1:], strict=True)))]


def read_saved(path: Path) -> Any:
    """Read what ``torch.save`` wrote to a file, with a ``SavedTensor`` in place of every tensor.

    Raises:
        CheckpointError: the file is missing, damaged or of a form before torch 1.6.
    """
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            return _SavedUnpickler(path, file.fileno(), archive).load()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; the checkpoint is incomplete, fetch it again") from None
    except zipfile.BadZipFile:
        raise CheckpointError(
            f"{path}: no archive of torch.save, or cut off; fetch it again, or save it again with torch 1.6 or later"
        ) from None
    except _DAMAGE as error:
        raise CheckpointError(f"{path}: damaged ({type(error).__name__}); fetch the file again") from None


class _SavedUnpickler(InertUnpickler):
    """Builds containers, types and ``SavedTensor``; everything else is inert."""

    def __init__(self, path: Path, descriptor: int, archive: zipfile.ZipFile) -> None:
        self._path, self._descriptor, self._archive = path, descriptor, archive
        self._names = {name.partition("/")[2]: name for name in archive.namelist()}
        rebuild = {
            ("torch._utils", "_rebuild_tensor_v2"): self._rebuild,
            ("torch._utils", "_rebuild_tensor_v3"): self._rebuild,
            ("torch._utils", "_rebuild_parameter"): _keep_first,
        }
        super().__init__(archive.read(self._names["data.pkl"]), {**_ALLOWED, **rebuild})
        self._storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Look a class up by its name."""
        return self._allowed.get((module, name), _Foreign)

    def persistent_load(self, pid: Any) -> _Storage:
        """Return where a storage lies."""
        _, dtype, key, *_ = pid
        if key not in self._storages:
            entry = self._archive.getinfo(self._names[f"data/{key}"])
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError("compressed")
            # The name and the extra field (alignment) stand between the 30 fixed bytes of the header and its data.
            header = os.pread(self._descriptor, 30, entry.header_offset)
            lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
            dtype = dtype if isinstance(dtype, torch.dtype) else None
            self._storages[key] = _Storage(entry.header_offset + 30 + lengths, dtype, entry.file_size)
        return self._storages[key]

    def _rebuild(self, storage: Any, start: int, shape: Any, stride: Any, *rest: Any) -> SavedTensor:
        dtype = storage.dtype or rest[2]
        spec = TensorSpec(tuple(shape), dtype)
        if min((start, *spec.shape)) < 0 or start * dtype.itemsize + spec.num_bytes > storage.num_bytes:
            raise ValueError("beyond its storage")
        plain = torch.empty_strided(spec.shape, tuple(stride), device="meta").is_contiguous()
        return SavedTensor(self._path, storage.start + start * dtype.itemsize, spec, plain or not math.prod(spec.shape))


def _keep_first(value: Any, *_: Any) -> Any:
    return value


_ALLOWED: dict[tuple[str, str], Any] = {
    ("argparse", "Namespace"): Arguments,
    ("types", "SimpleNamespace"): Arguments,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): torch.Size,
    **{("torch", name): dtype for dtype, name in _dtype_to_storage_type_map().items()},
    **{
        ("torch", str(kind).removeprefix("torch.")): kind
        for kind in vars(torch).values()
        if isinstance(kind, torch.dtype)
    },
}
