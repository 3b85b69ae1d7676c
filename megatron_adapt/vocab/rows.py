"""What the methods that fill new rows are given, and the weighted mean of old rows that most of them come down to."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice
from pathlib import Path
from typing import Protocol

import torch

from megatron_adapt.config import ResizeVocab, VocabSettings
from megatron_adapt.errors import ConfigError
from megatron_adapt.tokenizer.id_map import IdMap
from megatron_adapt.tokenizer.pieces import LoadedTokenizer

CHUNK_ROWS = 2048
"Rows that are computed, or read in fp64, at a time."


class BaseRows(Protocol):
    """The old rows of one matrix, [V, H] in the type of the model."""

    @property
    def num_rows(self) -> int:
        """V, the old vocabulary."""

    @property
    def is_head(self) -> bool:
        """Whether this is an output head of its own; a tied matrix counts as input."""

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return the rows [start, stop): [stop - start, H]."""

    def gather(self, ids: Sequence[int]) -> torch.Tensor:
        """Return the rows of ``ids``, in that order: [len(ids), H]."""

    def mean(self) -> torch.Tensor:
        """Return the mean of all rows: [H], fp64."""


Fill = Callable[[BaseRows], Iterator[tuple[list[int], torch.Tensor]]]
"""Computes the new rows of one matrix: yields n new ids in ascending order and their rows [n, H] in fp32."""


@dataclass(frozen=True, kw_only=True)
class FillSources:
    """What a method may read besides the old rows."""

    id_map: IdMap
    settings: VocabSettings = field(default_factory=VocabSettings)
    own: LoadedTokenizer | None = None
    "The tokenizer that travels with the model."
    made: LoadedTokenizer | None = None
    "The new tokenizer."
    corpus: tuple[Path, ...] = ()
    "Documents in the new language."
    text_key: str = "text"

    @classmethod
    def of(
        cls, config: ResizeVocab, *, own: LoadedTokenizer | None, made: LoadedTokenizer, id_map: IdMap
    ) -> "FillSources":
        """Return the sources of a resize."""
        return cls(
            id_map=id_map, settings=config.settings, own=own, made=made, corpus=config.corpus, text_key=config.text_key
        )

    def require_own(self) -> LoadedTokenizer:
        """Return the model's own tokenizer.

        Raises:
            ConfigError: it has none.
        """
        if self.own is None:
            raise ConfigError(
                f"vocab.method: {self.settings.method} reads the model's own tokenizer, and none travels with it; put "
                "it into the model's folder"
            )
        return self.own

    def require_made(self) -> LoadedTokenizer:
        """Return the new tokenizer."""
        assert self.made is not None
        return self.made


def name_matrix(base: BaseRows) -> str:
    """Return what messages call a matrix."""
    return "output head" if base.is_head else "input matrix"


def divide_ids(ids: Iterable[int]) -> Iterator[list[int]]:
    """Yield ids in chunks."""
    rest = iter(ids)
    while chunk := list(islice(rest, CHUNK_ROWS)):
        yield chunk


def read_blocks(base: BaseRows) -> Iterator[torch.Tensor]:
    """Yield all old rows that are finite, in blocks [n, H] of fp64."""
    for start in range(0, base.num_rows, CHUNK_ROWS):
        rows_NH = base.read(start, min(start + CHUNK_ROWS, base.num_rows)).double()
        is_finite_N = rows_NH.isfinite().all(-1)
        yield rows_NH if is_finite_N.all() else rows_NH[is_finite_N]


def combine_rows(
    base: BaseRows, olds: Mapping[int, Sequence[int]], weights: Mapping[int, Sequence[float]] | None = None
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Yield the weighted mean of old rows for each new id, accumulated in fp32.

    Args:
        base: the old rows.
        olds: the old ids of each new id; one that occurs twice counts twice. None at all give a row of zeros.
        weights: their weights, which sum to 1; without them all weigh the same.

    Yields:
        n ids and their rows [n, H] in fp32; every id comes exactly once, in order.
    """
    for ids in divide_ids(olds):
        shares = None if weights is None else [weights[new] for new in ids]
        yield ids, _combine_chunk(base, [olds[new] for new in ids], shares)


def _combine_chunk(
    base: BaseRows, olds: Sequence[Sequence[int]], weights: Sequence[Sequence[float]] | None
) -> torch.Tensor:
    # Of its own, so that the old rows are gone before the new ones are used.
    flat = [old for some in olds for old in some]
    used = sorted(set(flat))
    position = {old: at for at, old in enumerate(used)}
    ends = list(accumulate(map(len, olds)))
    offsets = torch.tensor([0, *ends[:-1]])
    index = torch.tensor([position[old] for old in flat], dtype=torch.long)
    gathered_VH = base.gather(used or [0]).float()  # a row at least says how wide they are
    if weights is None:
        return torch.nn.functional.embedding_bag(index, gathered_VH, offsets, mode="mean")
    each = torch.tensor([weight for some in weights for weight in some], dtype=torch.float32)
    return torch.nn.functional.embedding_bag(index, gathered_VH, offsets, mode="sum", per_sample_weights=each)
