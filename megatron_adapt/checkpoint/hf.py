"""Hugging Face model folders: a lazy reader and a streaming writer of safetensors.

Reads: ``config.json`` and ``model.safetensors``, or shards with ``model.safetensors.index.json``. Writes: the same.
Guarantees: values pass as bytes, so NaN payloads survive; only the rows asked for are in memory; a missing shard,
a cut-off file or an index that does not fit is found before the first tensor is read. Pickled weights (``.bin``)
are refused: reading a pickle runs code of whoever wrote it.

Format: 8 bytes length, a JSON header ``{name: {dtype, shape, data_offsets}}``, then the values without gaps
(https://github.com/huggingface/safetensors). Written here because the library's writer takes whole tensors only.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import torch

from megatron_adapt.checkpoint.values import (
    TensorSpec,
    bytes_of,
    list_row_blocks,
    read_into,
    read_values,
    write_bytes,
    write_values,
)
from megatron_adapt.checkpoint.writer import TensorFilesWriter
from megatron_adapt.errors import CheckpointError, DataError
from megatron_adapt.files import read_json, write_json
from megatron_adapt.shape import LlamaShape, read_shape

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
_MAX_SHARD_BYTES = 5 * 1000**3
_MAX_HEADER_BYTES = 100 << 20

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class _Entry(NamedTuple):
    """Where a tensor's values lie."""

    file: Path
    start: int
    spec: TensorSpec


def is_hf_folder(folder: Path) -> bool:
    """Tell whether a folder looks like a Hugging Face model: it has a config."""
    return (folder / CONFIG_FILE).is_file()


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json``.

    Raises:
        CheckpointError: it is missing or no JSON object.
    """
    try:
        config = read_json(folder / CONFIG_FILE)
    except DataError as error:
        raise CheckpointError(f"{folder}: no Hugging Face model folder ({error})") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / CONFIG_FILE}: a {type(config).__name__}, not an object; fetch it again")
    return config


def read_hf_shape(folder: Path) -> LlamaShape:
    """Read the shape of the model in a Hugging Face folder.

    Raises:
        CheckpointError: there is no readable config.
        ConfigError: the model is not supported.
    """
    return read_shape(read_config(folder), str(folder / CONFIG_FILE))


class HFFolder:
    """The tensors of a Hugging Face folder, read when asked for.

    Raises:
        CheckpointError: the folder holds no complete safetensors weights.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._entries = _read_entries(folder)

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._entries)

    @property
    def files(self) -> list[Path]:
        """Files that hold the tensors."""
        return sorted({entry.file for entry in self._entries.values()})

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Shape and dtype of every tensor."""
        return {name: entry.spec for name, entry in self._entries.items()}

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._entry(name).spec.shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the type of a tensor."""
        return self._entry(name).spec.dtype

    def read(self, name: str) -> torch.Tensor:
        """Read a whole tensor."""
        entry = self._entry(name)
        with entry.file.open("rb", buffering=0) as file:
            return read_values(file.fileno(), entry.start, entry.spec)

    def read_rows(self, name: str, start: int, stop: int, buffer: torch.Tensor | None = None) -> torch.Tensor:
        """Read rows [start, stop) of a tensor's first axis, into ``buffer`` as ``read_values`` does."""
        entry = self._entry(name)
        row = TensorSpec(entry.spec.shape[1:], entry.spec.dtype)
        rows = TensorSpec((stop - start, *row.shape), row.dtype)
        with entry.file.open("rb", buffering=0) as file:
            return read_values(file.fileno(), entry.start + start * row.num_bytes, rows, buffer)

    def gather_rows(self, name: str, ids: Sequence[int]) -> torch.Tensor:
        """Read the rows ``ids`` of a matrix, in that order: [len(ids), H]."""
        entry = self._entry(name)
        row = TensorSpec(entry.spec.shape[1:], entry.spec.dtype)
        rows_NH = torch.empty((len(ids), *row.shape), dtype=row.dtype)
        buffer = bytes_of(rows_NH)
        with entry.file.open("rb", buffering=0) as file:
            for at, index in enumerate(ids):
                part = buffer[at * row.num_bytes : (at + 1) * row.num_bytes]
                read_into(file.fileno(), entry.start + index * row.num_bytes, part)
        return rows_NH

    def read_mean_row(self, name: str, num_rows: int) -> torch.Tensor:
        """Return the mean of the finite ones of the first ``num_rows`` rows of a matrix, summed in fp64: [H], fp64."""
        shape = self.shape(name)
        total_H = torch.zeros(shape[1:], dtype=torch.float64)
        for start, stop in list_row_blocks(TensorSpec((num_rows, *shape[1:]), torch.float64)):
            rows_NH = self.read_rows(name, start, stop).double()
            block_H = rows_NH.sum(0)
            if not block_H.isfinite().all():
                is_finite_N = rows_NH.isfinite().all(-1)
                block_H = rows_NH[is_finite_N].sum(0)
                num_rows -= int((~is_finite_N).sum())
            total_H += block_H
        return total_H / max(1, num_rows)

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise CheckpointError(f"{self.folder}: no tensor {name}; the checkpoint is incomplete, fetch it again")
        return self._entries[name]


