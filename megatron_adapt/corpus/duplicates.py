"""Near duplicates: documents whose runs of characters are mostly those of an earlier document.

Resemblance is the Jaccard similarity of the sets of 13-character runs of two texts, in lower case and without spaces
and punctuation, as SlimPajama counts it (Shen et al. 2023, arXiv:2309.10818); it asks for no words, so Japanese is read
like English. It is estimated, never computed:

1. ``_reduce`` keeps letters, marks and digits in lower case.
2. ``sign_text``: one hash per run decides the bin and the rank, each of 128 bins keeps its least rank (one-permutation
   MinHash, Li et al. 2012; an empty bin takes the value of another, Shrivastava 2017, arXiv:1703.04664).
3. Bands of bins become one key each; a text that shares a key with an earlier one is a near duplicate (LSH, Broder
   1997). ``choose_bands`` takes the bands whose errors around the threshold are smallest.

The C++ twin (``csrc/minhash.cpp``) gives the same signatures. Of the kept libraries, ``datasketch`` hashes every run
128 times in numpy and keeps a Python set for each band: about a thousandth of this speed and ten times the memory.
Costs: about 30 MB of text a second; 9 keys or so, 100 bytes each, for every document kept.
"""

import functools
import hashlib
import logging

import numpy as np
import numpy.typing as npt
import regex

try:
    import megatron_adapt._csrc as _csrc
except ImportError:  # built without a compiler
    _csrc = None

NUM_BINS = 128
RUN_CHARACTERS = 13
_EMPTY = (1 << 64) - 1
_MASK = (1 << 64) - 1
_NO_TEXT = regex.compile(r"[^\p{L}\p{M}\p{N}]+")
_STEPS = 200

Signature = npt.NDArray[np.uint64]


class NearDuplicates:
    """The documents kept so far, by the keys of their signatures."""

    def __init__(self, threshold: float) -> None:
        """Take the resemblance, between 0 and 1, from which a document is a near duplicate."""
        self._num_bands, self._num_rows = choose_bands(threshold)
        self._seen: set[bytes] = set()

    def add(self, text: str) -> bool:
        """Keep a text and return True; return False, and forget it, if it resembles one kept before."""
        signature = sign_text(text)
        keys = [
            bytes([band]) + signature[band * self._num_rows : (band + 1) * self._num_rows].tobytes()
            for band in range(self._num_bands)
        ]
        short = {_shorten(key) for key in keys}
        if self._seen & short:
            return False
        self._seen |= short
        return True


def _shorten(key: bytes) -> bytes:
    return hashlib.blake2b(key, digest_size=8).digest()


@functools.cache
def choose_bands(threshold: float) -> tuple[int, int]:
    """Return (bands, rows in a band) whose chance to find a pair is closest to a step at ``threshold``.

    A pair of resemblance s shares a key with the chance ``1 - (1 - s^rows)^bands``. The areas of false hits below the
    threshold and of misses above it weigh the same.
    """
    similarity_S = (np.arange(_STEPS) + 0.5) / _STEPS
    below_S = similarity_S < threshold
    best = (np.inf, 1, 1)
    for num_rows in range(1, NUM_BINS + 1):
        for num_bands in range(1, NUM_BINS // num_rows + 1):
            found_S = 1 - (1 - similarity_S**num_rows) ** num_bands
            error = float(np.where(below_S, found_S, 1 - found_S).sum())
            best = min(best, (error, num_bands, num_rows))
    return best[1], best[2]


def sign_text(text: str) -> Signature:
    """Return the MinHash signature of a text, ``[NUM_BINS]``."""
    code_points = _reduce(text).encode("utf-32-le")
    if _csrc is None:
        _warn_twin()
        return sign_twin(code_points, RUN_CHARACTERS, NUM_BINS)
    signature: Signature = _csrc.sign_text(code_points, RUN_CHARACTERS, NUM_BINS)
    return signature


def _reduce(text: str) -> str:
    reduced: str = _NO_TEXT.sub("", text.lower())
    return reduced


def sign_twin(code_points: bytes, run: int, num_bins: int) -> Signature:
    """Do what the compiled ``sign_text`` does, in Python."""
    text = np.frombuffer(code_points, "<u4").tolist()
    own = [_EMPTY] * num_bins
    for start in range(max(1, len(text) - run + 1)):
        found = 0
        for code in text[start : start + run]:
            found = _mix(found + code + 1)
        own[found % num_bins] = min(own[found % num_bins], _mix(found))
    bins = list(own)
    for at in range(num_bins):
        attempt = 1
        while bins[at] == _EMPTY:
            bins[at] = own[_mix(at * 0x9E3779B97F4A7C15 + attempt) % num_bins]
            attempt += 1
    return np.array(bins, np.uint64)


def _mix(value: int) -> int:
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


@functools.cache
def _warn_twin() -> None:
    logging.getLogger(__name__).warning("megatron_adapt._csrc is not built; near duplicates are found by slower Python")
