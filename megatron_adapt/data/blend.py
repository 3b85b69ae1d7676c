"""The order in which the windows of several sources are read: an endless stream, every prefix within one window.

A source of weight ``w`` of ``D`` in all is due ``t * w / D`` windows after ``t`` steps. Guarantees: after every step
every source has been read *less than one window* more or less than it is due; after ``D`` steps exactly ``w`` windows,
and then the order repeats. The order is a function of the weights alone - a longer run begins as the shorter one - and
how many windows each source has had is its whole state: it is continued anywhere from K counts. No random numbers, no
floating point.

Method (proportionate progress, Baruah, Cohen, Plaxton, Varvel 1996, on one processor):
1. ``whole_weights`` turns exact shares into integers.
2. The j-th window (from 1) of a source may be read in steps ``floor((j-1) D / w)`` to ``ceil(j D / w) - 1`` (from 0).
3. ``interleave`` reads at each step, of the windows that may be read, the one with the earliest deadline; equal
   deadlines fall to the source named first. As the shares add up to one, every window meets its deadline.
4. ``count_prefix`` counts without going through the order.

Limits: D up to 2**50, places up to 2**62; the start is computed in 128 bits (below 2**112), then carried on by adding.
Costs: O(K) a call and 20 to 70 ns a window at any K in C++ (``csrc/blend.cpp``, which ranks the windows of a block of
steps at once; same ids), O(log K) and about a microsecond in Python; 2 bytes a window of what is asked for.
"""

import functools
import heapq
import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_adapt.errors import ConfigError

try:
    import megatron_adapt._csrc as _csrc
except ImportError:  # built without a compiler
    _csrc = None

Counts = Sequence[int] | NDArray[np.int64]
"A number for each of K sources."

MAX_SOURCES = 1 << 16
MAX_TOTAL = 1 << 50
"Largest sum of the weights."
MAX_PLACE = 1 << 62
"Last place of the order that can be reached."
_MAX_STEPS = 100_000
"Beyond, going through the order is faster than choosing."


def whole_weights(shares: Sequence[Fraction]) -> tuple[int, ...]:
    """Return integer weights in proportion to exact shares.

    Exact if the shares have a common denominator of at most ``MAX_TOTAL``. Else they are rounded to weights that sum
    to ``MAX_TOTAL`` by largest remainder, each at least 1 at the cost of the largest.

    Args:
        shares: share of each of K sources, above 0; divided by their sum.

    Raises:
        ConfigError: a share is not positive, there is none, or more than 2 bytes can name.
    """
    _check_number(len(shares))
    if not shares:
        raise ConfigError("blend: no shares; name at least one source")
    if min(shares) <= 0:
        raise ConfigError(f"blend: a share of {min(shares)} is not positive; leave the source out")
    whole = sum(shares, Fraction())
    parts = [Fraction(share) / whole for share in shares]
    total = 1
    for part in parts:
        total = math.lcm(total, part.denominator)
        if total > MAX_TOTAL:
            return _round_weights([part * MAX_TOTAL for part in parts])
    return tuple(int(part * total) for part in parts)


def _round_weights(exact: Sequence[Fraction]) -> tuple[int, ...]:
    weights = [math.floor(part) for part in exact]
    by_remainder = sorted(range(len(exact)), key=lambda source: weights[source] - exact[source])
    for source in by_remainder[: MAX_TOTAL - sum(weights)]:
        weights[source] += 1
    largest = weights.index(max(weights))
    weights[largest] -= weights.count(0)
    return tuple(max(1, weight) for weight in weights)


def interleave(weights: Counts, placed: Counts, count: int) -> NDArray[np.uint16]:
    """Order the next windows of K sources by earliest deadline.

    Args:
        weights: weight of each source, K of them; a source of weight 0 is never read.
        placed: windows of each source so far, as an earlier part of this order left them; all 0 at the start.
        count: windows to order.

    Returns:
        The source of each window, ``[count]``.

    Raises:
        ConfigError: a number is negative or too large, there are more sources than 2 bytes can name, no source has a
            weight, or ``placed`` cannot have come from this order.
    """
    _check_state(weights, placed, count)
    if _csrc is None:
        _warn_twin()
        return interleave_twin(weights, placed, count)
    order: NDArray[np.uint16] = _csrc.interleave(np.asarray(weights, np.int64), np.asarray(placed, np.int64), count)
    return order


def interleave_twin(weights: Counts, placed: Counts, count: int) -> NDArray[np.uint16]:
    """Do what ``interleave`` does in Python alone: about a microsecond a window."""
    return np.fromiter(itertools.islice(_walk(weights, placed), count), np.uint16, count)


