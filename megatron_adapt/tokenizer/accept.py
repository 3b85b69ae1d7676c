"""Decides, candidate by candidate, what becomes a piece.

A candidate is a run of tokens that stand side by side in some word. BPE cuts such a run alone exactly as it cuts it
there (Berglund and van der Merwe 2023, arXiv:2309.08715), so nothing about merges need be asked here; the one
exception is found on the finished files (``extend.write_reachable``).
"""

import re
from collections import Counter
from collections.abc import Iterable

from megatron_adapt.tokenizer.filters import PieceFilter, find_prefixes
from megatron_adapt.tokenizer.pieces import SPACE, LoadedTokenizer, from_letters, piece_bytes


def make_acceptance(
    base: LoadedTokenizer, words: Iterable[str], allowed: PieceFilter, banned: frozenset[bytes]
) -> "Acceptance":
    """Return the acceptance of pieces made for words.

    Args:
        base: the tokenizer to extend.
        words: words of the corpus, spelled as the base spells pieces.
        allowed: filter for complete pieces.
        banned: pieces to refuse.
    """
    prefixes: frozenset[bytes] = frozenset()
    if base.kind == "byte_level":
        letters = {letter for word in words for letter in from_letters(word).decode(errors="ignore")}
        prefixes = find_prefixes((letter for letter in letters if allowed.character.fullmatch(letter)), allowed)
    return Acceptance(base, allowed, prefixes, banned)


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
        self._added = _find_added(base)
        self._allowed, self._prefixes, self._banned = allowed, prefixes, banned
        spell = from_letters if self._is_letters else str.encode
        # The bytes that SentencePiece falls back to stand for characters too.
        self._old = {*map(spell, base.tokenizer.get_vocab(with_added_tokens=True)), *piece_bytes(base)}

    def __call__(self, piece: bytes) -> bool:
        """Return whether ``piece`` is accepted."""
        reason = self.refuse(piece)
        self.reasons[reason or "accepted"] += 1
        return reason is None

    def refuse(self, piece: bytes) -> str | None:
        """Return why ``piece`` is refused, or None; count nothing."""
        if piece in self._old:
            return "old piece"
        if piece in self._banned:
            return "unreachable"
        try:
            text = piece.decode()
        except UnicodeDecodeError:
            # A byte-level base builds a character of several bytes from its beginnings; nothing else is cut inside.
            return None if self._is_letters and piece in self._prefixes else "part of a character"
        if self._added.search(text.replace(SPACE, " ")):
            return "cut by an added token"
        if self._pre_tokenizer and len(self._pre_tokenizer.pre_tokenize_str(text)) != 1:
            return "cut by the pre-tokenizer"
        return self._allowed.refuse(text if self._is_letters else text.replace(SPACE, " ", 1))


def _find_added(base: LoadedTokenizer) -> re.Pattern[str]:
    """Return the expression that finds the added tokens that are cut out of words."""
    added = base.tokenizer.get_added_tokens_decoder().values()
    texts = [token.content.replace(SPACE, " ") for token in added]
    return re.compile("|".join(map(re.escape, texts)) or r"(?!)")
