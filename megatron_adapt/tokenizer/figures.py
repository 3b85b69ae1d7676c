"""What a tokenizer needs for the texts of one language, in numbers.

Special tokens are not counted. A word is what stands between white space; for scripts without spaces read tokens per
character instead.

1. ``Tally`` counts the tokens of batches of texts; ``measure`` does so for all texts of a language.
2. ``Tally.describe`` makes the ratios; ``count_renyi_efficiency`` says how evenly the vocabulary is used.

Sources: Rust et al. 2021 (arXiv:2012.15613) for fertility, tokens per word; Zouhar et al. 2023 (arXiv:2306.16842) for
Rényi efficiency; Petrov et al. 2023 (arXiv:2305.15425) for the premium.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
import numpy.typing as npt

from megatron_adapt.tokenizer.pieces import LoadedTokenizer

RENYI_ALPHA = 2.5  # of all orders the one that goes best with the quality of translations (Zouhar et al. 2023)
_BATCH_TEXTS = 256


@dataclass(frozen=True)
class TokenizerFigures:
    """What one tokenizer needs for one language."""

    documents: int
    bytes: int
    characters: int
    words: int
    tokens: int
    tokens_per_word: float
    tokens_per_character: float
    tokens_per_byte: float
    bytes_per_token: float
    single_token_words: float
    "Share of the words that are one token (with the space in front of them)."
    vocabulary_used: float
    "Share of the ids, special tokens aside, that occur."
    renyi_efficiency: float
    "How evenly the tokens spread over these ids (``count_renyi_efficiency``)."
    parallel_documents: int = 0
    "Documents that the reference language has too."
    premium: float | None = None
    "Tokens of these documents over those that the reference language needs for them; None without any."


class Tally:
    """Counts the tokens that a tokenizer makes of one language."""

    def __init__(self, tokenizer: LoadedTokenizer) -> None:
        """Begin at zero."""
        self._tokenizer = tokenizer
        self._documents = self._bytes = self._characters = 0
        self._words: Counter[str] = Counter()
        self._frequency_V = np.zeros(tokenizer.vocab_size, np.int64)

    def add(self, texts: list[str]) -> list[int]:
        """Count the texts; return the tokens of each."""
        encoded = self._tokenizer.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ids = np.fromiter(chain.from_iterable(item.ids for item in encoded), np.int64)
        self._frequency_V += np.bincount(ids, minlength=len(self._frequency_V))
        self._documents += len(texts)
        for text in texts:
            self._bytes += len(text.encode())
            self._characters += len(text)
            self._words.update(text.split())
        return [len(item) for item in encoded]

    def describe(self) -> TokenizerFigures:
        """Return the figures of the texts so far; no words or tokens give zeros."""
        tokens, words = int(self._frequency_V.sum()), self._words.total()
        added = self._tokenizer.tokenizer.get_added_tokens_decoder()
        plain_V = np.delete(self._frequency_V, [index for index, token in added.items() if token.special])
        return TokenizerFigures(
            documents=self._documents,
            bytes=self._bytes,
            characters=self._characters,
            words=words,
            tokens=tokens,
            tokens_per_word=tokens / max(1, words),
            tokens_per_character=tokens / max(1, self._characters),
            tokens_per_byte=tokens / max(1, self._bytes),
            bytes_per_token=self._bytes / max(1, tokens),
            single_token_words=_count_single(self._tokenizer, self._words) / max(1, words),
            vocabulary_used=int(np.count_nonzero(plain_V)) / max(1, len(plain_V)),
            renyi_efficiency=count_renyi_efficiency(plain_V),
        )


def measure(tokenizer: LoadedTokenizer, texts: Iterable[str]) -> TokenizerFigures:
    """Measure a tokenizer on texts."""
    tally = Tally(tokenizer)
    for batch in take_batches(texts):
        tally.add(batch)
    return tally.describe()


def take_batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yield the texts in lists that are encoded together."""
    reader = iter(texts)
    while batch := list(islice(reader, _BATCH_TEXTS)):
        yield batch


def _count_single(tokenizer: LoadedTokenizer, words: Mapping[str, int]) -> int:
    # SentencePiece puts the space in front by itself.
    before = " " if tokenizer.kind == "byte_level" else ""
    found = 0
    for batch in take_batches(words):
        encoded = tokenizer.tokenizer.encode_batch_fast([before + word for word in batch], add_special_tokens=False)
        found += sum(words[word] for word, item in zip(batch, encoded, strict=True) if len(item) == 1)
    return found


def count_renyi_efficiency(frequency_V: npt.NDArray[np.int64]) -> float:
    """Return the Rényi efficiency of a token distribution: 1 if all ids are equally frequent, 0 if only one occurs.

    ``H_a(p) / log |V|`` with ``H_a(p) = log(sum_v p_v^a) / (1 - a)`` and ``a = RENYI_ALPHA``, where ``p_v`` is the
    share of the tokens that are ``v`` (Zouhar et al. 2023).

    Args:
        frequency_V: how often each id of the vocabulary occurs; those that do not occur count in ``|V|``.
    """
    total = frequency_V.sum()
    if not total or len(frequency_V) < 2:
        return 0.0
    power_sum = float(((frequency_V / total) ** RENYI_ALPHA).sum())
    return math.log(power_sum) / (1 - RENYI_ALPHA) / math.log(len(frequency_V))
