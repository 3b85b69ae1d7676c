"""Vectors of the tokens of two tokenizers, by which old and new ones are compared.

A token is compared by its text. Byte pieces, special tokens and pieces that are no whole characters have none
(``donor.list_surfaces``), and so no vector. Where they come from, by the settings:

- ``vectors``: a file of word vectors for both languages (``word_vectors``).
- ``vectors`` and ``base_vectors``: one file for each language. The old one's space is rotated onto the new one's by the
  pairs of ``dictionary`` that both files know, as vectors of length 1.
- ``encoder``: a text encoder (``encoder``).
- none of these: trained on the words of the corpus, n-grams of 1 to 5 characters included (``train_vectors``). A text
  takes the mean of its n-grams that occur in the corpus; without any it has no vector.

A token that begins a word has its text with a space before it. Only an encoder sees the space; word vectors take the
text without, so that the two kinds of token with one text are the same to them.

1. ``plan_vectors`` checks the settings and files.
2. What it returns reads, aligns, encodes or trains, once.

Costs: those of the source; memory of a vector in fp32 for each token.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import regex
import torch

from megatron_adapt.corpus.documents import read_texts
from megatron_adapt.errors import DataError
from megatron_adapt.logs import show_progress
from megatron_adapt.tokenizer.words import Reading
from megatron_adapt.vocab.donor import list_surfaces
from megatron_adapt.vocab.encoder import check_encoder, encode_by_mean
from megatron_adapt.vocab.neighbours import normalize_rows
from megatron_adapt.vocab.rows import FillSources
from megatron_adapt.vocab.train_vectors import Training, load_gensim, train_vectors
from megatron_adapt.vocab.word_vectors import (
    fit_rotation,
    is_fasttext_binary,
    list_variants,
    read_dictionary,
    read_word_vectors,
)

_logger = logging.getLogger(__name__)
SENTENCE_WORDS = 1000
"gensim leaves out what stands behind the 10,000th word of a sentence."
_WORD = regex.compile(r"[\w\p{M}]+|[^\w\p{M}\s]+")
_TRAINING = Training(epochs=5, min_count=5, negative=5, shortest=1, longest=5)

Embed = Callable[[list[str], list[str]], tuple[torch.Tensor, torch.Tensor]]
"Returns vectors of old and new token texts, zeros for those that have none; a space may stand before a text."


@dataclass(frozen=True)
class TokenVectors:
    """Vectors of some tokens."""

    ids: np.ndarray
    "Ascending: [n], int64."
    rows: torch.Tensor
    "Of length 1: [n, columns], fp32."


def plan_vectors(sources: FillSources) -> Callable[[], tuple[TokenVectors, TokenVectors]]:
    """Return a function that makes the vectors of the old tokens and of the new ones.

    Raises:
        ConfigError: the model came without its tokenizer, the encoder is not there, or gensim is not installed.
        DataError: a file is missing or of no known form; later, it is damaged, nothing fits the dictionary, or no old
            or no new token has a vector.
    """
    settings = sources.settings
    own, made = sources.require_own(), sources.require_made()
    if settings.encoder is not None:
        embed = _plan_encoder(settings.encoder)
    elif settings.vectors is not None:
        embed = _plan_files(sources)
    else:
        embed = _plan_training(sources)
    olds = sorted((old, form) for form, old in list_surfaces(own).items())
    news = sorted((new, form) for form, new in list_surfaces(made).items() if new in sources.id_map.pieces)

    def make_vectors() -> tuple[TokenVectors, TokenVectors]:
        texts = tuple([" " * begins + text for _, (begins, text) in some] for some in (olds, news))
        found = [
            _keep(np.array([index for index, _ in some], np.int64), rows)
            for some, rows in zip((olds, news), embed(*texts), strict=True)
        ]
        num_olds, num_news = (len(item.ids) for item in found)
        counts = f"{num_olds} of {own.vocab_size} old and {num_news} of {len(sources.id_map.pieces)} new tokens"
        if not num_olds or not num_news:
            raise DataError(
                f"vocab.method: {settings.method} finds vectors for {counts}, so there is nothing to compare; name "
                "vectors or a corpus of both languages, or use --method subtoken_mean"
            )
        _logger.info("%s: %s have a vector of %d columns", settings.method, counts, found[0].rows.shape[1])
        return found[0], found[1]

    return make_vectors


def _keep(ids: np.ndarray, rows: torch.Tensor) -> TokenVectors:
    numbers, units = normalize_rows(rows)
    return TokenVectors(ids[numbers], units)


def _plan_encoder(name: str) -> Embed:
    check_encoder(name)

    def embed(olds: list[str], news: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = encode_by_mean(name, [*olds, *news])
        # A text of white space alone is none.
        rows[[at for at, text in enumerate([*olds, *news]) if not text.strip()]] = 0
        return rows[: len(olds)], rows[len(olds) :]

    return embed


def _plan_files(sources: FillSources) -> Embed:
    settings = sources.settings
    path, base_path = settings.vectors, settings.base_vectors
    assert path is not None
    for file in (path, base_path):
        if file is not None and is_fasttext_binary(file):
            load_gensim(f"reading {file}")
    if base_path is None or settings.dictionary is None:

        def embed(olds: list[str], news: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
            rows = read_word_vectors(path, [text.strip() for text in [*olds, *news]]).rows
            return rows[: len(olds)], rows[len(olds) :]

        return embed
    translations, dictionary = read_dictionary(settings.dictionary), settings.dictionary

    def embed_aligned(olds: list[str], news: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        pairs = list_variants(translations)
        ours = read_word_vectors(base_path, [text.strip() for text in olds], {left for left, _ in pairs})
        theirs = read_word_vectors(path, [text.strip() for text in news], {right for _, right in pairs})
        widths = ours.rows.shape[1], theirs.rows.shape[1]
        if widths[0] != widths[1]:
            raise DataError(
                f"{base_path}: vectors of {widths[0]} columns, and {path} has {widths[1]}; name two files of one width"
            )
        known = [
            (left, right)
            for left, right in pairs
            if left in ours.words and right in theirs.words and ours.words[left].any() and theirs.words[right].any()
        ]
        if not known:
            raise DataError(
                f"{dictionary}: none of its {len(translations)} pairs is known to both files ({len(ours.words)} words "
                f"to {base_path}, {len(theirs.words)} to {path}); is the old language on the left?"
            )
        report = _logger.info if len(known) >= widths[0] else _logger.warning
        report("%s: %d pairs fix a rotation of %d columns", dictionary, len(known), widths[0])
        left = normalize_rows(torch.from_numpy(np.stack([ours.words[word] for word, _ in known])))[1]
        right = normalize_rows(torch.from_numpy(np.stack([theirs.words[word] for _, word in known])))[1]
        return ours.rows @ fit_rotation(left, right).float(), theirs.rows

    return embed_aligned


def _plan_training(sources: FillSources) -> Embed:
    settings = sources.settings
    load_gensim(f"{settings.method} without vectors or encoder")
    check_corpus(sources)

    def read_sentences() -> Iterator[list[str]]:
        texts = read_texts(sources.corpus, sources.text_key)
        with show_progress("training vectors on the corpus", None, "MB") as advance:
            for batch in Reading().batch(texts, advance):
                for text in batch:
                    yield from divide_sentence(_WORD.findall(text))

    def embed(olds: list[str], news: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        vectors = train_vectors(read_sentences, _TRAINING, settings)
        if not len(vectors):
            raise DataError(
                f"corpus: no word occurs {_TRAINING.min_count} times in it; name more text, or use --method "
                "subtoken_mean"
            )
        found = np.zeros((len(olds) + len(news), settings.vector_size), np.float32)
        for at, text in enumerate(text.strip() for text in [*olds, *news]):
            if text:
                found[at] = vectors.get_vector(text)
        rows = torch.from_numpy(found)
        return rows[: len(olds)], rows[len(olds) :]

    return embed


def check_corpus(sources: FillSources) -> None:
    """Look whether the corpus has a text.

    Raises:
        DataError: the first file is missing, damaged, or without the key of the text.
    """
    if next(read_texts(sources.corpus, sources.text_key), None) is None:
        raise DataError(f"corpus: no documents in {', '.join(map(str, sources.corpus))}; name some in the new language")


def divide_sentence(words: list[str]) -> Iterator[list[str]]:
    """Yield words in runs that gensim reads to the end."""
    rest = iter(words)
    while run := list(islice(rest, SENTENCE_WORDS)):
        yield run
