"""Method ``focus``: convex combination of the rows of tokens that stay, by vectors of the new language alone.

FOCUS (Dobler and de Melo 2023, arXiv 2305.14481).

1. ``_train`` cuts the corpus by the new tokenizer and trains fastText on its tokens: continuous bag of words, 3 epochs,
   10 negatives, tokens that occur 10 times. A token is known by its text and whether a space goes before it, so that
   the tokenizer's family does not matter; byte pieces, parts of characters and special tokens are passed over.
2. The anchors are the tokens that stay and have a vector: those that the new tokenizer still makes of the new language.
3. A new token with a vector takes the sparsemax of its cosines with all anchors (``neighbours``).

A new token without a vector has no row by this method and takes the mean of its old pieces, as with every method here;
the authors' deepfocus draws it from the normal distribution of each column.
Costs: the training and the cutting of the corpus for each of its four readings, once for all matrices, like the
sparsemax; the rows as in ``mixtures``.
"""

import logging
from collections.abc import Iterator
from functools import cache

import numpy as np
import torch

from megatron_adapt.corpus.documents import read_texts
from megatron_adapt.errors import DataError
from megatron_adapt.logs import show_progress
from megatron_adapt.tokenizer.pieces import LoadedTokenizer
from megatron_adapt.tokenizer.words import Reading
from megatron_adapt.vocab.donor import list_surfaces
from megatron_adapt.vocab.mixtures import Mixtures, combine_mixtures
from megatron_adapt.vocab.neighbours import normalize_rows, weigh_by_sparsemax
from megatron_adapt.vocab.rows import BaseRows, Fill, FillSources
from megatron_adapt.vocab.train_vectors import Training, load_gensim, train_vectors
from megatron_adapt.vocab.vectors import TokenVectors, check_corpus, divide_sentence

_logger = logging.getLogger(__name__)
_TRAINING = Training(epochs=3, min_count=10, negative=10, shortest=3, longest=6)


def plan_focus(sources: FillSources) -> Fill:
    """Give each token the sparsemax combination of the rows of tokens that stay.

    Raises:
        ConfigError: gensim is not installed.
        DataError: the corpus is damaged; later, no token that stays, or no new one, occurs often enough in it.
    """
    load_gensim("focus")
    check_corpus(sources)
    id_map, made = sources.id_map, sources.require_made()
    ids = list(id_map.pieces)

    @cache
    def weigh() -> Mixtures:
        found = _train(sources, made)
        is_new = np.isin(found.ids, ids)
        anchors, news = found.ids[~is_new], found.ids[is_new]
        counts = (
            f"{len(anchors)} of {made.vocab_size - len(ids)} tokens that stay and {len(news)} of {len(ids)} new ones"
        )
        if not len(anchors) or not len(news):
            raise DataError(
                f"corpus: {counts} occur {_TRAINING.min_count} times as {made.folder} cuts it, so focus has nothing to "
                "compare; name more text, or use --method subtoken_mean"
            )
        mixtures = weigh_by_sparsemax(found.rows[is_new], found.rows[~is_new])
        spread = np.median(mixtures.lengths)
        _logger.info("focus: %s have a vector; a new one combines %d in the median", counts, spread)
        olds = np.array([id_map.old_id(index) for index in anchors.tolist()])
        return mixtures.rename(olds).spread(np.searchsorted(ids, news), len(ids))

    def fill(base: BaseRows) -> Iterator[tuple[list[int], torch.Tensor]]:
        yield from combine_mixtures(base, ids, weigh())

    return fill


def _train(sources: FillSources, made: LoadedTokenizer) -> TokenVectors:
    """Return vectors of the tokens that occur often enough in the corpus."""
    settings = sources.settings
    # U+2581 stands for a space, as gensim's n-grams would end at none.
    names = {index: "\u2581" * begins + text for (begins, text), index in list_surfaces(made).items()}

    def read_sentences() -> Iterator[list[str]]:
        texts = read_texts(sources.corpus, sources.text_key)
        with show_progress("training vectors on the tokens of the corpus", None, "MB") as advance:
            for batch in Reading().batch(texts, advance):
                for item in made.tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                    yield from divide_sentence([names[index] for index in item.ids if index in names])

    vectors = train_vectors(read_sentences, _TRAINING, settings)
    known = sorted(index for index, name in names.items() if name in vectors.key_to_index)
    if not known:
        return TokenVectors(np.zeros(0, np.int64), torch.zeros(0, settings.vector_size))
    rows = torch.from_numpy(np.stack([vectors.get_vector(names[index]) for index in known]))
    numbers, units = normalize_rows(rows)
    return TokenVectors(np.array(known, np.int64)[numbers], units)
