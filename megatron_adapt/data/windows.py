"""Windows of a source: how many there are, and the order of each epoch, computed and never stored.

The documents of a source, end to end in stored order, are a ring of S tokens. An epoch cuts it every T tokens into
``n = (S - 1) // T`` windows of T + 1 tokens; neighbours share one token, so that n T tokens are a target once. The
``S - n T`` tokens up to the first cut are the tail that the epoch drops. Epoch 0 is cut from token 0, every other from
a token of its own, so that epochs neither drop the same tail nor break the text at the same tokens. A window that
reaches the last token goes on at the first one.

Guarantees: an epoch reads each window exactly once; windows and order depend on the data, the epoch and the seed, and
neither on the length of the run nor on the number of ranks, so a longer run begins with the same windows.

Method (``locate_windows``):
1. ``_draw_epoch``: hash of (fingerprint of the data, epoch, seed) -> 8 keys, and the token the epoch is cut from.
2. ``_scramble``: a Feistel network over pairs of residues modulo ``ceil(sqrt(n))``: a keyed bijection on the least
   square >= n (Black, Rogaway 2002, "Ciphers with arbitrary finite domains", generalised Feistel).
3. ``permute``: results outside ``0..n-1`` are scrambled again until they fall inside (cycle walking, same paper);
   at most ``2 sqrt(n)`` of the square lie outside, so this hardly ever happens.
4. ``locate_twin``: window w begins at token ``(o + w T) mod S``.

Costs: no memory; 0.2 microseconds a window in C++ (``csrc/windows.cpp``, bit for bit the same), a microsecond in
numpy, and a few for each source and epoch in a call.
"""

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

try:
    import megatron_adapt._csrc as _csrc
except ImportError:  # built without a compiler; numpy is fast enough not to warn
    _csrc = None

_NUM_ROUNDS = 8

_EPOCH_NUMBERS = 5 + _NUM_ROUNDS

Keys = tuple[int, ...]
Epoch = tuple[int, ...]
"Windows, side of the least square that holds them, first token, ``seq_length``, tokens; then the keys."


def count_windows(num_tokens: int, seq_length: int) -> int:
    """Return the number of windows of ``seq_length + 1`` tokens with one token of overlap."""
    return max(0, num_tokens - 1) // seq_length


class Windows(NamedTuple):
    """Windows of one source, ``[N]`` each."""

    epochs_N: NDArray[np.int64]
    "How often the source was read whole before."
    windows_N: NDArray[np.int64]
    "Number of the window in its epoch, in the order of the tokens from the epoch's first cut."
    starts_N: NDArray[np.int64]
    "First token; the window ends ``seq_length`` tokens later on the ring."


@dataclass(frozen=True, kw_only=True)
class EpochOrder:
    """The endless order of a source's windows: one cut and one keyed permutation after another."""

    num_tokens: int
    "Tokens of the source, enough for one window."
    seq_length: int
    "Tokens to predict in a window."
    fingerprint: str
    "Hash of the source's data."
    seed: int
    "Seed of the run."

    @functools.cached_property
    def num_windows(self) -> int:
        """Windows in an epoch."""
        return count_windows(self.num_tokens, self.seq_length)

    def first_token(self, epoch: int) -> int:
        """Return the token that windows of ``epoch`` are cut from."""
        return _draw_epoch(self.fingerprint, epoch, self.seed)[1] % self.num_tokens

    def describe(self, epoch: int) -> Epoch:
        """Return everything that decides the windows of an epoch."""
        keys, _ = _draw_epoch(self.fingerprint, epoch, self.seed)
        sizes = (self.num_windows, _side(self.num_windows), self.first_token(epoch), self.seq_length, self.num_tokens)
        return (*sizes, *keys)

    def windows_of(self, ordinals_N: NDArray[np.int64]) -> Windows:
        """Return the windows that are read from this source as the ``ordinals_N``-th, from 0, in any order."""
        return locate_windows([self], np.zeros(len(ordinals_N), np.int64), ordinals_N)


@functools.lru_cache(maxsize=1 << 14)
def _draw_epoch(fingerprint: str, epoch: int, seed: int) -> tuple[Keys, int]:
    """Return the keys of an epoch's permutation, and a number of 128 bits for its first cut; 0 for epoch 0."""
    name = f"{fingerprint}:{epoch}:{seed}".encode()
    keys = np.frombuffer(hashlib.blake2b(name, digest_size=8 * _NUM_ROUNDS).digest(), "<u8")
    cut = int.from_bytes(hashlib.blake2b(name, digest_size=16, person=b"first token").digest(), "little")
    return tuple(keys.tolist()), cut if epoch else 0


def locate_windows(
    orders: Sequence[EpochOrder], sources_N: NDArray[np.int64], ordinals_N: NDArray[np.int64]
) -> Windows:
    """Return windows of several sources.

    Args:
        orders: the order of each of K sources, best only of those that occur.
        sources_N: source of each of N windows.
        ordinals_N: how many windows of its source are read before it, in this and all earlier epochs.
    """
    sizes_K = np.array([order.num_windows for order in orders], np.int64)
    epochs_N, places_N = np.divmod(ordinals_N, sizes_K[sources_N])
    num_epochs = int(epochs_N.max(initial=0)) + 1
    pairs_G, groups_N = np.unique(sources_N * num_epochs + epochs_N, return_inverse=True)
    drawn = [orders[pair // num_epochs].describe(pair % num_epochs) for pair in pairs_G.tolist()]
    locate = locate_twin if _csrc is None else _csrc.locate_windows
    windows_N, starts_N = locate(places_N, groups_N, np.array(drawn, np.uint64).reshape(-1, _EPOCH_NUMBERS))
    return Windows(epochs_N, windows_N, starts_N)


def locate_twin(
    places_N: NDArray[np.int64], groups_N: NDArray[np.int64], drawn_GE: NDArray[np.uint64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return window and first token of each place of an epoch, in numpy.

    Args:
        places_N: how many windows of the epoch come before.
        groups_N: number of the epoch in ``drawn_GE``.
        drawn_GE: ``Epoch`` of each of G epochs.
    """
    windows_N, starts_N = np.empty_like(places_N), np.empty_like(places_N)
    for group, (size, _, origin, seq_length, num_tokens, *keys) in enumerate(drawn_GE.tolist()):
        chosen_N = groups_N == group
        windows_N[chosen_N] = permute(places_N[chosen_N], size, tuple(keys))
        starts_N[chosen_N] = (origin + windows_N[chosen_N] * seq_length) % num_tokens
    return windows_N, starts_N


def permute(places_N: NDArray[np.int64], size: int, keys: Keys) -> NDArray[np.int64]:
    """Map places ``0..size-1`` one to one onto ``0..size-1``; ``keys`` choose the permutation."""
    side = _side(size)
    found_N = _scramble(places_N.astype(np.uint64), side, keys)
    outside_N = found_N >= size
    while outside_N.any():
        found_N[outside_N] = _scramble(found_N[outside_N], side, keys)
        outside_N = found_N >= size
    return found_N.astype(np.int64)


def _side(size: int) -> int:
    """Return the side of the least square that holds ``size``."""
    return math.isqrt(size - 1) + 1


def _scramble(values_N: NDArray[np.uint64], side: int, keys: Keys) -> NDArray[np.uint64]:
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
