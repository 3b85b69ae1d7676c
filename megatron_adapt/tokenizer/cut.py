"""Cut running text into the words that a new piece must not cross, and count them.

A word of a SentencePiece base is a run of one kind of character, with the space in front of it (``runs``); a word of a
byte-level base is a pre-token of the base's own pre-tokenizer. A segmenter cuts both further.

1. ``WordCutter.count`` counts the words of some texts. Pre-tokens are slow to find and repeat, so where a space is sure
   to begin one, text is taken apart at such spaces and equal parts are cut once.
2. ``count_batches`` does so for a corpus; pre-tokens and segmenters in one process for each core.

Guarantee: the counts are those of cutting each text alone.
Costs: runs 40 to 70 MB of text a second; pre-tokens 6 MB where words repeat between spaces, else 3, on each core; a
worker process takes 150 MB.
"""

import os
import re
import signal
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import accumulate, chain, islice
from multiprocessing import get_context
from typing import Any

import orjson
import regex
from tokenizers.pre_tokenizers import PreTokenizer

from megatron_adapt.errors import DataError
from megatron_adapt.tokenizer.filters import PieceFilter
from megatron_adapt.tokenizer.pieces import SPACE, Kind, LoadedTokenizer, from_letters
from megatron_adapt.tokenizer.runs import RunCounter
from megatron_adapt.tokenizer.segment import Segmenter, make_segmenter

_BATCHES_ALONE = 2
_MAX_WORKERS = 8
_JOINED_PARTS = 1 << 10
_BREAK = "\0"  # a control character: it ends a run and belongs to none
# The space between two visible characters; the literal in front makes the search fast.
_SINGLE_SPACE = re.compile(r" (?<=\S )(?=\S)")
# Alternatives of split expressions that take a space as their first character only, or among white space alone: those
# of GPT-2, Llama 3, Qwen 2 and Mistral's Tekken, as "|" parts them.
_TAKES_SPACE_FIRST = frozenset(
    r"""
    (?i:'s 's 't 're 've 'm 'll 'd 'd) \p{L}+ \p{N} \p{N}+ \p{N}{1,3} [^\r\n\p{L}\p{N}]?\p{L}+ \s*[\r\n]+ \s+(?!\S) \s+
    [^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+
    [^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*
    """.split()
) | {r" ?\p{L}+", r" ?\p{N}+", r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n/]*"}


class WordCutter:
    """Counts the words of texts with at least one wanted character, spelled as the base spells pieces."""

    def __init__(
        self, kind: Kind, normalizer: Any, pre_tokenizer: Any, wanted: regex.Pattern[str], segmenter: str
    ) -> None:
        """Take the parts of a base, the expression of a wanted character, and the name of a segmenter.

        Raises:
            ConfigError: there is no such segmenter.
        """
        self._normalizer, self._pre_tokenizer, self._wanted = normalizer, pre_tokenizer, wanted
        self._segment = make_segmenter(segmenter) if segmenter else None
        self._runs = RunCounter(wanted) if kind == "sentencepiece" else None

    def count(self, texts: Iterable[str]) -> Counter[str]:
        """Count the words of texts.

        Raises:
            DataError: the segmenter fails on a text.
        """
        normal = map(self._normalizer.normalize_str, texts) if self._normalizer else texts
        segment = self._segment
        if self._runs:
            return self._runs.count((write_breaks(text, segment) for text in normal) if segment else normal)
        if segment:
            cut = (_cut_segments(text, segment, self._pre_tokenizer) for text in normal)
            counts = Counter(chain.from_iterable(cut))
        else:
            counts = count_pre_tokens(self._pre_tokenizer, normal)
        find = self._wanted.search
        return Counter({word: count for word, count in counts.items() if find(_spell_letters(word))})


def write_breaks(text: str, segment: Segmenter) -> str:
    """Write a break between the words of a segmenter; a space goes with the word behind it."""
    return _BREAK.join(segment(text.replace(SPACE, " "))).replace(f" {_BREAK}", f"{_BREAK} ")


