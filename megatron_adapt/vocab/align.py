"""Method ``align``: old pieces seen under each new token where both tokenizers cut the same text.

A token spelt alone may be cut otherwise than inside a text. Here both tokenizers cut a corpus, and each place where a
new token stands votes for the old pieces that overlap it: the row is the mean over places of the mean over pieces
(Yamaguchi et al. 2024, arXiv 2406.11477).

1. ``count_segments`` encodes batches of texts with both and counts the old pieces under every new token. Positions are
   bytes of the text as the tokenizers see it; a text that the two normalise differently is left out, with the number.
2. ``weigh_segments`` turns counts into one weight for each old piece.

Costs: both encodings of the corpus and the count, 1.5 to 2 MB of text a second on one core, once for all matrices;
memory of the distinct segments.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from megatron_adapt.corpus.documents import read_texts
from megatron_adapt.errors import DataError
from megatron_adapt.logs import show_progress
from megatron_adapt.tokenizer.pieces import LoadedTokenizer, piece_bytes
from megatron_adapt.tokenizer.words import Reading
from megatron_adapt.vocab.rows import BaseRows, Fill, FillSources, combine_rows

_logger = logging.getLogger(__name__)
Segments = dict[int, Counter[tuple[int, ...]]]


def plan_align(sources: FillSources) -> Fill:
    """Give each token the mean of the rows of the old pieces seen under it in the corpus.

    Raises:
        ConfigError: the model came without its tokenizer.
        DataError: the corpus cannot be read, or no text of it is the same for both tokenizers.
    """
    texts = read_texts(sources.corpus, sources.text_key)
    segments = count_segments(sources.require_own(), sources.require_made(), set(sources.id_map.pieces), texts)
    found = {new: weigh_segments(segments[new]) if new in segments else {} for new in sources.id_map.pieces}
    olds = {new: list(weights) for new, weights in found.items()}
    weights = {new: list(weights.values()) for new, weights in found.items()}

    def fill(base: BaseRows) -> Iterator[tuple[list[int], torch.Tensor]]:
        yield from combine_rows(base, olds, weights)

    return fill


def count_segments(own: LoadedTokenizer, made: LoadedTokenizer, new_ids: set[int], texts: Iterable[str]) -> Segments:
    """Count the runs of old pieces that overlap new tokens in texts.

    Args:
        own: the old tokenizer.
        made: the new one.
        new_ids: its ids to look for.
        texts: documents; read once.

    Returns:
        For every new id seen: how often each run of old ids lies under it.

    Raises:
        DataError: there are no texts, or the two tokenizers see every one differently.
    """
    old_bytes, new_bytes = piece_bytes(own), piece_bytes(made)
    is_wanted = np.array([index in new_ids and bool(data) for index, data in enumerate(new_bytes)])
    segments: Segments = {}
    reading, num_differing = Reading(), 0
    with show_progress("aligning tokenizers on the corpus", None, "MB") as advance:
        for batch in reading.batch(texts, advance):
            cut = (item.tokenizer.encode_batch_fast(batch, add_special_tokens=False) for item in (own, made))
            for old, new in zip(*cut, strict=True):
                if b"".join(map(old_bytes.__getitem__, old.ids)) != b"".join(map(new_bytes.__getitem__, new.ids)):
                    num_differing += 1
                    continue
                _count_text(old.ids, new.ids, old_bytes, new_bytes, is_wanted, segments)
    if num_differing == reading.num_texts:
        raise DataError(
            f"corpus: none of its {reading.num_texts} texts is the same for {own.folder} and {made.folder}; name "
            "documents in the new language, or use --method subtoken_mean"
        )
    if num_differing:
        _logger.warning("align: %d of %d texts left out, normalised differently", num_differing, reading.num_texts)
    return segments


def _count_text(
    old_ids: list[int],
    new_ids: list[int],
    old_bytes: list[bytes],
    new_bytes: list[bytes],
    is_wanted: np.ndarray,
    segments: Segments,
) -> None:
    wanted = np.flatnonzero(is_wanted[np.array(new_ids, np.int64)])
    if not len(wanted):
        return
    olds = [index for index in old_ids if old_bytes[index]]  # special tokens lie under nothing
    ends = np.cumsum([len(old_bytes[index]) for index in olds])
    new_ends = np.cumsum([len(new_bytes[index]) for index in new_ids])[wanted]
    new_starts = new_ends - [len(new_bytes[new_ids[at]]) for at in wanted]
    firsts = np.searchsorted(ends, new_starts, side="right").tolist()
    lasts = np.searchsorted(ends, new_ends, side="left").tolist()
    for at, first, last in zip(wanted.tolist(), firsts, lasts, strict=True):
        segments.setdefault(new_ids[at], Counter())[tuple(olds[first : last + 1])] += 1


def weigh_segments(counts: Counter[tuple[int, ...]]) -> dict[int, float]:
    """Return the weight of each old id: its share of every run, weighted by how often the run occurs; they sum to 1."""
    weights: dict[int, float] = {}
    total = counts.total()
    for run, count in counts.items():
        for old in run:
            weights[old] = weights.get(old, 0.0) + count / (total * len(run))
    return weights
