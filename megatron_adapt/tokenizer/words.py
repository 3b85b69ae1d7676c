"""The distinct words of a corpus, cut into the pieces of a base tokenizer.

A word is what a new piece must not cross. For a byte-level base it is a pre-token of the base's own pre-tokenizer,
for a SentencePiece base a run of one script between spaces (``filters.make_word_pattern``), with its U+2581.

1. ``count_words`` reads the texts once: words with their frequency, and a sample of texts for later checks.
2. ``segment_words`` cuts every distinct word by the base's frozen merges.

A character that a SentencePiece base has no piece for (it falls back to bytes) is cut in two symbols, its first byte
and the rest: making it a piece is then a merge like any other, and happens when its frequency asks for it.
Costs: about 5 MB of text a second; memory grows with the distinct words.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import orjson
from tokenizers import Tokenizer

from megatron_adapt.errors import DataError
from megatron_adapt.logs import show_progress
from megatron_adapt.tokenizer.filters import PieceFilter, make_word_pattern
from megatron_adapt.tokenizer.merges import SegmentedWords
from megatron_adapt.tokenizer.pieces import SPACE, LoadedTokenizer, byte_letters, from_letters

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


def count_words(base: LoadedTokenizer, texts: Iterable[str], allowed: PieceFilter) -> CountedWords:
    """Count the words that hold at least one character a piece may be made for."""
    counts: Counter[str] = Counter()
    sample: list[str] = []
    stride, num_texts, num_bytes = 1, 0, 0
    pattern = make_word_pattern(SPACE)
    normalizer, cut = base.tokenizer.normalizer, base.tokenizer.pre_tokenizer
    with show_progress("reading the corpus", None, "MB") as advance:
        for text in texts:
            if num_texts % stride == 0:
                sample.append(text[:_SAMPLE_CHARACTERS])
                if len(sample) == 2 * _SAMPLE_TEXTS:
                    sample, stride = sample[::2], 2 * stride
            num_texts += 1
            size = len(text.encode())
            num_bytes += size
            normal = normalizer.normalize_str(text) if normalizer else text
            if base.kind == "byte_level":
                counts.update(word for word, _ in cut.pre_tokenize_str(normal))
            else:
                spaced = normal.replace(" ", SPACE)
                counts.update(pattern.findall(spaced if spaced.startswith(SPACE) else SPACE + spaced))
            advance(size / 1e6)
    spell = _spell_letters if base.kind == "byte_level" else str
    for word in [word for word in counts if not allowed.character.search(spell(word))]:
        del counts[word]
    return CountedWords(counts, sample, num_texts, num_bytes)


def _spell_letters(word: str) -> str:
    return from_letters(word).decode(errors="ignore")


def strip_tokenizer(base: LoadedTokenizer, characters: Iterable[str] = ()) -> Tokenizer:
    """Return the bare BPE of a tokenizer: no normaliser, no pre-tokenizer, no added tokens, no shortcut for words.

    Args:
        base: the tokenizer; it stays as it is.
        characters: characters to know on top, under ids from ``base.vocab_size`` on.
    """
    content = orjson.loads(base.tokenizer.to_str())
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        content[part] = None
    content["added_tokens"] = []
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
    symbols = _list_symbols(base, vocab)
    cut = _cut_missing(np.concatenate(ids), offsets, symbols, missing, base.vocab_size)
    return SegmentedWords(symbols, *cut, np.array([counts[word] for word in words], dtype=np.int64))


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
