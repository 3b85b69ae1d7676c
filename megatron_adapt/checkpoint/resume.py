"""Output folders that a killed run leaves behind and the next one completes; free space, checked before the first byte.

Beside the output ``NAME`` stand, while it is made, ``.NAME.partial`` (the folder that becomes the output) and
``.NAME.progress``: a fingerprint of the whole plan and the number of steps that are done and on disk. The same plan,
started again, goes on there; another plan begins anew. Guarantees: the output appears whole; two runs never write the
same output; a mistake of the user's leaves nothing behind.
"""

import fcntl
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from megatron_adapt.errors import AdaptError, CheckpointError, ConfigError
from megatron_adapt.files import check_output, put_in_place, to_plain

_logger = logging.getLogger(__name__)
_RECORD = re.compile(rb"([0-9a-f]{32}) (\d{20})\n")


@dataclass
class PartialFolder:
    """The folder that is being made.

    Attributes:
        folder: where to write.
        done: steps that an earlier run did.
    """

    folder: Path
    done: int
    _plan: str
    _record: int

    def save(self, done: int) -> None:
        """Note that the first ``done`` steps are done; their bytes must be on disk."""
        os.pwrite(self._record, f"{self._plan} {done:020d}\n".encode(), 0)
        os.fsync(self._record)


def fingerprint_plan(*parts: Any, files: list[Path]) -> str:
    """Return a hash of settings, and of the names, sizes and times of the files that are read."""
    seen = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.blake2b(orjson.dumps(to_plain([parts, seen])), digest_size=16).hexdigest()


@contextmanager
def continue_folder(path: Path, *, overwrite: bool, plan: str, num_bytes: int) -> Iterator[PartialFolder]:
    """Yield a folder that becomes ``path`` if the block ends; what an earlier run of the same plan left is in it.

    Args:
        path: the output.
        overwrite: replace it if a stage wrote it.
        plan: see ``fingerprint_plan``.
        num_bytes: size of the complete output.

    Raises:
        ConfigError: ``path`` is there, another run is writing it, or there is too little space.
        CheckpointError: reading or writing failed; what was written is kept.
    """
    partial, record = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.progress")
    if path.exists() and not partial.exists():
        record.unlink(missing_ok=True)  # of a run that was killed behind its last rename
    check_output(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock(record, path) as descriptor:
        found = _RECORD.fullmatch(os.pread(descriptor, 64, 0))
        begun = found is not None and found[1].decode() == plan and partial.is_dir()
        if not begun:
            shutil.rmtree(partial, ignore_errors=True)
        try:
            check_space(path, num_bytes - (_count_allocated(partial) if begun else 0))
        except ConfigError:
            if not begun:
                record.unlink()
            raise
        try:
            partial.mkdir(exist_ok=True)
            yours = PartialFolder(partial, int(found[2]) if begun and found else 0, plan, descriptor)
            if begun:
                _logger.info("%s: continues what an earlier run began", path)
                for file in partial.rglob(".*.partial"):  # small files it was writing when it was killed
                    file.unlink()
            yours.save(yours.done)
            yield yours
            put_in_place(partial, path)
        except AdaptError:
            shutil.rmtree(partial, ignore_errors=True)
            record.unlink(missing_ok=True)
            raise
        except OSError as error:
            raise CheckpointError(
                f"{path}: stopped by {str(error)!r}; what was written is kept in {partial.name}, start again to go on"
            ) from None
        except KeyboardInterrupt:
            _logger.warning("%s: stopped; what was written is kept in %s, start again to go on", path, partial.name)
            raise
        record.unlink()


@contextmanager
def _lock(record: Path, path: Path) -> Iterator[int]:
    descriptor = os.open(record, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ConfigError(f"{path}: another run is writing it; wait for it or name another output") from None
    except OSError:
        _logger.warning("%s: this file system has no locks; do not start a second run on the same output", path)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def check_space(path: Path, num_bytes: int) -> None:
    """Refuse an output that does not fit the disk.

    Raises:
        ConfigError: with both sizes.
    """
    free = count_free_bytes(path)
    if num_bytes > free:
        raise ConfigError(
            f"--output: {path} takes {num_bytes / 1e9:.3g} GB more, {free / 1e9:.3g} GB are free there; free some "
            "or name a folder on another disk"
        )


def count_free_bytes(path: Path) -> int:
    """Return the free space where ``path`` is or will be."""
    return shutil.disk_usage(find_existing(path)).free


def find_existing(path: Path) -> Path:
    """Return the nearest folder above ``path`` that is there."""
    return next(folder for folder in path.absolute().parents if folder.is_dir())


def _count_allocated(folder: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in folder.rglob("*") if file.is_file())
