"""Refuse a base tokenizer whose files contradict one another, before anything is built on it.

Each reader of a folder trusts other files: ``tokenizers`` reads ``tokenizer.json``, SentencePiece ``tokenizer.model``;
transformers adds the special tokens that only a settings file names behind the highest id, which is where new pieces
go. What one of them would number otherwise after an extension is refused here.

1. ``_check_bytes``: every byte has a piece, so that no text is lost.
2. ``_check_tokens``: the tokens that settings files, added tokens and the post-processor name have the ids they name.
3. ``_check_model``: SentencePiece reads ``tokenizer.model`` and cuts the pieces' texts as ``tokenizer.json`` does. One
   that stands alone must agree everywhere. Where both files are there, each goes on cutting as it does: published
   extensions whose files disagree a little are still extended, with a warning.

Costs: a second for 32,000 pieces.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece

from megatron_adapt.errors import DataError
from megatron_adapt.tokenizer.model_proto import BYTE, NORMAL, UNUSED, USER_DEFINED, PieceModel, read_model
from megatron_adapt.tokenizer.pieces import (
    CONFIG_FILE,
    JSON_FILE,
    MODEL_FILE,
    SPACE,
    LoadedTokenizer,
    byte_letters,
    read_settings,
    require_bpe,
    to_byte_piece,
)

_SAVE_AGAIN = "load the tokenizer with transformers, save it, and use what was saved"
_TWO_TOKENIZERS = "the files are of two tokenizers, remove the wrong one"
_PROBES = ("a  b", "\U000f0000", "the 2024.")  # the second has no piece of its own
_LOWEST_SCORE = -1e30  # scores fall further with every new piece and must stay 32-bit floats
_logger = logging.getLogger(__name__)


def check_base(base: LoadedTokenizer) -> None:
    """Refuse a tokenizer that cannot be a base.

    Raises:
        DataError: it is no BPE, or a file contradicts another one or names what is not there.
    """
    require_bpe(base)
    _check_bytes(base)
    _check_tokens(base)
    if (base.folder / MODEL_FILE).is_file():
        _check_model(base)


def _check_bytes(base: LoadedTokenizer) -> None:
    vocab = base.tokenizer.get_vocab(with_added_tokens=False)
    pieces = byte_letters().values() if base.kind == "byte_level" else map(to_byte_piece, range(256))
    lacking = sum(piece not in vocab for piece in pieces)
    if lacking:
        raise DataError(f"{base.folder}: {lacking} of the 256 bytes have no piece; use a tokenizer that has them all")


def _check_tokens(base: LoadedTokenizer) -> None:
    for file, text, index in _list_named(base.folder):
        found = base.tokenizer.token_to_id(text)
        if found is None or index not in (None, found):
            raise DataError(
                f"{base.folder / file}: token {text!r} has {'no id' if found is None else f'id {found}'} in the "
                f"vocabulary{'' if index is None else f', here {index}'}; its readers would number it otherwise after "
                f"an extension: {_SAVE_AGAIN}"
            )
    first = base.tokenizer.encode("")
    for text, index in zip(first.tokens, first.ids, strict=True):
        if base.tokenizer.token_to_id(text) != index:
            raise DataError(
                f"{base.folder / JSON_FILE}: the post_processor gives {text!r} the id {index}, the vocabulary "
                f"{base.tokenizer.token_to_id(text)}; correct it"
            )


def _list_named(folder: Path) -> Iterator[tuple[str, str, int | None]]:
    """Yield file, text and, where it is given, id of every token that is named outside the vocabulary itself."""
    added = read_settings(folder, JSON_FILE).get("added_tokens", [])
    yield from ((JSON_FILE, token["content"], token["id"]) for token in added)
    for file in (CONFIG_FILE, "special_tokens_map.json"):
        for name, value in read_settings(folder, file).items():
            if name == "added_tokens_decoder" and isinstance(value, dict):
                yield from ((file, text, _parse_id(index)) for index, token in value.items() for text in _texts(token))
            elif name.endswith(("_token", "special_tokens")):
                yield from ((file, text, None) for text in _texts(value))
    for text, index in read_settings(folder, "added_tokens.json").items():
        yield "added_tokens.json", text, index


def _texts(value: Any) -> Iterator[str]:
    """Yield the tokens of a setting: a text, the description of a token, or many of these."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict) and "content" in value:
        yield from _texts(value["content"])
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _parse_id(index: str) -> int:
    return int(index) if index.isdecimal() else -1


