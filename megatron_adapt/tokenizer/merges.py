"""Learn BPE pieces over words that are already cut into pieces (Sennrich et al. 2016, arXiv:1508.07909).

Candidates are byte strings: every pair of neighbours that spells a candidate counts towards it, and when it is
learned every such pair merges, from left to right. That is how SentencePiece reads a vocabulary, and how
``tokenizers`` does when all splits of a piece are among the merges. Ties: higher count, shorter, smaller bytes.

1. ``learn_merges`` runs the compiled learner (``csrc/merges.cpp``), or its Python twin where there is none.
2. ``learn_merges_python`` is the twin: word lists, the same heap, the same answers; 20 to 100 times slower.
"""

import heapq
import logging
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

try:
    import megatron_adapt._csrc as _csrc
except ImportError:
    _csrc = None

Accept = Callable[[bytes], bool]
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SegmentedWords:
    """Distinct words of a corpus as sequences of symbols."""

    symbols: list[bytes]
    "Bytes of every symbol."
    ids: npt.NDArray[np.int32]
    "Symbols of all words behind one another."
    offsets: npt.NDArray[np.int64]
    "Where each word starts in ``ids``; one more at the end."
    counts: npt.NDArray[np.int64]
    "How often each word occurs."


def learn_merges(words: SegmentedWords, num_pieces: int, min_frequency: int, accept: Accept) -> list[tuple[bytes, int]]:
    """Learn up to ``num_pieces`` pieces, the most frequent first.

    Args:
        words: what to learn from.
        num_pieces: how many pieces to learn.
        min_frequency: a candidate seen less often is never learned.
        accept: asked once for each candidate when its turn comes; False drops it for good.

    Returns:
        The pieces in the order learned, each with its frequency at that moment; fewer when the words give no more.
    """
    if _csrc is None:
        _logger.warning("merges: the C++ extension is missing; learning in Python, 20 to 100 times slower")
        return learn_merges_python(words, num_pieces, min_frequency, accept)
    learned: list[tuple[bytes, int]] = _csrc.learn_merges(
        words.symbols, words.ids, words.offsets, words.counts, num_pieces, min_frequency, accept
    )
    return learned


def learn_merges_python(
    words: SegmentedWords, num_pieces: int, min_frequency: int, accept: Accept
) -> list[tuple[bytes, int]]:
    """Do what ``learn_merges`` does, in plain Python."""
    state = _Pairs(words)
    # A learned piece comes up again, before all counts, where a later merge brings its parts together.
    heap = [state.entry(text) for text in state.frequency]
    heapq.heapify(heap)
    learned: dict[bytes, int] = {}
    ranks: dict[bytes, int] = {}
    refused: set[bytes] = set()
    while heap and len(learned) < num_pieces:
        priority, _, text = heapq.heappop(heap)
        if text in refused or not state.places[text]:
            continue
        if text not in learned:
            count = state.frequency[text]
            if -priority != count:
                if -priority > count >= min_frequency:
                    heapq.heappush(heap, state.entry(text))
                continue
            if count < min_frequency:
                break
            if not accept(text):
                refused.add(text)
                continue
            learned[text] = count
            ranks[text] = len(ranks)
        for grown in state.merge(text):
            heapq.heappush(heap, state.entry(grown, ranks.get(grown)))
    return list(learned.items())


class _Pairs:
    """The words, and for each spelled pair its frequency and the words that hold it."""

    def __init__(self, words: SegmentedWords) -> None:
        bounds = pairwise(words.offsets.tolist())
        self.words = [[words.symbols[index] for index in words.ids[start:end]] for start, end in bounds]
        self.counts: list[int] = words.counts.tolist()
        self.frequency: Counter[bytes] = Counter()
        self.places: defaultdict[bytes, set[int]] = defaultdict(set)
        for place in range(len(self.words)):
            self._count(place, 1)

    def _count(self, place: int, sign: int) -> set[bytes]:
        found = [left + right for left, right in pairwise(self.words[place])]
        for text in found:
            self.frequency[text] += sign * self.counts[place]
            (self.places[text].add if sign > 0 else self.places[text].discard)(place)
        return set(found)

    def entry(self, text: bytes, rank: int | None = None) -> tuple[float, int, bytes]:
        """Return the heap entry of a candidate; ``rank`` that of a learned piece."""
        priority = -self.frequency[text] if rank is None else rank - (1 << 62)
        return priority, len(text), text

    def merge(self, text: bytes) -> set[bytes]:
        """Merge all pairs that spell ``text``; return the candidates that occur in the words changed."""
        seen: set[bytes] = set()
        for place in sorted(self.places[text]):
            self._count(place, -1)
            word, merged = self.words[place], []
            at = 0
            while at < len(word):
                if at + 1 < len(word) and word[at] + word[at + 1] == text:
                    merged.append(text)
                    at += 2
                else:
                    merged.append(word[at])
                    at += 1
            self.words[place] = merged
            seen |= self._count(place, 1)
        return seen
