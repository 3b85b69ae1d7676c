"""Method ``optimize``: drop the base's least used pieces, then continue on the rest.

The scenario Optimization of LEP (Tikhomirov and Chernyshev 2024, arXiv:2412.21140): of Llama 3's 128,000 pieces the
64,000 most used stay, and 64,000 are learned.

1. ``rank_pieces`` counts the base's pieces on both languages, in the shares asked for (``mix``): a piece counts
   wherever the base's merges build it, also inside longer tokens. So its parts rank before it, and a vocabulary that
   ends anywhere in the ranking builds every piece in it, merge by merge as the base did.
2. ``reduce_tokenizer`` writes the base with the pieces of the ranking's front, ids closed up in the old order. Special
   and added tokens, bytes, and characters that the text or a kept piece holds stay; so does every score.
3. ``make_continued`` learns ``size`` pieces on top of that. One that was dropped may come back, with its old row.

Costs: those of ``continue`` and encoding the text once.
"""

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from megatron_adapt.config import BuildTokenizer
from megatron_adapt.errors import DataError
from megatron_adapt.logs import show_progress
from megatron_adapt.tokenizer.check import find_unreachable
from megatron_adapt.tokenizer.extend import make_continued
from megatron_adapt.tokenizer.frequency import count_builds
from megatron_adapt.tokenizer.made import Made, count_pieces
from megatron_adapt.tokenizer.mix import read_mix
from megatron_adapt.tokenizer.model_proto import UNKNOWN, PieceModel, read_model, replace_pieces
from megatron_adapt.tokenizer.pieces import (
    MODEL_FILE,
    LoadedTokenizer,
    byte_letters,
    read_content,
    read_tokenizer,
    split_merges,
    to_byte_piece,
)
from megatron_adapt.tokenizer.renumber import list_fixed, write_renumbered
from megatron_adapt.tokenizer.words import Reading, strip_tokenizer

_logger = logging.getLogger(__name__)


def make_optimized(base: LoadedTokenizer, config: BuildTokenizer, folder: Path) -> Made:
    """Write ``base`` without its least used pieces, and with pieces learned from ``config.corpus``, to ``folder``.

    Raises:
        ConfigError: there is no old corpus, or a script is unknown.
        DataError: the corpora give no piece.
    """
    settings = config.settings
    learned = _list_learned(base)
    builds, sample = rank_pieces(base, learned, config)
    long = [piece for piece in builds if len(piece) > 1]
    num_long = sum(len(piece) > 1 for piece in learned)
    # ``sorted`` leaves equals in the order of the merges.
    kept = sorted(long, key=lambda piece: -builds[piece])[: round(settings.kept_share * num_long)]
    letters = {letter for piece in kept for letter in piece}
    kept += [piece for piece in builds if len(piece) == 1 and (builds[piece] or piece in letters)]
    with TemporaryDirectory(prefix="optimize-") as name:
        reduce_tokenizer(base, kept, Path(name))
        reduced = read_tokenizer(Path(name))
        lost = find_unreachable(reduced, kept)
        if lost:
            raise DataError(
                f"{base.folder}: {len(lost)} kept pieces such as {min(lost)!r} cannot be built any more; this should "
                "not happen, please report the base and the corpora"
            )
        _logger.info(
            "%s: kept %s of %s learned pieces, %s of them single characters",
            base.folder,
            *(f"{count:,}" for count in (len(kept), len(learned), sum(len(piece) == 1 for piece in kept))),
        )
        size = count_pieces(settings, base.vocab_size, kept=reduced.vocab_size)
        enlarged = replace(settings, size=str(size), size_multiple=1)
        made = make_continued(reduced, replace(config, settings=enlarged), folder)
    dropped = {"base piece dropped": len(builds) - len(kept), "base piece unreachable": len(learned) - len(builds)}
    return replace(
        made,
        keeps_ids=False,
        reasons=made.reasons + Counter({"base piece kept": len(kept), **dropped}),
        sample=[*made.sample, *sample],
    )


def _list_learned(base: LoadedTokenizer) -> list[str]:
    """List the pieces of the base that it learned: neither special nor added tokens nor bytes."""
    bytes_ = byte_letters().values() if base.kind == "byte_level" else map(to_byte_piece, range(256))
    others = {*list_fixed(base), *bytes_}
    vocab = base.tokenizer.get_vocab(with_added_tokens=True)
    return [piece for piece in sorted(vocab, key=vocab.__getitem__) if piece not in others]


def rank_pieces(base: LoadedTokenizer, learned: list[str], config: BuildTokenizer) -> tuple[Counter[str], list[str]]:
    """Count how often the base builds each of its pieces on the mix of both corpora.

    Returns:
        Frequency of every piece that its merges can build at all, single characters first, then in the order of the
        merges; and texts of the mix.

    Raises:
        ConfigError: there is no old corpus.
        DataError: a corpus is damaged or empty.
    """
    uses: Counter[int] = Counter()
    reading = Reading()
    with show_progress("counting the base's pieces", None, "MB") as advance:
        for batch in reading.batch(read_mix(config), advance):
            for item in base.tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                uses.update(item.ids)
    vocab = base.tokenizer.get_vocab(with_added_tokens=True)
    bare = strip_tokenizer(base)
    # A piece that occurs nowhere is ranked too, behind its parts.
    builds = count_builds(bare, {piece: uses[vocab[piece]] for piece in learned})
    reachable = {*learned} - find_unreachable(base, learned)
    return Counter({piece: count for piece, count in builds.items() if piece in reachable}), reading.sample


def reduce_tokenizer(base: LoadedTokenizer, kept: Iterable[str], folder: Path) -> None:
    """Write ``base`` with ``kept`` alone of its learned pieces, every id the next free one in the old order.

    Args:
        base: the tokenizer.
        kept: pieces to keep, with all parts that their merges need.
        folder: an existing folder.
    """
    dropped = {*_list_learned(base)}.difference(kept)
    vocab = base.tokenizer.get_vocab(with_added_tokens=True)
    old_ids = {index for piece, index in vocab.items() if piece not in dropped}
    pieces: PieceModel | None = None
    if base.kind == "sentencepiece" and (base.folder / MODEL_FILE).is_file():
        model = read_model(base.folder / MODEL_FILE)
        # SentencePiece needs it, also where tokenizer.json does without.
        old_ids |= {index for index, piece in enumerate(model.pieces) if piece.kind == UNKNOWN}
        pieces = replace_pieces(model, [piece for index, piece in enumerate(model.pieces) if index in old_ids])
    new_ids = {old: new for new, old in enumerate(sorted(old_ids))}
    content = read_content(base)["model"]
    merges = [
        merge
        for merge, (left, right) in zip(content["merges"], split_merges(content["merges"]), strict=True)
        if not dropped.intersection((left, right, left + right))
    ]
    reduced = {piece: new_ids[index] for piece, index in vocab.items() if piece not in dropped}
    write_renumbered(base, {**content, "vocab": reduced, "merges": merges}, pieces, folder)
