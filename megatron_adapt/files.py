"""Outputs that appear whole or not at all, and fingerprints of inputs.

A file or folder is written under a temporary name beside its destination, flushed to disk and renamed.
``stage.json`` in every output records what made it; ``is_finished`` compares it before work is repeated.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import orjson

from megatron_adapt.errors import ConfigError, DataError

STAGE_FILE = "stage.json"
_SAMPLE_BYTES = 1 << 20
_NUM_SAMPLES = 64
_PACKAGES = ("megatron-adapt", "torch", "megatron-core", "transformers", "tokenizers", "sentencepiece")


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path that becomes ``path`` if the block ends without an exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        sync_file(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def replace_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``path`` if the block ends without an exception.

    Raises:
        ConfigError: ``path`` is there and not empty, and ``overwrite`` is off or no stage wrote it.
    """
    check_output(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        put_in_place(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def put_in_place(partial: Path, path: Path) -> None:
    """Flush a folder that is complete and rename it to ``path``, in place of a folder that is there."""
    for file in partial.rglob("*"):
        if file.is_file():
            sync_file(file)
    if path.exists():
        shutil.rmtree(path)
    partial.replace(path)


def check_output(path: Path, *, overwrite: bool) -> None:
    """Refuse an output folder that must not be replaced.

    Raises:
        ConfigError: ``path`` is there and not empty, and ``overwrite`` is off or no stage wrote it.
    """
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path}: is a file; name another output")
    if path.exists() and any(path.iterdir()):
        if not overwrite:
            raise ConfigError(f"{path}: exists already; name another output or add --overwrite")
        if not (path / STAGE_FILE).is_file():
            raise ConfigError(f"{path}: holds no {STAGE_FILE}, so no stage wrote it; name another output or remove it")


def sync_file(path: Path) -> None:
    """Wait until a file is on disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def require_file(path: Path, setting: str) -> None:
    """Refuse a missing input before any work is done.

    Raises:
        DataError: ``path`` is not a file.
    """
    if not path.is_file():
        raise DataError(f"{setting}: {path} is not a file; check the path")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON; the file appears whole."""
    with replace_file(path) as partial:
        partial.write_bytes(orjson.dumps(to_plain(value), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))


def read_json(path: Path) -> Any:
    """Read one JSON file.

    Raises:
        DataError: the file is missing or no JSON.
    """
    require_file(path, path.name)
    try:
        return orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise DataError(f"{path}: no valid JSON ({error}); the file is damaged, write it again") from None


def to_plain(value: Any) -> Any:
    """Turn dataclasses, paths and tuples into what JSON knows."""
    if is_dataclass(value) and not isinstance(value, type):
        return to_plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def fingerprint(path: Path, num_samples: int = _NUM_SAMPLES, sample_bytes: int = _SAMPLE_BYTES) -> str:
    """Return a hash of a file's size and of evenly spaced samples of it, or of a folder's files.

    Bounded work for files of any size; an edit that keeps the size and misses every sample is not seen.
    A folder that holds a ``stage.json`` is known by that record alone.
    """
    digest = hashlib.blake2b(digest_size=16)
    if path.is_dir():
        record = path / STAGE_FILE
        files = [record] if record.is_file() else sorted(item for item in path.rglob("*") if item.is_file())
        for item in files:
            digest.update(f"{item.relative_to(path)}:{fingerprint(item)}\n".encode())
        return digest.hexdigest()
    size = path.stat().st_size
    digest.update(str(size).encode())
    stride = max(sample_bytes, size // num_samples)
    with path.open("rb") as file:
        for start in range(0, size, stride):
            file.seek(start)
            digest.update(file.read(sample_bytes))
    return digest.hexdigest()


def write_stage(path: Path, *, config: Any, inputs: Sequence[Path], counts: Mapping[str, Any] | None = None) -> None:
    """Record in ``path`` (a ``stage.json``) what made the output beside it.

    Args:
        path: the record; ``folder / STAGE_FILE``, or ``<prefix>.stage.json`` for outputs that are files.
        config: the resolved config of the tool.
        inputs: files and folders that were read; their fingerprints are kept.
        counts: what was done, in numbers.
    """
    record = {
        "config": to_plain(config),
        "inputs": {str(item): fingerprint(item) for item in inputs},
        "counts": dict(counts or {}),
        "versions": _versions(),
        "git_commit": _git_commit(),
    }
    write_json(path, record)


def is_finished(path: Path, *, config: Any) -> bool:
    """Tell whether the record at ``path`` was written by this config and its inputs are still the same."""
    if not path.is_file():
        return False
    record = read_json(path)
    if not isinstance(record, Mapping) or record.get("config") != to_plain(config):
        return False
    return all(Path(item).exists() and fingerprint(Path(item)) == known for item, known in record["inputs"].items())


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