def _read_entries(folder: Path) -> dict[str, _Entry]:
    index = folder / INDEX_FILE
    if not index.is_file():
        if not (folder / WEIGHTS_FILE).is_file():
            raise CheckpointError(f"{folder}: {_describe_missing(folder)}")
        return _read_header(folder / WEIGHTS_FILE)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map; the index is damaged, fetch it again")
    entries: dict[str, _Entry] = {}
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).is_file():
            raise CheckpointError(f"{folder}: shard {shard} missing, which {INDEX_FILE} names; fetch the file again")
        entries.update(_read_header(folder / shard))
    for name, shard in weight_map.items():
        if name not in entries or entries[name].file.name != shard:
            raise CheckpointError(f"{index}: {name} is not in {shard}; index and shards do not fit, fetch them again")
    return {name: entries[name] for name in weight_map}


def _describe_missing(folder: Path) -> str:
    pickled = sorted(folder.glob("pytorch_model*.bin"))
    if not pickled:
        return f"neither {WEIGHTS_FILE} nor {INDEX_FILE}; check the path"
    return (
        f"holds pickled weights only ({pickled[0].name}), and reading a pickle can run foreign code; make safetensors "
        "where you trust them: AutoModelForCausalLM.from_pretrained(DIR, dtype='auto').save_pretrained(OUT)"
    )


def _read_header(path: Path) -> dict[str, _Entry]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
            raise CheckpointError(f"{path}: no safetensors header; the file is cut off or damaged, fetch it again")
        try:
            header = orjson.loads(file.read(length))
        except orjson.JSONDecodeError:
            raise CheckpointError(f"{path}: the safetensors header is damaged; fetch the file again") from None
    entries: dict[str, _Entry] = {}
    header.pop("__metadata__", None)
    for name, item in header.items():
        if item["dtype"] not in _DTYPES:
            raise CheckpointError(f"{path}: {name} is of type {item['dtype']}; convert the weights to bfloat16 first")
        spec = TensorSpec(tuple(item["shape"]), _DTYPES[item["dtype"]])
        start, stop = item["data_offsets"]
        if stop - start != spec.num_bytes:
            raise CheckpointError(f"{path}: {name} has {stop - start} bytes for shape {spec.shape}; fetch it again")
        if 8 + length + stop > size:
            raise CheckpointError(
                f"{path}: cut off at {size} bytes, {name} ends at {8 + length + stop}; fetch the file again"
            )
        entries[name] = _Entry(path, 8 + length + start, spec)
    return entries


class HFWriter(TensorFilesWriter):
    """Writes the tensors of a Hugging Face folder in any order, whole or by rows."""

    def __init__(
        self, folder: Path, specs: Mapping[str, TensorSpec], *, max_shard_bytes: int = _MAX_SHARD_BYTES
    ) -> None:
        """Lay out the shards and write their headers.

        Args:
            folder: existing folder.
            specs: every tensor that will be written; shards follow this order.
            max_shard_bytes: a shard is closed before it grows beyond this (one tensor always fits).
        """
        super().__init__(folder, specs)
        self._specs = dict(specs)
        self._entries: dict[str, _Entry] = {}
        shards = _divide_shards(self._specs, max_shard_bytes)
        for number, names in enumerate(shards, start=1):
            one = WEIGHTS_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._start_shard(one, names)

    def _start_shard(self, file_name: str, names: Sequence[str]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in names:
            spec = self._specs[name]
            header[name] = {
                "dtype": _DTYPE_NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [offset, offset + spec.num_bytes],
            }
            offset += spec.num_bytes
        raw = orjson.dumps(header)
        raw += b" " * (-len(raw) % 8)
        write_bytes(self._open(file_name), 0, memoryview(len(raw).to_bytes(8, "little") + raw))
        for name in names:
            start = 8 + len(raw) + header[name]["data_offsets"][0]
            self._entries[name] = _Entry(self._folder / file_name, start, self._specs[name])

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write a whole tensor."""
        assert tuple(tensor.shape) == self._specs[name].shape, (name, tensor.shape, self._specs[name])
        self._write(name, 0, tensor)

    def write_rows(self, name: str, start: int, rows: torch.Tensor) -> None:
        """Write rows of the first axis from ``start`` on; every row must be written exactly once."""
        spec = self._specs[name]
        assert tuple(rows.shape[1:]) == spec.shape[1:], (name, rows.shape, spec)
        assert start + rows.shape[0] <= spec.shape[0], (name, start, rows.shape, spec)
        self._write(name, start * (spec.num_bytes // spec.shape[0]), rows)

    def _write(self, name: str, offset: int, values: torch.Tensor) -> None:
        entry = self._entries[name]
        assert values.dtype == entry.spec.dtype, (name, values.dtype, entry.spec)
        write_values(self._files[entry.file.name], entry.start + offset, values)
        self.count_written(name, values.numel())

    def count_final_bytes(self) -> dict[Path, int]:
        """Return how many leading bytes of each file will not change any more."""
        final: dict[Path, int] = {}
        complete = dict.fromkeys((self._folder / name for name in self._files), True)
        with self._lock:
            for name, entry in self._entries.items():  # in the order of the files
                complete[entry.file] &= not self._left[name]
                if complete[entry.file]:
                    final[entry.file] = entry.start + entry.spec.num_bytes
        return final

    def _finish(self) -> None:
        if len(self._files) > 1:
            total = sum(spec.num_bytes for spec in self._specs.values())
            weight_map = {name: entry.file.name for name, entry in self._entries.items()}
            write_json(self._folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def count_shards(specs: Mapping[str, TensorSpec]) -> int:
    """Return how many files of weights ``HFWriter`` makes."""
    return len(_divide_shards(specs, _MAX_SHARD_BYTES))


def _divide_shards(specs: Mapping[str, TensorSpec], max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        if shards[-1] and filled + spec.num_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += spec.num_bytes
    return shards
