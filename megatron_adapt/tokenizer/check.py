"""Prove on the written files what an extended tokenizer guarantees.

1. ``check_old_ids``: every id of the base has the same piece, every added token the same properties.
2. ``find_unreachable``: new pieces that do not encode to their own id.
3. ``check_round_trip``: text that the base gives back unchanged is given back unchanged.
4. ``check_model``: ``tokenizer.json`` and ``tokenizer.model`` give the same ids wherever those of the base do.
"""

from typing import Any

import sentencepiece

from megatron_adapt.errors import DataError
from megatron_adapt.tokenizer.pieces import MODEL_FILE, LoadedTokenizer
from megatron_adapt.tokenizer.words import strip_tokenizer

_DEFECT = "the output was not written; this should not happen, please report the base and the text"


def check_extension(
    base: LoadedTokenizer, extended: LoadedTokenizer, pieces: list[str], sample: list[str]
) -> dict[str, Any]:
    """Check every guarantee.

    Args:
        base: the tokenizer that was extended.
        extended: the tokenizer as read back from its files.
        pieces: the new pieces as the files spell them, in the order of their ids.
        sample: texts to encode.

    Returns:
        What was checked, and tokens per byte of the sample before and after.

    Raises:
        DataError: a guarantee does not hold.
    """
    check_old_ids(base, extended)
    unreachable = find_unreachable(extended, pieces)
    if unreachable:
        raise DataError(f"{extended.folder}: {len(unreachable)} pieces are unreachable; {_DEFECT}")
    before, after = _encode(base, sample), _encode(extended, sample)
    check_round_trip(base, extended, sample, before, after)
    size = max(1, sum(len(text.encode()) for text in sample))
    return {
        "checked_texts": len(sample),
        "checked_against_model": check_model(base, extended, sample, before, after),
        "base_tokens_per_byte": sum(map(len, before)) / size,
        "tokens_per_byte": sum(map(len, after)) / size,
    }


def _encode(tokenizer: LoadedTokenizer, texts: list[str]) -> list[list[int]]:
    return [item.ids for item in tokenizer.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def check_old_ids(base: LoadedTokenizer, extended: LoadedTokenizer) -> None:
    """Refuse an extension that moves an old id or changes an added token.

    Raises:
        DataError: naming the first id that changed.
    """
    found = extended.tokenizer.get_vocab(with_added_tokens=True)
    for piece, index in base.tokenizer.get_vocab(with_added_tokens=True).items():
        if found.get(piece) != index:
            raise DataError(f"{extended.folder}: id {index} of {piece!r} became {found.get(piece)}; {_DEFECT}")
    added = extended.tokenizer.get_added_tokens_decoder()
    for index, token in base.tokenizer.get_added_tokens_decoder().items():
        if added.get(index) != token:
            raise DataError(f"{extended.folder}: added token {index} {token!r} became {added.get(index)!r}; {_DEFECT}")


def find_unreachable(extended: LoadedTokenizer, pieces: list[str]) -> set[str]:
    """Return the new pieces that the merges do not encode to their own id."""
    bare = strip_tokenizer(extended)
    first = extended.vocab_size - len(pieces)
    encoded = bare.encode_batch_fast(pieces)
    return {piece for at, piece in enumerate(pieces) if encoded[at].ids != [first + at]}


def check_round_trip(
    base: LoadedTokenizer,
    extended: LoadedTokenizer,
    texts: list[str],
    before: list[list[int]],
    after: list[list[int]],
) -> None:
    """Refuse an extension that loses text the base keeps.

    Raises:
        DataError: naming the text.
    """
    old = base.tokenizer.decode_batch(before, skip_special_tokens=False)
    new = extended.tokenizer.decode_batch(after, skip_special_tokens=False)
    for text, by_old, by_new in zip(texts, old, new, strict=True):
        if by_new != by_old:
            raise DataError(f"{extended.folder}: {text[:60]!r}... is decoded otherwise than before; {_DEFECT}")


def check_model(
    base: LoadedTokenizer,
    extended: LoadedTokenizer,
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
    if not (extended.folder / MODEL_FILE).is_file():
        return 0
    old, new = (
        sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.folder / MODEL_FILE)).encode(texts)
        for tokenizer in (base, extended)
    )
    compared = 0
    for at, text in enumerate(texts):
        if old[at] == before[at]:
            compared += 1
            if new[at] != after[at]:
                raise DataError(f"{extended.folder}: {text[:60]!r}... has other ids by {MODEL_FILE}; {_DEFECT}")
    return compared