def _check_model(base: LoadedTokenizer) -> None:
    path = base.folder / MODEL_FILE
    if base.kind == "byte_level":
        if _is_model(path):
            raise DataError(f"{path}: a SentencePiece model beside a byte-level {JSON_FILE}; {_TWO_TOKENIZERS}")
        return
    model = read_model(path)
    if model.algorithm != base.algorithm:
        raise DataError(f"{path}: a {model.algorithm} beside a {base.algorithm} in {JSON_FILE}; {_TWO_TOKENIZERS}")
    _check_pieces(model)
    is_alone = not (base.folder / JSON_FILE).is_file()
    probes = _list_probes(model, (NORMAL, UNUSED))
    differing = _find_differing(base, probes)
    if is_alone:
        _check_convertible(model)
        if differing:
            raise DataError(
                f"{path}: a {JSON_FILE} made from it would cut {differing[0]!r} otherwise; use a folder that has one"
            )
        # Known: ``tokenizers`` puts a space in front of what follows such a piece.
        differing = _find_differing(base, _list_probes(model, (USER_DEFINED,)))
    if 2 * len(differing) > len(probes):
        raise DataError(
            f"{path}: cuts {len(differing)} of {len(probes)} texts otherwise than {JSON_FILE}, such as "
            f"{differing[0]!r}; {_TWO_TOKENIZERS}"
        )
    if differing:
        _logger.warning(
            "%s: cuts %s of the pieces' texts otherwise than %s, such as %r; so it will after the extension",
            path,
            f"{len(differing):,}",
            JSON_FILE,
            differing[0],
        )


def _is_model(path: Path) -> bool:
    try:
        read_model(path)
    except DataError:
        return False
    return True


def _check_pieces(model: PieceModel) -> None:
    for index, piece in enumerate(model.pieces):
        if not NORMAL <= piece.kind <= BYTE or not _LOWEST_SCORE < piece.score < -_LOWEST_SCORE:
            raise DataError(
                f"{model.path}: piece {index} {piece.text!r} has kind {piece.kind} and score {piece.score}; the file "
                "is damaged, fetch it again"
            )


def _check_convertible(model: PieceModel) -> None:
    found: dict[float, str] = {}
    for piece in model.pieces:
        if piece.kind == UNUSED:
            raise DataError(f"{model.path}: has an unused piece {piece.text!r}; use a folder with a {JSON_FILE}")
        if piece.kind == NORMAL and len(piece.text) > 1:
            other = found.setdefault(piece.score, piece.text)
            # Llama 2 and Mistral have runs of spaces of one score, which all readers cut alike.
            if len({*other, *piece.text}) > 1 and other != piece.text:
                raise DataError(
                    f"{model.path}: pieces {other!r} and {piece.text!r} have the same score; use a folder with a "
                    f"{JSON_FILE}, which says what merges first"
                )


def _list_probes(model: PieceModel, kinds: tuple[int, ...]) -> list[str]:
    """List the texts of the pieces, once and twice, behind a line end, where no space is put in front."""
    texts = [piece.text.replace(SPACE, " ") for piece in model.pieces if piece.kind in kinds]
    return [*_PROBES, *(f"\n{text}e" for text in texts), *(f"\n{text}{text}" for text in texts)]


def _find_differing(base: LoadedTokenizer, probes: list[str]) -> list[str]:
    """Return the texts that the two files cut differently."""
    path = base.folder / MODEL_FILE
    try:
        reader = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise DataError(f"{path}: SentencePiece refuses it ({error}); fetch the file again") from None
    by_json = base.tokenizer.encode_batch_fast(probes, add_special_tokens=False)
    by_model = reader.encode(probes)
    return [text for text, left, right in zip(probes, by_json, by_model, strict=True) if left.ids != right]
