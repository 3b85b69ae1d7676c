"""Files of tensors that several threads write at once, in any order: every value exactly once."""

import math
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from megatron_adapt.checkpoint.values import TensorSpec


class TensorFilesWriter(ABC):
    """What the writers of all formats have in common.

    Use as a context manager; a normal exit checks that every value was written, and finishes the folder.
    """

    def __init__(self, folder: Path, specs: Mapping[str, TensorSpec]) -> None:
        """Start in an existing folder.

        Files that are there already are written over and not emptied: what an earlier writer of the same tensors
        wrote stays until it is written again.
        """
        self._folder = folder
        self._left = {name: math.prod(spec.shape) for name, spec in specs.items()}
        self._files: dict[str, int] = {}
        "Descriptors by name."
        self._lock = threading.Lock()

    def _open(self, name: str) -> int:
        """Begin a file of the folder; return its descriptor."""
        self._files[name] = os.open(self._folder / name, os.O_CREAT | os.O_WRONLY, 0o644)
        return self._files[name]

    def count_written(self, name: str, num_values: int) -> None:
        """Count values of a tensor as written, also those that an earlier writer of this folder wrote."""
        with self._lock:
            self._left[name] -= num_values

    def sync(self) -> None:
        """Wait until what was written so far is on disk."""
        for descriptor in list(self._files.values()):
            os.fdatasync(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        if kind is not None:
            return
        unfinished = [name for name, left in self._left.items() if left]
        assert not unfinished, f"not written exactly once: {unfinished[:5]}"
        self._finish()

    @abstractmethod
    def _finish(self) -> None:
        """Write what stands beside the tensors."""
