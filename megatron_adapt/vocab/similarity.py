"""Method ``similarity_topk``: weighted mean of the rows of the old tokens whose texts are most similar.

The similarity search of Bilingual Adaptation (Gosal et al. 2024, arXiv 2407.12869), with k and temperature of WECHSEL
(Minixhofer et al. 2022, arXiv 2112.06598).

1. ``vectors`` gives vectors of old and new tokens.
2. ``find_nearest`` finds the ``num_neighbors`` old tokens with the largest cosines (``neighbours``).
3. Each weighs the softmax of its cosine over ``temperature``; input and head take the same weights.

A new token without a vector has no row by this method.
Costs: those of the vectors and of ``neighbours``, once for all matrices; the rows as in ``mixtures``.
"""

from collections.abc import Iterator
from functools import cache

import numpy as np
import torch

from megatron_adapt.vocab.mixtures import Mixtures, combine_mixtures
from megatron_adapt.vocab.neighbours import find_nearest, weigh_by_softmax
from megatron_adapt.vocab.rows import BaseRows, Fill, FillSources
from megatron_adapt.vocab.vectors import plan_vectors


def plan_similarity_topk(sources: FillSources) -> Fill:
    """Give each token the mean of the rows of its nearest old tokens.

    Raises:
        ConfigError: what makes the vectors is not there.
        DataError: the files of vectors or the corpus are damaged; later, nothing can be compared.
    """
    settings = sources.settings
    make_vectors = plan_vectors(sources)
    ids = list(sources.id_map.pieces)

    @cache
    def weigh() -> Mixtures:
        olds, news = make_vectors()
        cosines, numbers = find_nearest(news.rows, olds.rows, settings.num_neighbors)
        weights = weigh_by_softmax(cosines, settings.temperature)
        lengths = np.full(len(news.ids), numbers.shape[1])
        mixtures = Mixtures.of(lengths, numbers.flatten().numpy(), weights.flatten().numpy()).rename(olds.ids)
        return mixtures.spread(np.searchsorted(ids, news.ids), len(ids))

    def fill(base: BaseRows) -> Iterator[tuple[list[int], torch.Tensor]]:
        yield from combine_mixtures(base, ids, weigh())

    return fill
