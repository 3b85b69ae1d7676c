"""The distinct words of a corpus, cut into the pieces of a base tokenizer.

A word is what a new piece must not cross (``cut``).

1. ``count_words`` reads the texts once: words with their frequency, and a sample of texts for later checks.
2. ``segment_words`` cuts every distinct word by the base's frozen merges.

A character that a SentencePiece base has no piece for (it falls back to bytes) is cut in two symbols, its first byte
and the rest: making it a piece is then a merge like any other, and happens when the tokens it saves ask for it.
Costs: those of ``cut``; memory grows with the distinct words.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import orjson
from tokenizers import Tokenizer

from megatron_adapt.errors import DataError
from megatron_adapt.logs import Advance, show_progress
from megatron_adapt.tokenizer.cut import count_batches
from megatron_adapt.tokenizer.filters import PieceFilter
from megatron_adapt.tokenizer.merges import SegmentedWords
from megatron_adapt.tokenizer.pieces import LoadedTokenizer, byte_letters, from_letters

_BATCH_BYTES = 2_000_000
_SAMPLE_TEXTS = 256
_SAMPLE_CHARACTERS = 4096
_BATCH_WORDS = 1 << 14
_INERT = b"\xff"  # occurs in no UTF-8 text, so no candidate with it is ever accepted


@dataclass(frozen=True)
class CountedWords:
    """What one reading of the corpus gave."""

    counts: Counter[str]
    "Frequency of each word, spelled as the base spells pieces."
    sample: list[str]
    "Beginnings of evenly spaced texts."
    num_texts: int
    num_bytes: int


def count_words(base: LoadedTokenizer, texts: Iterable[str], allowed: PieceFilter, segmenter: str = "") -> CountedWords:
    """Count the words that hold at least one character a piece may be made for.

    Args:
        base: the tokenizer whose words they are.
        texts: documents; read once.
        allowed: the characters.
        segmenter: also cuts words (``segment.make_segmenter``).

    Raises:
        ConfigError: there is no such segmenter.
        DataError: the segmenter fails on a text.
    """
    reading = Reading()
    counts: Counter[str] = Counter()
    with show_progress("reading the corpus", None, "MB") as advance:
        for found in count_batches(base, reading.batch(texts, advance), allowed, segmenter):
            counts.update(found)
    return CountedWords(counts, reading.sample, reading.num_texts, reading.num_bytes)


class Reading:
    """Batches of texts, and what is noted of them on the way, as ``CountedWords`` holds it."""

    def __init__(self) -> None:
        self.sample: list[str] = []
        self.num_texts = self.num_bytes = 0
        self._stride = 1

    def batch(self, texts: Iterable[str], advance: Advance) -> Iterator[list[str]]:
        """Yield the texts in batches of about two megabytes; ``advance`` is told the megabytes read."""
        batch: list[str] = []
        batch_bytes = 0
        for text in texts:
            self._note(text)
            batch.append(text)
            batch_bytes += len(text.encode())
            if batch_bytes >= _BATCH_BYTES:
                self.num_bytes += batch_bytes
                advance(batch_bytes / 1e6)
                yield batch
                batch, batch_bytes = [], 0
        self.num_bytes += batch_bytes
        advance(batch_bytes / 1e6)
        yield batch

    def _note(self, text: str) -> None:
        if self.num_texts % self._stride == 0:
            self.sample.append(text[:_SAMPLE_CHARACTERS])
            if len(self.sample) == 2 * _SAMPLE_TEXTS:
                self.sample, self._stride = self.sample[::2], 2 * self._stride
        self.num_texts += 1


def strip_tokenizer(base: LoadedTokenizer, characters: Iterable[str] = ()) -> Tokenizer:
    """Return the bare BPE or Unigram: no normaliser, no pre-tokenizer, no added tokens, no shortcut for words.

    Args:
        base: the tokenizer; it stays as it is.
        characters: characters that a BPE is to know on top, under ids from ``base.vocab_size`` on.
    """
    content = orjson.loads(base.tokenizer.to_str())
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        content[part] = None
    content["added_tokens"] = []
    if base.algorithm == "BPE":
        model = content["model"]
        model["ignore_merges"] = False
        model["vocab"].update({text: base.vocab_size + at for at, text in enumerate(characters)})
    bare: Tokenizer = Tokenizer.from_str(orjson.dumps(content).decode())
    return bare


def segment_words(base: LoadedTokenizer, counts: Counter[str]) -> SegmentedWords:
    """Cut words into the base's pieces.

    Raises:
        DataError: a byte-level base lacks some of the 256 bytes, so text would be lost.
    """
    vocab = base.tokenizer.get_vocab(with_added_tokens=False)
    lacking = sum(letter not in vocab for letter in byte_letters().values())
    if base.kind == "byte_level" and lacking:
        raise DataError(f"{base.folder}: {lacking} of the 256 bytes have no piece; use a complete byte-level tokenizer")
    missing = [] if base.kind == "byte_level" else sorted({letter for word in counts for letter in word} - vocab.keys())
    bare = strip_tokenizer(base, missing)
    words = list(counts)
    ids, lengths = [np.zeros(0, np.int32)], [np.zeros(0, np.int64)]
    for start in range(0, len(words), _BATCH_WORDS):
        batch = [item.ids for item in bare.encode_batch_fast(words[start : start + _BATCH_WORDS])]
        lengths.append(np.array([len(item) for item in batch], dtype=np.int64))
        ids.append(np.array([index for item in batch for index in item], dtype=np.int32))
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate(lengths))])
    flat = np.concatenate(ids)
    symbols = _list_symbols(base, vocab)
    cut = _cut_missing(flat, offsets, symbols, missing, base.vocab_size)
    frequencies = np.array([counts[word] for word in words], dtype=np.int64)
    occurrences = np.zeros(base.vocab_size + len(missing), np.int64)
    np.add.at(occurrences, flat, np.repeat(frequencies, np.diff(offsets)))
    return _weigh_missing(SegmentedWords(symbols, *cut, frequencies), missing, occurrences[base.vocab_size :])


def _list_symbols(base: LoadedTokenizer, vocab: dict[str, int]) -> list[bytes]:
    symbols = [_INERT] * base.vocab_size
    special = base.tokenizer.get_added_tokens_decoder()
    for piece, index in vocab.items():
        if index not in special:
            symbols[index] = from_letters(piece) if base.kind == "byte_level" else piece.encode()
    return symbols


def _cut_missing(
    ids: np.ndarray, offsets: np.ndarray, symbols: list[bytes], missing: list[str], first_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Replace the ids of missing characters by two symbols each, which are appended to ``symbols``."""
    heads: dict[bytes, int] = {}
    pairs = np.zeros((len(missing), 2), dtype=np.int32)
    for at, letter in enumerate(missing):
        data = letter.encode()
        # A missing ASCII character cannot be cut; it stands between its neighbours and never merges.
        head, tail = (data[:1], data[1:]) if len(data) > 1 else (_INERT, data + _INERT)
        if head not in heads:
            heads[head] = len(symbols)
            symbols.append(head)
        pairs[at] = heads[head], len(symbols)
        symbols.append(tail)
    is_missing = ids >= first_id
    repeats = np.where(is_missing, 2, 1)
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(repeats)])
    cut = np.repeat(ids, repeats)
    starts = ends[:-1][is_missing]
    cut[starts] = pairs[ids[is_missing] - first_id, 0]
    cut[starts + 1] = pairs[ids[is_missing] - first_id, 1]
    return cut, ends[offsets]


def _weigh_missing(words: SegmentedWords, missing: list[str], occurrences: np.ndarray) -> SegmentedWords:
    """Add words that are a missing character alone, so that its frequency counts every token it would save.

    A merge of two pieces saves one token, a piece for a character of three bytes saves two. Once it is learned such a
    word is a single symbol and takes no further part.
    """
    saved = np.array([len(letter.encode()) - 2 for letter in missing], np.int64)
    # What occurs once stays rare.
    heavy = np.flatnonzero((saved > 0) & (occurrences > 1))
    places = {symbol: at for at, symbol in enumerate(words.symbols)}
    pairs = [places[part] for at in heavy for part in (missing[at].encode()[:1], missing[at].encode()[1:])]
    ends = words.offsets[-1] + 2 * np.arange(1, len(heavy) + 1)
    return SegmentedWords(
        words.symbols,
        np.concatenate([words.ids, np.array(pairs, np.int32)]),
        np.concatenate([words.offsets, ends]),
        np.concatenate([words.counts, (occurrences * saved)[heavy]]),
    )
