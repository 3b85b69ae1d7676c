"""Prove on the written files what a made tokenizer guarantees.

1. ``check_old_ids``: every id of the base has the same piece, every added token the same properties; or, where ids may
   move, ``check_special_tokens``: every special token of the base is there.
2. ``find_unreachable``: new pieces that do not encode to their own id.
3. ``check_round_trip``: text that the base gives back unchanged is given back unchanged.
4. ``check_model``: ``tokenizer.json`` and ``tokenizer.model`` give the same ids wherever those of the base do.
"""

from typing import Any

import sentencepiece

from megatron_adapt.errors import DataError
from megatron_adapt.tokenizer.id_map import IdMap
from megatron_adapt.tokenizer.made import Made
from megatron_adapt.tokenizer.pieces import MODEL_FILE, LoadedTokenizer
from megatron_adapt.tokenizer.words import strip_tokenizer

_DEFECT = "the output was not written; this should not happen, please report the base and the text"


def check_made(base: LoadedTokenizer, after: LoadedTokenizer, id_map: IdMap, made: Made) -> dict[str, Any]:
    """Check every guarantee.

    Args:
        base: the tokenizer that was changed.
        after: the new tokenizer as read back from its files.
        id_map: which ids are new.
        made: what the method promises, and texts to encode.

    Returns:
        What was checked, and tokens per byte of the sample before and after.

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
    if unreachable:
        raise DataError(f"{after.folder}: {len(unreachable)} pieces are unreachable; {_DEFECT}")
    before, now = _encode(base, made.sample), _encode(after, made.sample)
    check_round_trip(base, after, made.sample, before, now)
    size = max(1, sum(len(text.encode()) for text in made.sample))
    return {
        "checked_texts": len(made.sample),
        "checked_against_model": check_model(base, after, made.sample, before, now) if made.is_safe else 0,
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
    """Refuse an extension that loses text the base keeps.

    Raises:
        DataError: naming the text.
    """
    old = base.tokenizer.decode_batch(before, skip_special_tokens=False)
    new = made.tokenizer.decode_batch(after, skip_special_tokens=False)
    for text, by_old, by_new in zip(texts, old, new, strict=True):
        if by_new != by_old:
            raise DataError(f"{made.folder}: {text[:60]!r}... is decoded otherwise than before; {_DEFECT}")


def check_model(
    base: LoadedTokenizer,
    made: LoadedTokenizer,
    texts: list[str],
    before: list[list[int]],
    after: list[list[int]],
) -> int:
    """Refuse an extension whose ``tokenizer.model`` disagrees with its ``tokenizer.json`` where the base's agreed.

    Returns:
        How many texts were compared; 0 without a ``tokenizer.model``.

    Raises:
        DataError: naming the text.
    """
    if not (made.folder / MODEL_FILE).is_file():
        return 0
    old, new = (
        sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.folder / MODEL_FILE)).encode(texts)
        for tokenizer in (base, made)
    )
    compared = 0
    for at, text in enumerate(texts):
        if old[at] == before[at]:
            compared += 1
            if new[at] != after[at]:
                raise DataError(f"{made.folder}: {text[:60]!r}... has other ids by {MODEL_FILE}; {_DEFECT}")
    return compared
