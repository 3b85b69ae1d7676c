"""Prove on the written files what a made tokenizer guarantees.

1. ``check_old_ids``: every id of the base has the same piece, every added token the same properties; or, where ids may
   move, ``check_special_tokens``: every special token of the base is there.
2. ``find_unreachable``: new pieces that do not encode to their own id.
3. ``check_round_trip``: text that the base gives back unchanged is given back unchanged.
4. ``compare_model``: ``tokenizer.json`` and ``tokenizer.model`` give the same ids wherever those of the base do.

A method whose files cannot agree says so (``Made.is_safe``): then reachability and agreement are measured instead.
"""

import logging
from typing import Any

import sentencepiece

from megatron_adapt.errors import DataError
from megatron_adapt.tokenizer.id_map import IdMap
from megatron_adapt.tokenizer.made import Made
from megatron_adapt.tokenizer.pieces import JSON_FILE, MODEL_FILE, SPACE, LoadedTokenizer
from megatron_adapt.tokenizer.words import strip_tokenizer

_logger = logging.getLogger(__name__)
_DEFECT = "the output was not written; this should not happen, please report the base and the text"


def check_made(base: LoadedTokenizer, after: LoadedTokenizer, id_map: IdMap, made: Made) -> dict[str, Any]:
    """Check every guarantee.

    Args:
        base: the tokenizer that was changed.
        after: the new tokenizer as read back from its files.
        id_map: which ids are new.
        made: what the method promises, and texts to encode.

    Returns:
        What was checked, and tokens per byte of the sample before and after; where the files cannot agree, also how
        many texts they cut alike and how many new pieces neither reaches.

    Raises:
        DataError: a guarantee does not hold.
    """
    if made.keeps_ids:
        check_old_ids(base, after)
    else:
        check_special_tokens(base, after)
    vocab, added = after.tokenizer.get_vocab(with_added_tokens=True), after.tokenizer.get_added_tokens_decoder()
    new = [piece for piece, index in vocab.items() if index in id_map.pieces and index not in added]
    unreachable = find_unreachable(after, new)
    if unreachable and made.is_safe:
        raise DataError(f"{after.folder}: {len(unreachable)} pieces are unreachable; {_DEFECT}")
    before, now = _encode(base, made.sample), _encode(after, made.sample)
    check_round_trip(base, after, made.sample, before, now)
    size = max(1, sum(len(text.encode()) for text in made.sample))
    compared, differing = compare_model(base, after, made.sample, before, now)
    measured = {} if made.is_safe else _measure_unsafe(after, new, unreachable, compared, differing)
    if differing and made.is_safe:
        raise DataError(f"{after.folder}: {differing[0][:60]!r}... has other ids by {MODEL_FILE}; {_DEFECT}")
    return {
        "checked_texts": len(made.sample),
        "checked_against_model": compared,
        **measured,
        "base_tokens_per_byte": sum(map(len, before)) / size,
        "tokens_per_byte": sum(map(len, now)) / size,
    }


def _encode(tokenizer: LoadedTokenizer, texts: list[str]) -> list[list[int]]:
    return [item.ids for item in tokenizer.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def check_old_ids(base: LoadedTokenizer, made: LoadedTokenizer) -> None:
    """Refuse an extension that moves an old id or changes an added token.

    Raises:
        DataError: naming the first id that changed.
    """
    found = made.tokenizer.get_vocab(with_added_tokens=True)
    for piece, index in base.tokenizer.get_vocab(with_added_tokens=True).items():
        if found.get(piece) != index:
            raise DataError(f"{made.folder}: id {index} of {piece!r} became {found.get(piece)}; {_DEFECT}")
    added = made.tokenizer.get_added_tokens_decoder()
    for index, token in base.tokenizer.get_added_tokens_decoder().items():
        if added.get(index) != token:
            raise DataError(f"{made.folder}: added token {index} {token!r} became {added.get(index)!r}; {_DEFECT}")


def check_special_tokens(base: LoadedTokenizer, made: LoadedTokenizer) -> None:
    """Refuse a tokenizer that lost a special token of its base.

    Raises:
        DataError: naming the token.
    """
    found = {token.content for token in made.tokenizer.get_added_tokens_decoder().values() if token.special}
    for token in base.tokenizer.get_added_tokens_decoder().values():
        if token.special and token.content not in found:
            raise DataError(f"{made.folder}: special token {token.content!r} is gone; {_DEFECT}")


def find_unreachable(made: LoadedTokenizer, pieces: list[str]) -> set[str]:
    """Return those of ``pieces`` that the merges do not encode to their own id."""
    bare = strip_tokenizer(made)
    vocab = made.tokenizer.get_vocab(with_added_tokens=True)
    encoded = bare.encode_batch_fast(pieces)
    return {piece for piece, item in zip(pieces, encoded, strict=True) if item.ids != [vocab[piece]]}


def check_round_trip(
    base: LoadedTokenizer,
    made: LoadedTokenizer,
    texts: list[str],
    before: list[list[int]],
    after: list[list[int]],
) -> None:
    """Refuse an extension that loses text the base keeps; a space for U+2581 is SentencePiece's way.

    Raises:
        DataError: naming the text.
    """
    old = base.tokenizer.decode_batch(before, skip_special_tokens=False)
    new = made.tokenizer.decode_batch(after, skip_special_tokens=False)
    for text, by_old, by_new in zip(texts, old, new, strict=True):
        if by_new not in (by_old, text.replace(SPACE, " ") if made.kind == "sentencepiece" else text):
            raise DataError(f"{made.folder}: {text[:60]!r}... is decoded otherwise than before; {_DEFECT}")


def compare_model(
    base: LoadedTokenizer,
    made: LoadedTokenizer,
    texts: list[str],
    before: list[list[int]],
    after: list[list[int]],
) -> tuple[int, list[str]]:
    """Compare ``tokenizer.model`` with ``tokenizer.json`` on the texts where those of the base agree.

    Returns:
        How many texts were compared, none without a ``tokenizer.model``, and those with other ids.
    """
    if not (made.folder / MODEL_FILE).is_file():
        return 0, []
    new = _read_model_ids(made, texts)
    has_model = base.kind == made.kind and (base.folder / MODEL_FILE).is_file()
    old = _read_model_ids(base, texts) if has_model else before
    compared = [at for at in range(len(texts)) if old[at] == before[at]]
    return len(compared), [texts[at] for at in compared if new[at] != after[at]]


def _read_model_ids(tokenizer: LoadedTokenizer, texts: list[str]) -> list[list[int]]:
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.folder / MODEL_FILE))
    ids: list[list[int]] = model.encode(texts)
    return ids


def _measure_unsafe(
    made: LoadedTokenizer, new: list[str], unreachable: set[str], compared: int, differing: list[str]
) -> dict[str, int]:
    lost = 0
    if (made.folder / MODEL_FILE).is_file():
        # Behind a line end no space is put in front of a piece.
        before, *ids = _read_model_ids(made, ["\n", *(f"\n{piece}" for piece in new)])
        lost = sum(found != [*before, made.tokenizer.token_to_id(piece)] for piece, found in zip(new, ids, strict=True))
    if differing or unreachable or lost:
        _logger.warning(
            "%d of %d new pieces are unreachable by %s, %d by %s, and they cut %d of %d texts differently; let every "
            "reader use the same one",
            len(unreachable),
            len(new),
            JSON_FILE,
            lost,
            MODEL_FILE,
            len(differing),
            compared,
        )
    return {
        "differing_from_model": len(differing),
        "unreachable_by_json": len(unreachable),
        "unreachable_by_model": lost,
    }
