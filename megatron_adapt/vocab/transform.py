"""Method ``linear_transform``: rows of a donor through the linear map that takes those of shared tokens to the base's.

The embedding space transformation of Bilingual Adaptation (Gosal et al. 2024, arXiv 2407.12869); with a tokenizer that
``build_tokenizer --method transplant --adopt`` made, Linearized Embedding Transfer.

1. ``find_overlap`` opens the donor and compares tokens by their surface form.
2. ``weigh_anchors`` counts shared tokens in the corpus, once, if ``anchor_weights`` is ``frequency``.
3. ``fit_map`` fits a map for each matrix on its own rows; a new token that the donor has takes the mapped donor row.

Costs: those of ``linear``; for weights one encoding of the corpus.
"""

import logging
from collections.abc import Iterator
from functools import cache
from itertools import chain

import numpy as np
import torch

from megatron_adapt.corpus.documents import read_texts
from megatron_adapt.errors import DataError
from megatron_adapt.logs import show_progress
from megatron_adapt.tokenizer.words import Reading
from megatron_adapt.vocab.census import count_tokens
from megatron_adapt.vocab.donor import Overlap, find_overlap
from megatron_adapt.vocab.linear import fit_map
from megatron_adapt.vocab.rows import BaseRows, Fill, FillSources, name_matrix

_logger = logging.getLogger(__name__)


def plan_linear_transform(sources: FillSources) -> Fill:
    """Give each token that the donor has its mapped row.

    Raises:
        CheckpointError: the donor is incomplete, does not fit its tokenizer, or shares next to nothing with the base.
        ConfigError: the model came without its tokenizer.
        DataError: the donor's tokenizer is of a kind this package does not know, or the corpus is empty or damaged.
    """
    settings, overlap = sources.settings, find_overlap(sources)
    is_weighted = settings.anchor_weights == "frequency"
    if is_weighted and next(read_texts(sources.corpus, sources.text_key), None) is None:
        raise DataError("corpus: no text in it to count shared tokens in; name documents in the new language")

    @cache
    def weigh() -> np.ndarray | None:
        return weigh_anchors(sources, overlap) if is_weighted else None

    def fill(base: BaseRows) -> Iterator[tuple[list[int], torch.Tensor]]:
        linear = fit_map(
            overlap.read_anchors(base),
            overlap.num_anchors,
            estimator=settings.estimator,
            seed=settings.seed,
            where=f"{name_matrix(base)} from {settings.donor}",
            weights=weigh(),
        )
        yield from overlap.fill_found(base, linear.apply)

    return fill


def weigh_anchors(sources: FillSources, overlap: Overlap) -> np.ndarray:
    """Return the weights of the anchors: [C], the root of 1 + how often each occurs in the corpus.

    The counts of Zipf's law themselves would leave the fit to a few dozen tokens, far fewer than columns; their roots
    still count as many as 40 % of the anchors would. The 1 keeps the anchors that the corpus lacks, or the new
    tokenizer never cuts: fewer of them may not determine the map.

    Raises:
        DataError: the corpus cannot be read.
    """
    made = sources.require_made()
    with show_progress("counting shared tokens in the corpus", None, "MB") as advance:
        batches = Reading().batch(read_texts(sources.corpus, sources.text_key), advance)
        frequency_V = count_tokens(made, chain.from_iterable(batches))
    counted_C = np.append(frequency_V, 0)[overlap.anchors[:, 2]]  # the last is that of no id
    _logger.info("%d of %d shared tokens occur in the corpus", np.count_nonzero(counted_C), overlap.num_anchors)
    weights_C: np.ndarray = np.sqrt(1.0 + counted_C)
    return weights_C