def count_prefix(weights: Counts, count: int) -> NDArray[np.int64]:
    """Count the windows of each source among the first ``count`` of the order, ``[K]``.

    Mostly without going through it (``_choose_early``); where the weights are very unequal and many, by a walk over
    ``count`` modulo the period, without memory.

    Raises:
        ConfigError: as ``interleave``.
    """
    weights, start = _as_integers(weights), [0] * len(weights)
    _check_state(weights, start, count)
    total = sum(weights)
    due = [weight * count // max(1, total) for weight in weights]
    early = _choose_early(weights, due, count)
    if early is not None:
        return np.array(due, np.int64) + np.bincount(early, minlength=len(weights)).astype(np.int64)
    periods, rest = divmod(count, total)
    if _csrc is None:
        _warn_twin()
        return periods * np.array(weights, np.int64) + count_steps_twin(weights, start, rest)
    counts_K: NDArray[np.int64] = _csrc.count_steps(np.asarray(weights, np.int64), np.asarray(start, np.int64), rest)
    return periods * np.array(weights, np.int64) + counts_K


def _choose_early(weights: list[int], due: list[int], count: int) -> list[int] | None:
    """Return the sources that have had a window at place ``count`` which is due only later; None if it takes long.

    Every window has a fixed rank, its deadline, and every step reads one. So the windows read by then are those a
    greedy choice by rank gives, of sets that can be given a step each, not before their release (scheduling matroid).
    All due ones are among them; then by rank one more of some sources. Such a set must have at most ``count - t``
    windows released at t or later, for every t. No t can break this before the remainders of the sources whose next
    window was released by then add up to a window, so only the steps from there on are looked at.
    """
    total, num_early = sum(weights), count - sum(due)
    begun = [source for source, weight in enumerate(weights) if total and weight * count % total]
    release = {source: due[source] * total // weights[source] for source in begun}
    first, remainder = count, 0
    for source in sorted(begun, key=release.__getitem__):
        remainder += weights[source] * count % total
        if remainder >= total:
            first = release[source]
            break
    if count - first > _MAX_STEPS:
        return None
    steps = _Steps(first, count)
    for source, weight in enumerate(weights):
        for window in range(due[source] - 1, -1, -1):
            at = window * total // weight
            if at < first:
                break
            steps.take(at)
    by_deadline = sorted(begun, key=lambda source: (-(-(due[source] + 1) * total // weights[source]), source))
    fitting = (source for source in by_deadline if release[source] < first or steps.take(release[source]))
    return list(itertools.islice(fitting, num_early))


class _Steps:
    """Steps that are free, each found by following others that were taken (union-find)."""

    def __init__(self, first: int, end: int) -> None:
        self._first, self._end = first, end - first
        self._next = list(range(end - first + 1))

    def take(self, at: int) -> bool:
        """Take the first free step from ``at`` on; return whether there was one."""
        begin = step = at - self._first
        while self._next[step] != step:
            step = self._next[step]
        while self._next[begin] != step:
            self._next[begin], begin = step, self._next[begin]
        if step == self._end:
            return False
        self._next[step] = step + 1
        return True


def count_steps_twin(weights: Counts, placed: Counts, count: int) -> NDArray[np.int64]:
    """Count the windows of each source among those ``interleave`` would give, in Python alone."""
    counts_K = np.zeros(len(weights), np.int64)
    for source in itertools.islice(_walk(weights, placed), count):
        counts_K[source] += 1
    return counts_K


def rank_windows(order_N: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """Return how many windows of its own source come before each window of a part of the order, ``[N]``."""
    places_N = np.argsort(order_N, kind="stable")
    counts_K = np.bincount(order_N)
    ranks_N = np.empty(len(order_N), np.int64)
    ranks_N[places_N] = np.arange(len(order_N)) - np.repeat(np.cumsum(counts_K) - counts_K, counts_K)
    return ranks_N


def _walk(weights: Counts, placed: Counts) -> Iterator[int]:
    """Yield the source of every window from ``placed`` on, without end."""
    weights, counts = _as_integers(weights), _as_integers(placed)
    total, step = sum(weights), sum(counts)
    pending = [(counts[source] * total // weight, source) for source, weight in enumerate(weights) if weight]
    heapq.heapify(pending)
    ready: list[tuple[int, int]] = []
    while True:
        while pending and pending[0][0] <= step:
            source = heapq.heappop(pending)[1]
            heapq.heappush(ready, (-(-(counts[source] + 1) * total // weights[source]), source))
        source = heapq.heappop(ready)[1]
        yield source
        step += 1
        counts[source] += 1
        heapq.heappush(pending, (counts[source] * total // weights[source], source))


def _check_state(weights: Counts, placed: Counts, count: int) -> None:
    weights, placed = _as_integers(weights), _as_integers(placed)
    _check_number(len(weights))
    if len(placed) != len(weights):
        raise ConfigError(f"blend: windows placed of {len(placed)} sources for {len(weights)} weights; give one each")
    for name, values in (("weight", weights), ("number of windows placed", placed), ("number of windows", [count])):
        if min(values, default=0) < 0:
            raise ConfigError(f"blend: {min(values)} as {name}; give a number of at least 0")
    total, place = sum(weights), sum(placed)
    if total > MAX_TOTAL:
        raise ConfigError(f"blend: weights sum to {total}; make them with whole_weights, at most {MAX_TOTAL}")
    if place + count > MAX_PLACE:
        raise ConfigError(f"blend: place {place + count} lies beyond {MAX_PLACE}; order fewer windows")
    if total == 0 and count > 0:
        raise ConfigError(f"blend: {count} windows of no source; give one a weight above 0")
    least, most = -max(1, total), max(1, total)
    lags = [had * total - place * weight for weight, had in zip(weights, placed, strict=True)]
    if lags and not (least < min(lags) and max(lags) < most):
        source = next(source for source, lag in enumerate(lags) if not least < lag < most)
        raise ConfigError(
            f"blend: {placed[source]} windows of source {source} at place {place}, a window or more from its share "
            f"{weights[source]}/{total}; continue the order these windows came from, or begin anew at 0"
        )


def _as_integers(counts: Counts) -> list[int]:
    """Return integers of any size; those of numpy overflow."""
    return counts.tolist() if isinstance(counts, np.ndarray) else [int(count) for count in counts]


def _check_number(num_sources: int) -> None:
    if num_sources > MAX_SOURCES:
        raise ConfigError(f"blend: {num_sources} sources; merge some, at most {MAX_SOURCES} can be blended")


@functools.cache
def _warn_twin() -> None:
    logging.getLogger(__name__).warning("megatron_adapt._csrc is not built; the blend is ordered by slower Python")
