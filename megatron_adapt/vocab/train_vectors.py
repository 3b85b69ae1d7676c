"""fastText vectors trained on a corpus: continuous bag of words over words and their n-grams, by gensim.

Guarantees: the same sentences and settings give the same vectors: one thread trains, from a seed.
Costs: one thread's time; memory of vectors for 262,144 n-grams, and of three for each word that occurs often enough.
Source: Bojanowski et al. 2017 (arXiv 1607.04606).
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from megatron_adapt.config import VocabSettings
from megatron_adapt.errors import ConfigError

NUM_BUCKETS = 1 << 18
"N-grams share this many vectors by their hash."
_MOST_WORDS = 500_000


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a method trains its vectors."""

    epochs: int
    min_count: int
    "Words that occur less often are left out."
    negative: int
    "Words drawn against each one seen."
    shortest: int
    "Characters of an n-gram."
    longest: int


@dataclass(frozen=True)
class _Sentences:
    read: Callable[[], Iterator[list[str]]]

    def __iter__(self) -> Iterator[list[str]]:
        return self.read()


def load_gensim(what: str) -> ModuleType:
    """Import gensim's fastText.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        from gensim.models import fasttext
    except ImportError:
        raise ConfigError(
            f"vocab.method: {what} needs gensim, which is not installed; install the extra: pip install "
            "'megatron-adapt[vectors]'"
        ) from None
    # It warns of corpora that are small.
    logging.getLogger("gensim").setLevel(logging.ERROR)
    found: ModuleType = fasttext
    return found


def train_vectors(
    read_sentences: Callable[[], Iterator[list[str]]], training: Training, settings: VocabSettings
) -> Any:
    """Train vectors.

    Args:
        read_sentences: begins to read the sentences, in words; is called once for each epoch and once before.
        training: how the method trains.
        settings: give the columns and the seed.

    Returns:
        gensim's ``FastTextKeyedVectors``, empty if no word occurs often enough. The vectors of n-grams that occur in no
        word of it are zero; as gensim leaves them they are noise.

    Raises:
        ConfigError: gensim is not installed.
    """
    model = load_gensim("training vectors").FastText(
        vector_size=settings.vector_size,
        min_count=training.min_count,
        negative=training.negative,
        epochs=training.epochs,
        min_n=training.shortest,
        max_n=training.longest,
        bucket=NUM_BUCKETS,
        max_final_vocab=_MOST_WORDS,
        seed=settings.seed,
        workers=1,
        sg=0,
    )
    sentences = _Sentences(read_sentences)
    model.build_vocab(sentences)
    if len(model.wv):
        model.train(sentences, total_examples=model.corpus_count, epochs=training.epochs)
        is_trained = np.zeros(NUM_BUCKETS, bool)
        is_trained[np.concatenate(model.wv.buckets_word).astype(np.int64)] = True
        model.wv.vectors_ngrams[~is_trained] = 0
    return model.wv
