"""Decides, candidate by candidate, what becomes a piece.

A candidate is a run of tokens that stand side by side in some word. BPE cuts such a run alone exactly as it cuts it
there (Berglund and van der Merwe 2023, arXiv:2309.08715), so nothing about merges need be asked here; the one
exception is found on the finished files (``extend._learn_reachable``).
"""

from collections import Counter

from megatron_adapt.tokenizer.filters import PieceFilter
from megatron_adapt.tokenizer.pieces import SPACE, LoadedTokenizer, from_letters


class Acceptance:
    """Says yes or no to candidates, given as bytes, and counts its reasons."""

    def __init__(
        self, base: LoadedTokenizer, allowed: PieceFilter, prefixes: frozenset[bytes], banned: frozenset[bytes]
    ) -> None:
        """Take the base and the filters.

        Args:
            base: the tokenizer to extend; its pieces are refused.
            allowed: filter for complete pieces.
            prefixes: beginnings of characters that a byte-level piece may be.
            banned: pieces to refuse whatever they look like.
        """
        self.reasons: Counter[str] = Counter()
        self._is_letters = base.kind == "byte_level"
        self._pre_tokenizer = base.tokenizer.pre_tokenizer
        self._allowed, self._prefixes, self._banned = allowed, prefixes, banned
        spell = from_letters if self._is_letters else str.encode
        self._old = {spell(piece) for piece in base.tokenizer.get_vocab(with_added_tokens=True)}

    def __call__(self, piece: bytes) -> bool:
        """Return whether ``piece`` is accepted."""
        reason = self._refuse(piece)
        self.reasons[reason or "accepted"] += 1
        return reason is None

    def _refuse(self, piece: bytes) -> str | None:
        if piece in self._old:
            return "old piece"
        if piece in self._banned:
            return "unreachable"
        try:
            text = piece.decode()
        except UnicodeDecodeError:
            # A byte-level base builds a character of several bytes from its beginnings; nothing else is cut inside.
            return None if self._is_letters and piece in self._prefixes else "part of a character"
        if self._is_letters and len(self._pre_tokenizer.pre_tokenize_str(text)) != 1:
            return "cut by the pre-tokenizer"
        return self._allowed.refuse(text if self._is_letters else text.replace(SPACE, " ", 1))
