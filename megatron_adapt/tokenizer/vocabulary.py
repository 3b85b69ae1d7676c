"""A new vocabulary around the special tokens and bytes of a base: which learned pieces it takes, and its files.

Ids: the base's fixed tokens (``renumber.list_fixed``) that stood at the start, the 256 bytes, the pieces in the order
learned, the other fixed tokens. BPE merges are all splits of every piece, in the order of the pieces, so that
``tokenizers`` and SentencePiece cut alike.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import orjson
from tokenizers import Tokenizer, models

from megatron_adapt.errors import DataError
from megatron_adapt.tokenizer.frequency import count_builds, count_uses
from megatron_adapt.tokenizer.model_proto import (
    BYTE,
    CONTROL,
    MODEL_TYPES,
    UNKNOWN,
    USER_DEFINED,
    Piece,
    PieceModel,
    list_merges,
    make_algorithm,
    read_model,
    replace_pieces,
)
from megatron_adapt.tokenizer.pieces import (
    MODEL_FILE,
    SPACE,
    LoadedTokenizer,
    byte_letters,
    from_letters,
    read_content,
    to_byte_piece,
)
from megatron_adapt.tokenizer.renumber import list_fixed, write_renumbered

# Pieces of the base may be taken whatever the filters say. Plain byte-level BPE builds characters from any of their
# parts, also where a beginning would do.
_NOT_REFUSED = (None, "old piece", "part of a character")


class Vocabulary:
    """Pieces around what stays of a base."""

    def __init__(self, base: LoadedTokenizer) -> None:
        """Take what stays of the base.

        Raises:
            DataError: a SentencePiece base has no token for what is unknown.
        """
        self.scores: dict[str, float] = {}
        "The pieces chosen, in the order of their ids, with their scores."
        self.reasons: Counter[str] = Counter()
        "What became of the candidates."
        self._base = base
        fixed, ids = list_fixed(base), base.tokenizer.get_vocab(with_added_tokens=True)
        self._front = [text for at, text in enumerate(fixed) if ids[text] == at]
        self._back = fixed[len(self._front) :]
        spelled = [to_byte_piece(byte) for byte in range(256)]
        if base.kind == "byte_level":
            spelled = sorted(byte_letters().values(), key=ids.__getitem__)
        self._bytes = spelled
        self.num_fixed = len(fixed) + len(self._bytes)
        "How many ids are no learned pieces."
        self._settings = read_content(base)["model"]
        self._unknown = self._settings.get("unk_token") or "<unk>"
        if base.kind == "sentencepiece" and self._unknown not in fixed:
            raise DataError(
                f"{base.folder}: no token for the unknown ({self._unknown}), which a {MODEL_FILE} needs; add one"
            )
        self._template: PieceModel | None = None

    def choose(
        self,
        scores: Mapping[str, float],
        template: PieceModel | None,
        *,
        refuse: Callable[[bytes], str | None],
        counts: Mapping[str, int],
        min_frequency: int,
        num_pieces: int,
    ) -> None:
        """Choose the pieces.

        Args:
            scores: the candidates with their scores, in the order learned: parts before what BPE makes of them, or by
                falling score.
            template: the SentencePiece model they are from.
            refuse: says why a piece, as bytes spelled as the base spells them, may not be taken.
            counts: words with their frequency.
            min_frequency: pieces seen less often are not taken.
            num_pieces: how many to take.
        """
        self._template = template
        spell = from_letters if self._base.kind == "byte_level" else str.encode
        taken = {*self._front, *self._bytes, *self._back}
        refused = {piece: "added token" if piece in taken else refuse(spell(piece)) for piece in scores}
        left = {piece: score for piece, score in scores.items() if refused[piece] in _NOT_REFUSED}
        # None of the pieces dropped from here on is a part of one that is kept, or makes it come out otherwise.
        bare = Tokenizer(self._make(left)[0])
        items = bare.encode_batch_fast(list(left))
        unreachable = {piece for piece, item in zip(left, items, strict=True) if len(item.ids) != 1}
        if self._base.kind == "sentencepiece":
            # SentencePiece and tokenizers do not agree on what a missing character costs a Unigram.
            unreachable |= {piece for piece in left if not left.keys() >= {*piece}}
        frequency = _count_uses(bare, counts)
        # A Unigram needs all characters of its pieces; SentencePiece's trainer left the rarest out.
        is_unigram = isinstance(bare.model, models.Unigram)
        rare = {piece for piece in left if frequency[piece] < min_frequency and not (is_unigram and len(piece) == 1)}
        useful = [piece for piece in left if piece not in unreachable | rare]
        is_late = self._base.kind == "sentencepiece"  # its trainer lists characters behind the merges
        chosen = {*sorted(useful, key=lambda piece: is_late and len(piece) > 1)[:num_pieces]}
        self.scores = {piece: left[piece] for piece in useful if piece in chosen}
        reasons = Counter(reason for reason in refused.values() if reason not in _NOT_REFUSED)
        reasons.update({"accepted": len(chosen), "rare": len(rare - unreachable), "unreachable": len(unreachable)})
        reasons["beyond the size"] = len(useful) - len(chosen)
        self.reasons = +reasons

    def write(self, folder: Path) -> None:
        """Write the tokenizer files to an existing folder.

        Raises:
            DataError: a piece chosen is unreachable.
        """
        algorithm, pieces = self._make(self.scores)
        bare = Tokenizer(algorithm)
        items = bare.encode_batch_fast(list(self.scores))
        lost = [piece for piece, item in zip(self.scores, items, strict=True) if item.ids != [bare.token_to_id(piece)]]
        if lost:
            raise DataError(
                f"{folder}: {len(lost)} pieces are unreachable, such as {lost[0]!r}; this should not happen, please "
                "report the base and the corpora"
            )
        model: dict[str, Any] = orjson.loads(bare.to_str())["model"]
        if model["type"] == "BPE":
            old = self._settings["merges"]
            is_joined = bool(old) and isinstance(old[0], str)
            merges = [" ".join(pair) for pair in model["merges"]] if is_joined else model["merges"]
            model = {**self._settings, "vocab": model["vocab"], "merges": merges}
        write_renumbered(self._base, model, pieces, folder)

    def _make(self, scores: Mapping[str, float]) -> tuple[models.BPE | models.Unigram, PieceModel | None]:
        if self._base.kind == "byte_level":
            texts = [*self._front, *self._bytes, *scores, *self._back]
            ids = {text: index for index, text in enumerate(texts)}
            mergeable = {text: ids[text] for text in (*self._bytes, *scores)}
            return models.BPE(ids, list_merges(list(scores), mergeable)), None
        pieces = [
            *self._list_fixed(self._front),
            *(Piece(text, 0.0, BYTE) for text in self._bytes),
            *(Piece(text, score) for text, score in scores.items()),
            *self._list_fixed(self._back),
        ]
        model = self._make_model(pieces)
        return make_algorithm(model), model

    def _list_fixed(self, texts: Iterable[str]) -> list[Piece]:
        added = {token.content: token for token in self._base.tokenizer.get_added_tokens_decoder().values()}
        return [
            Piece(
                text,
                0.0,
                UNKNOWN
                if text == self._unknown
                else USER_DEFINED
                if text in added and not added[text].special
                else CONTROL,
            )
            for text in texts
        ]

    def _make_model(self, pieces: list[Piece]) -> PieceModel:
        assert self._template is not None
        model_type = MODEL_TYPES[self._template.algorithm]
        if (self._base.folder / MODEL_FILE).is_file():
            return replace_pieces(read_model(self._base.folder / MODEL_FILE), pieces, model_type=model_type)
        starts_with_space = self._base.tokenizer.encode("a", add_special_tokens=False).tokens[0].startswith(SPACE)
        return replace_pieces(self._template, pieces, add_dummy_prefix=int(starts_with_space))


def _count_uses(bare: Tokenizer, counts: Mapping[str, int]) -> Counter[str]:
    """Count how often BPE builds each piece, parts of others included, or a Unigram chooses it."""
    if isinstance(bare.model, models.BPE):
        return count_builds(bare, counts)
    return Counter({bare.id_to_token(index) or "": count for index, count in count_uses(bare, counts).items()})
