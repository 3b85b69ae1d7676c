"""The windows of a training stage, by their place in the run; and the fixed windows of a validation.

Reads: a plan, and the token files of its sources. Guarantees: window ``i`` of a run is a function of the plan and
the data alone - not of the number of ranks, the micro batch or the step it was resumed at - so the position of a run
is the number of windows it has read. All sources come from one tokenizer, and no id lies outside its vocabulary.

Method (``BlendedWindows.read_windows``):
1. ``interleave`` names the source of every place, once at the start.
2. ``_ordinals``: how many windows of that source came before, from counts at every 16384th place and, for a stage that
   continues another, from its plan.
3. ``EpochOrder`` turns the ordinal into a window of the source, one slice of its mapped ``.bin``.

Costs: 2 bytes a window of the plan, nothing on disk, about 20 microseconds a window.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_adapt.data.blend import interleave
from megatron_adapt.data.index import TokensFile, bin_path, read_tokens
from megatron_adapt.data.plan import BlendPlan
from megatron_adapt.data.record import TokensRecord, data_fingerprint, read_record
from megatron_adapt.data.windows import EpochOrder, count_windows
from megatron_adapt.errors import ConfigError, DataError

_BLOCK = 1 << 14


class BlendedWindows:
    """The windows of a plan, in the order they are read."""

    def __init__(self, plan: BlendPlan, prefixes: Mapping[str, Path]) -> None:
        """Open the sources of a plan.

        Args:
            plan: windows per source.
            prefixes: prefix of the token files of each source.

        Raises:
            ConfigError: a source of the plan has no prefix.
            DataError: files are missing or damaged, do not fit the plan, or come from different tokenizers.
        """
        self.plan = plan
        self._files: list[TokensFile] = []
        self.records: dict[str, TokensRecord] = {}
        "Counts of each source."
        self.data_fingerprints: dict[str, str] = {}
        "Hash of each source's data, for the checkpoint."
        for source, available in zip(plan.sources, plan.available, strict=True):
            if source not in prefixes:
                raise ConfigError(f"blend.{source}: no token files were named; tokenise the source first")
            prefix = prefixes[source]
            file = read_tokens(prefix)
            windows = count_windows(file.num_tokens, plan.seq_length)
            if windows != available:
                raise DataError(
                    f"{bin_path(prefix)}: {windows} windows of {plan.seq_length} tokens where the plan counted "
                    f"{available}; the data changed, make the plan again"
                )
            self._files.append(file)
            self.records[source] = read_record(prefix)
            self.data_fingerprints[source] = data_fingerprint(prefix)
        self.tokenizer_fingerprint = check_tokenizers({prefixes[name]: item for name, item in self.records.items()})
        "Fingerprint of the tokenizer of all sources."
        self._orders = [
            EpochOrder(num_windows=available, fingerprint=self.data_fingerprints[source], seed=plan.seed)
            for source, available in zip(plan.sources, plan.available, strict=True)
        ]
        self._sources = interleave(plan.windows)
        self._counts = _count_blocks(self._sources, len(plan.sources))

    def __len__(self) -> int:
        return len(self._sources)

    def read_windows(self, first: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Read ``count`` windows from place ``first`` of the run.

        Returns:
            ids ``[count, T + 1]`` (the last T are the targets of the first T) and the index of each window's source
            in ``plan.sources``, ``[count]``.

        Raises:
            ConfigError: the places lie outside the plan.
            DataError: an id is not in the tokenizer's vocabulary.
        """
        sources_N, windows_N = self.locate(first, count)
        ids_NT1 = np.empty((count, self.plan.seq_length + 1), np.int64)
        for index in np.unique(sources_N):
            chosen_N = np.flatnonzero(sources_N == index)
            record = self.records[self.plan.sources[index]]
            ids_NT1[chosen_N] = _read(self._files[index], windows_N[chosen_N], self.plan.seq_length, record)
        return ids_NT1, sources_N

    def locate(self, first: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the source of each of ``count`` places from ``first``, and its window in that source."""
        if first < 0 or count < 0 or first + count > len(self):
            raise ConfigError(
                f"windows {first} to {first + count} lie outside the plan of {len(self)} windows; "
                "train on no more steps than it has, or raise the stage's tokens"
            )
        sources_N = self._sources[first : first + count].astype(np.int64)
        ordinals_N = self._ordinals(first, sources_N)
        windows_N = np.empty_like(ordinals_N)
        for index in np.unique(sources_N):
            chosen_N = sources_N == index
            _, windows_N[chosen_N] = self._orders[index].windows_of(ordinals_N[chosen_N])
        return sources_N, windows_N

    def count_before(self, place: int) -> NDArray[np.int64]:
        """Count the windows of each source that a run has read when it stands at ``place``, ``[K]``."""
        block = place // _BLOCK
        inside = self._sources[block * _BLOCK : place]
        before_K: NDArray[np.int64] = self._counts[block] + np.bincount(inside, minlength=len(self.plan.sources))
        return before_K

    def _ordinals(self, first: int, sources_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return, for each place from ``first``, how many windows of its source came before."""
        before_K = self.count_before(first) + np.asarray(self.plan.first, np.int64)
        ordinals_N = np.empty_like(sources_N)
        for index in np.unique(sources_N):
            chosen_N = np.flatnonzero(sources_N == index)
            ordinals_N[chosen_N] = before_K[index] + np.arange(len(chosen_N))
        return ordinals_N


class ValidationWindows:
    """The first windows of a source in stored order: the same ones in every validation."""

    def __init__(self, prefix: Path, num_windows: int, seq_length: int) -> None:
        """Open a source.

        Args:
            prefix: prefix of its token files.
            num_windows: windows to use; a source with fewer gives all it has.
            seq_length: tokens to predict in a window.

        Raises:
            DataError: files are missing or damaged, or hold less than one window.
        """
        self.record = read_record(prefix)
        "Counts of the source."
        self._file = read_tokens(prefix)
        self._seq_length = seq_length
        has = count_windows(self._file.num_tokens, seq_length)
        if has == 0:
            raise DataError(
                f"{bin_path(prefix)}: {self._file.num_tokens} tokens are less than one window of {seq_length} + 1; "
                "hold out more text or shorten seq_length"
            )
        if has < num_windows:
            logging.getLogger(__name__).warning("%s: validating on all %d windows it has", prefix.name, has)
        self._num_windows = min(has, num_windows)

    def __len__(self) -> int:
        return self._num_windows

    def read_windows(self, first: int, count: int) -> NDArray[np.int64]:
        """Read ``count`` windows from ``first``; fewer at the end. Returns ids ``[count, T + 1]``."""
        windows_N = np.arange(first, min(first + count, len(self)))
        return _read(self._file, windows_N, self._seq_length, self.record)


def check_tokenizers(records: Mapping[Path, TokensRecord]) -> str:
    """Return the fingerprint of the tokenizer that made all of these token files.

    Raises:
        DataError: two of them come from different tokenizers.
    """
    (one, first), *others = records.items()
    for other, record in others:
        if record.tokenizer_fingerprint != first.tokenizer_fingerprint:
            raise DataError(
                f"{bin_path(other)}: made by tokenizer {record.tokenizer_fingerprint}, but {bin_path(one)} by "
                f"{first.tokenizer_fingerprint}; tokenise both with the same one"
            )
    return first.tokenizer_fingerprint


def _count_blocks(sources_N: NDArray[np.uint16], num_sources: int) -> NDArray[np.int64]:
    """Count the windows of each source before every block of places, ``[blocks, K]``."""
    starts = range(0, max(1, len(sources_N)), _BLOCK)
    blocks = [np.bincount(sources_N[start : start + _BLOCK], minlength=num_sources) for start in starts]
    counts = np.zeros((len(blocks) + 1, num_sources), np.int64)
    np.cumsum(blocks, axis=0, out=counts[1:])
    return counts


def _read(file: TokensFile, windows_N: NDArray[np.int64], seq_length: int, record: TokensRecord) -> NDArray[Any]:
    ids_NT1 = np.empty((len(windows_N), seq_length + 1), np.int64)
    for row, window in enumerate(windows_N):
        start = int(window) * seq_length
        ids_NT1[row] = file.tokens_N[start : start + seq_length + 1]
    if len(windows_N) and (ids_NT1.max() >= record.vocab_size or ids_NT1.min() < 0):
        wrong = int(ids_NT1.max()) if ids_NT1.max() >= record.vocab_size else int(ids_NT1.min())
        raise DataError(
            f"{bin_path(file.prefix)}: holds id {wrong}, outside the vocabulary of {record.vocab_size} its tokenizer "
            "has; the file is damaged, tokenise the corpus again"
        )
    return ids_NT1
