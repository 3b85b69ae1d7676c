"""Count the words of SentencePiece text: runs of one kind of character, with the space in front of them.

``filters.list_runs`` says which kinds there are, and an expression made of them (``filters.make_word_pattern``) finds
the words. The compiled twin (``csrc/runs.cpp``) reads a table of all characters instead.

1. ``RunCounter.count`` counts words with it, or by the expression where there is no extension.
2. ``_classify_characters`` fills the table by asking the ``regex`` library, so that both know the same Unicode.

Costs: the table 0.2 s, once; then 40 to 100 MB of text a second, by the expression 10 MB.
"""

from collections import Counter
from collections.abc import Iterable
from functools import cache

import numpy as np
import numpy.typing as npt
import regex

from megatron_adapt.tokenizer.filters import list_runs, make_word_pattern
from megatron_adapt.tokenizer.pieces import SPACE

try:
    import megatron_adapt._csrc as _csrc
except ImportError:
    _csrc = None

_NUM_CODE_POINTS = 0x110000
_NO_RUN = 0xFF
_UNASSIGNED = "\u0378"


class RunCounter:
    """Counts the words of text with at least one wanted character; a space in front of a word is written U+2581."""

    def __init__(self, wanted: regex.Pattern[str]) -> None:
        """Take the expression of a wanted character."""
        self._wanted = wanted
        self._pattern = make_word_pattern(SPACE)
        self._tables = _make_tables(wanted) if _csrc else ()

    def count(self, texts: Iterable[str]) -> Counter[str]:
        """Count the words of texts."""
        return Counter(_csrc.count_runs(texts, *self._tables)) if _csrc else self.count_python(texts)

    def count_python(self, texts: Iterable[str]) -> Counter[str]:
        """Do what ``count`` does, by the regular expression."""
        counts: Counter[str] = Counter()
        for text in texts:
            spaced = text.replace(" ", SPACE)
            counts.update(self._pattern.findall(spaced if spaced.startswith(SPACE) else SPACE + spaced))
        return Counter({word: count for word, count in counts.items() if self._wanted.search(word)})


@cache
def _make_tables(wanted: regex.Pattern[str]) -> tuple[npt.NDArray[np.generic], ...]:
    """Return the class of every code point, and for each class: the kind of run it begins, those it goes on, wanted."""
    characters, begins, goes_on = _classify_characters()
    is_wanted = _find(characters, wanted.pattern)
    rows, classes = np.unique(np.stack([begins, goes_on, is_wanted]).astype(np.uint64), axis=1, return_inverse=True)
    table = np.full(_NUM_CODE_POINTS, classes[-1], np.uint8)  # of the last character, the unassigned one
    table[[ord(character) for character in characters]] = classes
    return table, rows[0].astype(np.uint8), rows[1], rows[2].astype(bool)


@cache
def _classify_characters() -> tuple[str, npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """Return every assigned character and an unassigned one, the kind of run each begins, and the set it goes on."""
    everything = "".join(map(chr, range(_NUM_CODE_POINTS)))
    characters = "".join(regex.findall(r"[^\p{Cn}\p{Co}\p{Cs}]+", everything)) + _UNASSIGNED
    begins = np.full(len(characters), _NO_RUN, np.uint64)
    goes_on = np.zeros(len(characters), np.uint64)
    for kind, (first, more) in enumerate(list_runs(SPACE)):
        begins[(begins == _NO_RUN) & _find(characters, f"[{first}]")] = kind
        if more:
            goes_on |= _find(characters, f"[{more}]").astype(np.uint64) << np.uint64(kind)
    return characters, begins, goes_on


def _find(characters: str, expression: str) -> npt.NDArray[np.bool_]:
    found = np.zeros(len(characters), bool)
    for run in regex.finditer(f"(?:{expression})+", characters):
        found[run.start() : run.end()] = True
    return found