def _cut_segments(text: str, segment: Segmenter, pre_tokenizer: PreTokenizer) -> Iterator[str]:
    """Yield the pre-tokens of a text, cut where the words of a segmenter end; a space goes with the word behind it."""
    lengths = accumulate(map(len, segment(text)))
    ends = iter(sorted({end - (text[end - 1] == " ") for end in lengths if 0 < end < len(text)}))
    cut = next(ends, len(text))
    for word, (start, end) in pre_tokenizer.pre_tokenize_str(text):
        while cut <= start < end:
            cut = next(ends, len(text))
        while cut < end:
            # One letter a byte; what the pre-tokenizer puts in front of the text stays with the first part.
            rest = len(text[cut:end].encode())
            yield word[:-rest]
            word = word[-rest:]
            cut = next(ends, len(text))
        yield word


def _spell_letters(word: str) -> str:
    return from_letters(word).decode(errors="ignore")


def count_pre_tokens(pre_tokenizer: PreTokenizer, texts: Iterable[str]) -> Counter[str]:
    """Count the words that a byte-level pre-tokenizer makes of texts."""

    def cut(text: str) -> list[str]:
        return [word for word, _ in pre_tokenizer.pre_tokenize_str(text)]

    if not begins_words_at_spaces(pre_tokenizer):
        return Counter(chain.from_iterable(map(cut, texts)))
    counts: Counter[str] = Counter()
    parts: Counter[str] = Counter()
    for text in texts:
        first, *inner = _SINGLE_SPACE.split(text)
        parts.update(inner[:-1])
        # The first part has no space in front of it, and the last one may end with white space.
        counts.update(cut(first))
        counts.update(word for part in inner[-1:] for word in cut(f" {part}"))
    repeated = defaultdict(list)
    for part, times in parts.items():
        repeated[times].append(part)
    for times, group in repeated.items():
        for at in range(0, len(group), _JOINED_PARTS):
            for word, found in Counter(cut(" " + " ".join(group[at : at + _JOINED_PARTS]))).items():
                counts[word] += times * found
    return counts


def begins_words_at_spaces(pre_tokenizer: PreTokenizer) -> bool:
    """Tell whether a byte-level pre-tokenizer is known to begin a word at every space between visible characters."""
    content = orjson.loads(pre_tokenizer.__getstate__())
    match content.get("pretokenizers", [content]):
        case [{"type": "ByteLevel", "use_regex": True}]:
            return True  # GPT-2's expression
        case [
            {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "use_regex": False},
        ]:
            alternatives = set(pattern.split("|"))
            return r"\s+" in alternatives and alternatives <= _TAKES_SPACE_FIRST
    return False


def count_batches(
    base: LoadedTokenizer, batches: Iterable[list[str]], allowed: PieceFilter, segmenter: str
) -> Iterator[Counter[str]]:
    """Yield for every batch of texts, in order, the counts of the words that hold a character of ``allowed``.

    Raises:
        ConfigError: there is no such segmenter.
        DataError: the segmenter fails, or a worker process was ended.
    """
    parts = (base.kind, base.tokenizer.normalizer, base.tokenizer.pre_tokenizer, allowed.character, segmenter)
    cutter = WordCutter(*parts)
    waiting = iter(batches)
    cores = _count_cores()
    # A process takes a second to start, and runs are found sooner than they could be sent.
    is_alone = cores == 1 or (base.kind == "sentencepiece" and not segmenter)
    yield from map(cutter.count, waiting if is_alone else islice(waiting, _BATCHES_ALONE))
    for batch in waiting:
        yield from _count_in_workers(chain([batch], waiting), parts, min(_MAX_WORKERS, cores))


def _count_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _count_in_workers(batches: Iterable[list[str]], parts: tuple[Any, ...], workers: int) -> Iterator[Counter[str]]:
    # A forked child would inherit the threads of the tokenizers library in an unknown state.
    spawn = get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start_worker, initargs=parts)
    under_way: deque[Future[Counter[str]]] = deque()
    try:
        for batch in batches:
            under_way.append(pool.submit(_work, batch))
            if len(under_way) > workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenProcessPool:
        raise DataError(
            f"reading the corpus: one of {workers} processes was ended from outside, perhaps for lack of memory; "
            "free some memory, or give the program fewer cores"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_worker: dict[str, WordCutter] = {}
"The cutter of a worker process; it is made once."


def _start_worker(*parts: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the work
    _worker["cutter"] = WordCutter(*parts)


def _work(batch: list[str]) -> Counter[str]:
    return _worker["cutter"].count(batch)
