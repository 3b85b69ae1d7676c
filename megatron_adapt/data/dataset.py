"""The windows of a training stage, by their place in the run; and the fixed windows of a validation.

Reads: a plan, and the token files of its sources. Guarantees: window ``i`` of a run is a function of the plan and
the data alone - not of the number of ranks, the micro batch or the step it was resumed at - so the position of a run
is the number of windows it has read. All sources come from one tokenizer, and no id lies outside its vocabulary.

Method (``BlendedWindows.locate``):
1. ``_find_state``: how many windows of each source came before; known where the last batch ended.
2. ``interleave`` names the sources of the places asked for.
3. ``EpochOrder`` turns the ordinal of a window in its source into a place there, a slice of the mapped ``.bin``;
   the kernel is told of all slices of a batch before the first is read, so that it fetches them together.

Costs: no memory but K numbers, nothing on disk, about 20 microseconds a window.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_adapt.data.align import mask_targets
from megatron_adapt.data.blend import count_prefix, interleave, rank_windows
from megatron_adapt.data.index import TokensFile, bin_path, read_tokens
from megatron_adapt.data.plan import BlendPlan
from megatron_adapt.data.prompts import mask_prompts
from megatron_adapt.data.record import TokensRecord, read_record
from megatron_adapt.data.sources import open_sources
from megatron_adapt.data.windows import Windows, count_windows, locate_windows
from megatron_adapt.errors import ConfigError, DataError


class Batch(NamedTuple):
    """N windows, ready to train on."""

    ids_NT1: NDArray[np.int64]
    "Token ids, ``[N, T + 1]``: the last T are the targets of the first T."
    sources_N: NDArray[np.int64]
    "Index of each window's source in the plan."
    loss_NT: NDArray[np.bool_]
    "Which targets bear loss: all but prompts and, of aligned windows, what the next one reads again."


class BlendedWindows:
    """The windows of a plan, in the order they are read."""

    def __init__(self, plan: BlendPlan, prefixes: Mapping[str, Path]) -> None:
        """Open the sources of a plan.

        Args:
            plan: windows per source.
            prefixes: prefix of the token files of each source.

        Raises:
            ConfigError: as ``open_sources``.
            DataError: as ``open_sources``.
        """
        self.plan = plan
        self.sources = open_sources(plan, prefixes)
        self._by_index = list(self.sources.values())
        self._state = 0, np.zeros(len(plan.sources), np.int64)
        "A place of the plan, and the windows of each source before it; the order is continued from there."

    def __len__(self) -> int:
        return self.plan.num_windows

    def read_windows(self, first: int, count: int) -> Batch:
        """Read ``count`` windows from place ``first`` of the stage.

        Raises:
            ConfigError: the places lie outside the plan.
            DataError: an id is not in the tokenizer's vocabulary.
        """
        sources_N, windows = self.locate(first, count)
        ids_NT1 = np.empty((count, self.plan.seq_length + 1), np.int64)
        loss_NT = np.ones((count, self.plan.seq_length), bool)
        chosen = [(self._by_index[index], np.flatnonzero(sources_N == index)) for index in np.unique(sources_N)]
        for source, chosen_N in chosen:
            source.file.prefetch(windows.starts_N[chosen_N], self.plan.seq_length + 1)
        for source, chosen_N in chosen:
            starts_N = windows.starts_N[chosen_N]
            ids_NT1[chosen_N] = _read(source.file, starts_N, self.plan.seq_length, source.record)
            if source.cuts_W1 is not None:
                loss_NT[chosen_N] &= mask_targets(source.cuts_W1, windows.windows_N[chosen_N], self.plan.seq_length)
            if source.prompts_D is not None:
                loss_NT[chosen_N] &= mask_prompts(source.starts_D1, source.prompts_D, starts_N, self.plan.seq_length)
        return Batch(ids_NT1, sources_N, loss_NT)

    def locate(self, first: int, count: int) -> tuple[NDArray[np.int64], Windows]:
        """Return the index of the source of each of ``count`` places from ``first``, ``[count]``, and its window."""
        plan = self.plan
        if first < plan.begin or count < 0 or first + count > len(self):
            raise ConfigError(
                f"windows {first} to {first + count} lie outside the plan of windows {plan.begin} to {len(self)}; "
                "train on no more steps than it has, or raise the stage's tokens"
            )
        placed_K = self._find_state(first - plan.begin)
        sources_N = interleave(plan.weights, placed_K.tolist(), count).astype(np.int64)
        before_K = np.asarray(plan.first, np.int64) + placed_K
        used_U, use_N = np.unique(sources_N, return_inverse=True)
        used = [self._by_index[index] for index in used_U]
        ordinals_N = before_K[sources_N] + rank_windows(sources_N)
        found = locate_windows([source.order for source in used], use_N, ordinals_N)
        for index, source in enumerate(used):
            if source.cuts_W1 is not None:
                found.starts_N[use_N == index] = source.cuts_W1[found.windows_N[use_N == index]]
        self._state = first - plan.begin + count, placed_K + np.bincount(sources_N, minlength=len(placed_K))
        return sources_N, found

    def count_before(self, place: int) -> NDArray[np.int64]:
        """Count the windows of each source that the stage has read when it stands at ``place``, ``[K]``."""
        return np.asarray(self.plan.before, np.int64) + self._find_state(place - self.plan.begin)

    def _find_state(self, place: int) -> NDArray[np.int64]:
        """Return the windows of each source before ``place`` of the plan."""
        known, placed_K = self._state
        if place != known:
            placed_K = count_prefix(self.plan.weights, place)
        self._state = place, placed_K
        return placed_K


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
        return _read(self._file, windows_N * self._seq_length, self._seq_length, self.record)


def _read(file: TokensFile, starts_N: NDArray[np.int64], seq_length: int, record: TokensRecord) -> NDArray[np.int64]:
    ids_NT1 = np.empty((len(starts_N), seq_length + 1), np.int64)
    for row, start in enumerate(starts_N):
        head = file.tokens_N[start : start + seq_length + 1]
        ids_NT1[row, : len(head)] = head
        if len(head) <= seq_length:
            ids_NT1[row, len(head) :] = file.tokens_N[: seq_length + 1 - len(head)]
    if len(starts_N) and (ids_NT1.max() >= record.vocab_size or ids_NT1.min() < 0):
        wrong = int(ids_NT1.max()) if ids_NT1.max() >= record.vocab_size else int(ids_NT1.min())
        raise DataError(
            f"{bin_path(file.prefix)}: holds id {wrong}, outside the vocabulary of {record.vocab_size} its tokenizer "
            "has; the file is damaged, tokenise the corpus again"
        )
    return ids_NT1
