"""Method ``continue``: learn pieces of a new language on top of the frozen merges of the base.

1. ``count_words`` finds the words of the corpus, ``segment_words`` cuts them by the base merges.
2. ``learn_pieces`` runs BPE over those sequences; ``Acceptance`` filters the candidates.
3. ``write_reachable`` appends the pieces and learns again without those that the files cannot reach.

Source: ruadapt's continued BPE (Tikhomirov and Chernyshev 2024, arXiv:2412.21140), made exact for SentencePiece.
"""

import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from megatron_adapt.config import BuildTokenizer, TokenizerSettings
from megatron_adapt.corpus.documents import read_texts
from megatron_adapt.logs import show_progress
from megatron_adapt.tokenizer.accept import make_acceptance
from megatron_adapt.tokenizer.append import write_extended
from megatron_adapt.tokenizer.check import find_unreachable
from megatron_adapt.tokenizer.filters import make_filter
from megatron_adapt.tokenizer.made import Made, count_pieces, refuse_empty, warn_few
from megatron_adapt.tokenizer.merges import learn_merges
from megatron_adapt.tokenizer.pieces import LoadedTokenizer, read_tokenizer
from megatron_adapt.tokenizer.words import count_words, segment_words

_logger = logging.getLogger(__name__)


def make_continued(base: LoadedTokenizer, config: BuildTokenizer, folder: Path) -> Made:
    """Write ``base`` extended by pieces learned from ``config.corpus`` to ``folder``.

    Raises:
        ConfigError: a script is unknown.
        DataError: the corpus gives no piece.
    """
    settings = config.settings
    allowed = make_filter(settings.scripts)
    num_asked = count_pieces(settings, base.vocab_size, base.vocab_size)
    words = count_words(base, read_texts(config.corpus, config.text_key), allowed, settings.segmenter)
    reasons: Counter[str] = Counter()

    def learn(banned: frozenset[bytes]) -> list[bytes]:
        learned, found = learn_pieces(base, words.counts, num_asked, settings, banned)
        reasons.clear()
        reasons.update(found)
        return [piece for piece, _ in learned]

    spelled = write_reachable(base, learn, folder)
    if not spelled:
        raise refuse_empty(words.num_texts, settings, reasons)
    warn_few("corpus", len(spelled), num_asked, settings)
    return Made(
        keeps_ids=True,
        num_asked=num_asked,
        reasons=reasons,
        sample=words.sample,
        num_texts=words.num_texts,
        num_bytes=words.num_bytes,
    )


def write_reachable(
    base: LoadedTokenizer, choose: Callable[[frozenset[bytes]], list[bytes]], folder: Path
) -> list[str]:
    """Append pieces to ``base`` so that the written files reach every one of them.

    Args:
        base: the tokenizer to extend.
        choose: gives the pieces, in the order of their ids, without those it is told not to choose.
        folder: an existing folder.

    Returns:
        The pieces as the files spell them; none if ``choose`` gave none.
    """
    banned: frozenset[bytes] = frozenset()
    while pieces := choose(banned):
        spelled = write_extended(base, pieces, folder)
        # A piece may be cut otherwise by the files than it was learned: where a new piece completes an old one that the
        # base could not spell, SentencePiece prefers the old one, and a longer new piece around it cannot come out.
        unreachable = find_unreachable(read_tokenizer(folder), spelled)
        if not unreachable:
            return spelled
        _logger.info("%d pieces came out unreachable; choosing again without them", len(unreachable))
        banned |= {piece for piece, text in zip(pieces, spelled, strict=True) if text in unreachable}
    return []


def learn_pieces(
    base: LoadedTokenizer,
    counts: Counter[str],
    num_pieces: int,
    settings: TokenizerSettings,
    banned: frozenset[bytes] = frozenset(),
) -> tuple[list[tuple[bytes, int]], Counter[str]]:
    """Learn new pieces over words cut by the base.

    Args:
        base: the frozen tokenizer.
        counts: words of the corpus, spelled as the base spells pieces, with their frequency.
        num_pieces: how many to learn.
        settings: scripts and minimum frequency.
        banned: pieces never to learn.

    Returns:
        Pieces with their frequency in the order learned, and what became of the candidates.
    """
    accept = make_acceptance(base, counts, make_filter(settings.scripts), banned)
    words = segment_words(base, counts)
    with show_progress("learning pieces", num_pieces, "pieces") as advance:

        def accept_and_show(piece: bytes) -> bool:
            accepted = accept(piece)
            if accepted:
                advance()
            return accepted

        learned = learn_merges(words, num_pieces, settings.min_frequency, accept_and_show)
    return learned, accept.reasons
