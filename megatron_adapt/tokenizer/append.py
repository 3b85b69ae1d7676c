"""Append pieces to the files of a tokenizer; every old id, piece and merge stays where it is.

``tokenizer.json``: new ids behind all old ones, all splits of each new piece as merges behind all old merges. An old
piece may now also be spelled with new parts; where there is a ``tokenizer.model``, which merges those at the old
piece's priority, the splits go beside the old piece's own.
``tokenizer.model``: scores go on falling below the lowest old one, in the order of the ids. Only that order satisfies
both readers: SentencePiece takes the score for the priority, transformers 5 the id.
Added tokens enter the vocabulary of the JSON too, since ``tokenizers`` would otherwise number them anew.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import orjson

from megatron_adapt.errors import DataError
from megatron_adapt.files import read_json, write_json
from megatron_adapt.tokenizer.model_proto import (
    BYTE,
    CONTROL,
    NORMAL,
    USER_DEFINED,
    Piece,
    PieceModel,
    append_pieces,
    list_by_score,
    list_splits,
    read_model,
    write_model,
)
from megatron_adapt.tokenizer.pieces import (
    CONFIG_FILE,
    JSON_FILE,
    MODEL_FILE,
    LoadedTokenizer,
    copy_tokenizer,
    split_merges,
    to_letters,
)


def write_extended(
    base: LoadedTokenizer, pieces: list[bytes], folder: Path, scores: Sequence[float] | None = None
) -> list[str]:
    """Write every tokenizer file of ``base`` to ``folder``, with ``pieces`` appended.

    Args:
        base: the tokenizer to extend.
        pieces: bytes of the new pieces in the order learned; for SentencePiece with U+2581 for the space.
        folder: an existing folder.
        scores: scores of the pieces in ``tokenizer.model``; None lets them fall below the lowest old one. Under any
            others the two files disagree: ``tokenizer.json`` is what transformers 5 makes of the model, by ids alone.

    Returns:
        The new pieces as the files spell them; their ids run from ``base.vocab_size``.

    Raises:
        DataError: ``tokenizer.json`` and ``tokenizer.model`` of the base do not agree.
    """
    is_letters = base.kind == "byte_level"
    spelled = [to_letters(piece) if is_letters else piece.decode() for piece in pieces]
    copied = copy_tokenizer(base.folder, folder)
    # These restate the vocabulary for readers of single families; tokenizer.json is what counts.
    stale = {"vocab.json", "merges.txt"} | ({MODEL_FILE} if is_letters else set())
    for path in copied:
        if path.name in stale:
            path.unlink()
    if (base.folder / JSON_FILE).is_file():
        content = read_json(base.folder / JSON_FILE)
    else:
        content = orjson.loads(base.tokenizer.to_str())
        if not (folder / CONFIG_FILE).is_file():
            specials = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
            write_json(folder / CONFIG_FILE, {"tokenizer_class": "PreTrainedTokenizerFast", **specials})
    old_order: list[str] = []
    if base.kind == "sentencepiece" and (base.folder / MODEL_FILE).is_file():
        model = read_model(base.folder / MODEL_FILE)
        _check_agreement(model, content)
        write_model(_extend_model(model, base, spelled, scores), folder / MODEL_FILE)
        old_order = list_by_score(model)
    _extend_json(content, base, spelled, old_order)
    (folder / JSON_FILE).write_bytes(orjson.dumps(content, option=orjson.OPT_INDENT_2))
    return spelled


def _check_agreement(model: PieceModel, content: dict[str, Any]) -> None:
    vocab = content["model"]["vocab"]
    for index, piece in enumerate(model.pieces):
        if piece.kind in (NORMAL, BYTE, USER_DEFINED) and vocab.get(piece.text) != index:
            raise DataError(
                f"{model.path.name}: piece {piece.text!r} has id {index}, but {vocab.get(piece.text)} in {JSON_FILE}; "
                "the files are of two tokenizers, remove the wrong one"
            )


def _extend_json(content: dict[str, Any], base: LoadedTokenizer, spelled: list[str], old_order: list[str]) -> None:
    model = content["model"]
    vocab: dict[str, int] = model["vocab"]
    reserved = {token["content"] for token in content.setdefault("added_tokens", [])}
    mergeable = {piece: index for piece, index in vocab.items() if piece not in reserved}
    mergeable.update({piece: base.vocab_size + at for at, piece in enumerate(spelled)})
    vocab.update({token["content"]: token["id"] for token in content["added_tokens"]})
    vocab.update({piece: mergeable[piece] for piece in spelled})
    as_strings = bool(model["merges"]) and isinstance(model["merges"][0], str)
    merges = _insert_old_splits(split_merges(model["merges"]), mergeable, base.vocab_size, old_order)
    merges += [pair for piece in spelled for pair in list_splits(piece, mergeable)]
    model["merges"] = [" ".join(pair) for pair in merges] if as_strings else merges


def _insert_old_splits(
    merges: list[tuple[str, str]], mergeable: dict[str, int], first_new: int, old_order: list[str]
) -> list[tuple[str, str]]:
    """Insert the splits of old pieces into new parts where the pieces' own merges stand, or would by their scores."""
    last = {left + right: at for at, (left, right) in enumerate(merges)}
    extra: defaultdict[int, list[tuple[str, str]]] = defaultdict(list)
    at = -1
    for piece in old_order:
        at = last.get(piece, at)
        for left, right in list_splits(piece, mergeable):
            if mergeable[left] >= first_new or mergeable[right] >= first_new:
                extra[at].append((left, right))
    return [*extra[-1], *(pair for at, merge in enumerate(merges) for pair in (merge, *extra.get(at, ())))]


def _extend_model(
    model: PieceModel, base: LoadedTokenizer, spelled: list[str], scores: Sequence[float] | None
) -> PieceModel:
    # An id is a place in the list, so added tokens of the JSON behind the model's pieces need entries as well.
    added = base.tokenizer.get_added_tokens_decoder()
    known = {piece.text for piece in model.pieces}
    fillers = []
    for index in range(len(model.pieces), base.vocab_size):
        text = added[index].content if index in added else f"<unused_{index}>"
        if text in known:
            raise DataError(
                f"{model.path.name}: {text!r} has an id of its own and id {index} in {JSON_FILE}; remove one"
            )
        # SentencePiece cuts a user-defined piece out of any text, as only such tokens are.
        is_cut = index in added and not (added[index].special or added[index].single_word or added[index].normalized)
        fillers.append(Piece(text, 0.0, USER_DEFINED if is_cut else CONTROL))
    if scores is None:
        lowest = min((piece.score for piece in model.pieces if piece.kind == NORMAL), default=0.0)
        scores = list(islice(_list_lower_scores(lowest), len(spelled)))
    return append_pieces(model, [*fillers, *map(Piece, spelled, scores)])


def _list_lower_scores(score: float) -> Iterator[float]:
    while True:
        # Scores are 32-bit floats; far from zero a step of one would be lost.
        score -= max(1.0, math.ulp(score) * 2.0**30)
        yield score
