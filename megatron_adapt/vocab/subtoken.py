"""Methods ``subtoken_mean`` and ``subtoken_weighted``: rows of the old pieces that spelt the token before it was one.

- ``subtoken_mean``: their mean (as in Swallow, Fujii et al. 2024, arXiv 2404.17790). A piece that occurs twice counts
  twice.
- ``subtoken_weighted`` by ``length``: each piece weighs its bytes. By ``position``: the k-th of n pieces weighs k in
  the input matrix and n + 1 - k in the head. A model that reads the pieces knows the word at the last one, and one
  that is about to write it chooses the first (mergekit's tokensurgeon means the same).
"""

from collections.abc import Iterator

import torch

from megatron_adapt.tokenizer.pieces import piece_bytes
from megatron_adapt.vocab.rows import BaseRows, Fill, FillSources, combine_rows


def plan_subtoken_mean(sources: FillSources) -> Fill:
    """Give each token the mean of the rows of its old pieces."""

    def fill(base: BaseRows) -> Iterator[tuple[list[int], torch.Tensor]]:
        yield from combine_rows(base, sources.id_map.pieces)

    return fill


def plan_subtoken_weighted(sources: FillSources) -> Fill:
    """Give each token the weighted mean of the rows of its old pieces.

    Raises:
        ConfigError: the model came without its tokenizer, so the length of its pieces is not known.
    """
    pieces = sources.id_map.pieces
    if sources.settings.piece_weights == "position":

        def fill_by_position(base: BaseRows) -> Iterator[tuple[list[int], torch.Tensor]]:
            step = -1 if base.is_head else 1
            weights = {new: _share(range(1, len(olds) + 1)[::step]) for new, olds in pieces.items()}
            yield from combine_rows(base, pieces, weights)

        return fill_by_position

    lengths = [len(data) for data in piece_bytes(sources.require_own())]
    weights = {new: _share([lengths[old] for old in olds]) for new, olds in pieces.items()}

    def fill_by_length(base: BaseRows) -> Iterator[tuple[list[int], torch.Tensor]]:
        yield from combine_rows(base, pieces, weights)

    return fill_by_length


def _share(parts: range | list[int]) -> list[float]:
    total = sum(parts)
    return [part / total if total else 1 / len(parts) for part in parts]
