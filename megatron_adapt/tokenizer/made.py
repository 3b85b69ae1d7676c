"""What a method of ``build`` gives back, and what the methods share: the size asked for, a corpus too small for it."""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_adapt.config import TokenizerSettings
from megatron_adapt.errors import DataError

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Made:
    """What a method did, beside the tokenizer files it wrote."""

    keeps_ids: bool
    "Whether the method promises that no old id moves."
    is_safe: bool = True
    """Whether it promises that tokenizer.json and tokenizer.model agree and reach every new piece; some of the papers'
    scores, and another model's whole tokenizer, cannot."""
    num_asked: int
    "Pieces it was asked for."
    reasons: Counter[str]
    "What became of the candidates."
    sample: list[str]
    "Texts of the corpus to check the result on."
    num_texts: int
    num_bytes: int


def count_pieces(settings: TokenizerSettings, base_vocab_size: int, kept: int) -> int:
    """Return how many pieces to add to ``kept`` ids.

    ``size`` is a number (``"2000"``) or a share of the base (``"extend25"``: a quarter of it); ``size_multiple`` rounds
    the whole vocabulary up.
    """
    asked = int(settings.size.removeprefix("extend"))
    if settings.size.startswith("extend"):
        asked = max(1, base_vocab_size * asked // 100)
    return asked + -(kept + asked) % settings.size_multiple


def refuse_empty(num_texts: int, settings: TokenizerSettings, reasons: Mapping[str, int]) -> DataError:
    """Return the error for a corpus that gives no piece."""
    wanted = f" in {' '.join(settings.scripts)}" if settings.scripts else ""
    return DataError(
        f"--corpus: {num_texts} documents hold no new piece{wanted} {settings.min_frequency} times "
        f"({list_counts(reasons) or 'no such text'}); check the corpus, the scripts and min_frequency"
    )


def warn_few(source: str, found: int, asked: int, settings: TokenizerSettings) -> None:
    """Log a warning where the source of the pieces, ``corpus`` or ``donor``, gave fewer than asked."""
    if found < asked:
        _logger.warning(
            "the %s gives %s pieces, not %s; add text or lower tokenizer.min_frequency (%d)",
            source,
            f"{found:,}",
            f"{asked:,}",
            settings.min_frequency,
        )


def list_counts(reasons: Mapping[str, int]) -> str:
    """Return ``"12 old piece, 3 script"``."""
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items()))
