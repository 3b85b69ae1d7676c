"""Windows of a source: how many there are, and the order of each epoch, computed and never stored.

The documents of a source, end to end in stored order, are cut every T tokens; window ``w`` is the T + 1 tokens from
``w * T``, so that neighbours share one token and every token but the first is a target once (as in megatron-core).
The tail shorter than a window is dropped. Every epoch is a full pass in an order of its own.

Guarantees: an epoch reads each window exactly once; the order depends on the data, the epoch and the seed, and
neither on the length of the run nor on the number of ranks, so a longer run begins with the same windows.

Method:
1. ``_round_keys``: hash of (fingerprint of the data, epoch, seed) -> 8 keys.
2. ``_scramble``: a Feistel network over pairs of residues modulo ``ceil(sqrt(n))``: a keyed bijection on the least
   square >= n (Black, Rogaway 2002, "Ciphers with arbitrary finite domains", generalised Feistel).
3. ``permute``: results outside ``0..n-1`` are scrambled again until they fall inside (cycle walking, same paper);
   at most ``2 sqrt(n)`` of the square lie outside, so this hardly ever happens.

Costs: no memory, about a microsecond a window in batches of a thousand.
"""

import functools
import hashlib
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_NUM_ROUNDS = 8


def count_windows(num_tokens: int, seq_length: int) -> int:
    """Return the number of windows of ``seq_length + 1`` tokens with one token of overlap."""
    return max(0, num_tokens - 1) // seq_length


@dataclass(frozen=True, kw_only=True)
class EpochOrder:
    """The endless order of a source's windows: one keyed permutation after another."""

    num_windows: int
    "Windows of the source, at least 1."
    fingerprint: str
    "Hash of the source's data."
    seed: int
    "Seed of the run."

    def window_of(self, ordinal: int) -> tuple[int, int]:
        """Return (epoch, window) of the ``ordinal``-th window read from this source, both from 0."""
        epochs_N, windows_N = self.windows_of(np.array([ordinal], np.int64))
        return int(epochs_N[0]), int(windows_N[0])

    def windows_of(self, ordinals_N: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return epochs and windows of many ordinals; see ``window_of``."""
        epochs_N, places_N = np.divmod(ordinals_N, self.num_windows)
        windows_N = np.empty_like(places_N)
        for epoch in np.unique(epochs_N):
            chosen_N = epochs_N == epoch
            keys = _round_keys(self.fingerprint, int(epoch), self.seed)
            windows_N[chosen_N] = permute(places_N[chosen_N], self.num_windows, keys)
        return epochs_N, windows_N


@functools.lru_cache(maxsize=4096)
def _round_keys(fingerprint: str, epoch: int, seed: int) -> tuple[int, ...]:
    digest = hashlib.blake2b(f"{fingerprint}:{epoch}:{seed}".encode(), digest_size=8 * _NUM_ROUNDS).digest()
    return tuple(int(key) for key in np.frombuffer(digest, "<u8"))


def permute(places_N: NDArray[np.int64], size: int, keys: tuple[int, ...]) -> NDArray[np.int64]:
    """Map places ``0..size-1`` one to one onto ``0..size-1``; ``keys`` choose the permutation."""
    side = math.isqrt(size - 1) + 1
    found_N = _scramble(places_N.astype(np.uint64), side, keys)
    outside_N = found_N >= size
    while outside_N.any():
        found_N[outside_N] = _scramble(found_N[outside_N], side, keys)
        outside_N = found_N >= size
    return found_N.astype(np.int64)


def _scramble(values_N: NDArray[np.uint64], side: int, keys: tuple[int, ...]) -> NDArray[np.uint64]:
    modulus = np.uint64(side)
    left_N, right_N = np.divmod(values_N, modulus)
    for key in keys:
        left_N, right_N = right_N, (left_N + _mix(right_N + np.uint64(key)) % modulus) % modulus
    scrambled_N: NDArray[np.uint64] = left_N * modulus + right_N
    return scrambled_N


def _mix(values_N: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spread every bit over all 64: the finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    values_N = (values_N ^ (values_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values_N = (values_N ^ (values_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values_N ^ (values_N >> np.uint64(31))
