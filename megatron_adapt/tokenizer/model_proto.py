"""The SentencePiece ``tokenizer.model`` file: read it, append pieces, turn it into a ``tokenizers.Tokenizer``.

The file is a protocol buffer (``sentencepiece_model.proto``). Only what an extension touches is taken apart - the
list of pieces and two fields of the trainer's settings; every other byte is written back as it was read, so no
protobuf package is needed and nothing of the base is lost.

In SentencePiece BPE a score is a priority: of all neighbours whose concatenation is a piece, the pair with the
highest score merges first, the leftmost of equals (``sentencepiece/src/bpe_model.cc``). ``tokenizers`` instead has
an ordered list of pairs: ``list_merges`` writes every split of every piece in the order of the scores.

In a Unigram model a score is a log probability, and the pieces of a text are those of the highest sum
(``unigram_model.cc``). ``tokenizers`` does the same in double precision and takes every entry of its vocabulary for
text, ``<0x41>`` and ``<s>`` too, so what only looks like text gets a score too low to be chosen (``make_algorithm``).
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from megatron_adapt.errors import DataError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_OTHER_MODEL_TYPES = {3: "Word", 4: "Char"}
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3  # fields of ModelProto
_MODEL_TYPE, _VOCAB_SIZE = 3, 4  # fields of TrainerSpec
_CHARSMAP, _ADD_DUMMY_PREFIX, _REMOVE_SPACES, _ESCAPE_SPACES = 2, 3, 4, 5  # fields of NormalizerSpec
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types
_CHANGEABLE = {
    "model_type": (_TRAINER, _MODEL_TYPE),
    "vocab_size": (_TRAINER, _VOCAB_SIZE),
    "add_dummy_prefix": (_NORMALIZER, _ADD_DUMMY_PREFIX),
}

Algorithm = Literal["BPE", "Unigram"]
MODEL_TYPES: dict[Algorithm, int] = {"Unigram": 1, "BPE": 2}
"How a SentencePiece model names its algorithm."
Value = int | bytes
Fields = list[tuple[int, int, Value]]


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; its id is its place in the list."""

    text: str
    score: float
    kind: int = NORMAL


@dataclass(frozen=True)
class PieceModel:
    """A ``tokenizer.model``: its pieces, and all other fields as they were read."""

    path: Path
    pieces: tuple[Piece, ...]
    others: tuple[tuple[int, int, Value], ...]

    @property
    def algorithm(self) -> Algorithm:
        """How text is cut into the pieces."""
        return "BPE" if self.setting(_TRAINER, _MODEL_TYPE, 1) == MODEL_TYPES["BPE"] else "Unigram"

    def setting(self, message: int, number: int, default: Value) -> Value:
        """Return a field of one of the settings messages."""
        for field, _, value in self.others:
            if field == message and isinstance(value, bytes):
                for inner, _, found in _parse(value):
                    default = found if inner == number else default
        return default


def read_model(path: Path) -> PieceModel:
    """Read a SentencePiece model, BPE or Unigram.

    Raises:
        DataError: the file is no SentencePiece model, is damaged, is of another algorithm, or holds a piece twice.
    """
    pieces: list[Piece] = []
    others: Fields = []
    try:
        for number, wire, value in _parse(path.read_bytes()):
            if number == _PIECES and isinstance(value, bytes):
                pieces.append(_parse_piece(value))
            else:
                others.append((number, wire, value))
                if number in (_TRAINER, _NORMALIZER) and isinstance(value, bytes):
                    list(_parse(value))  # ``setting`` relies on it
    except (ValueError, IndexError, struct.error) as error:
        raise DataError(
            f"{path}: no SentencePiece model, or damaged ({error}); use a folder with tokenizer.json"
        ) from None
    model = PieceModel(path, tuple(pieces), tuple(others))
    if not pieces or not any(number == _TRAINER for number, _, _ in others):
        raise DataError(f"{path}: no SentencePiece model (no pieces in it); use a folder with tokenizer.json")
    kind = model.setting(_TRAINER, _MODEL_TYPE, 1)
    if kind not in MODEL_TYPES.values():
        name = _OTHER_MODEL_TYPES.get(int(kind), int(kind))
        raise DataError(f"{path}: a SentencePiece {name} model is not supported; use a BPE or a Unigram")
    if len({piece.text for piece in pieces}) != len(pieces):
        raise DataError(f"{path}: {len(pieces) - len({p.text for p in pieces})} pieces occur twice; repair the model")
    if sum(piece.kind == BYTE for piece in pieces) != 256:
        raise DataError(
            f"{path}: a SentencePiece {model.algorithm} without byte fallback is not supported; use one with it"
        )
    return model


def append_pieces(model: PieceModel, added: list[Piece]) -> PieceModel:
    """Return the model with pieces behind all old ones."""
    return replace_pieces(model, [*model.pieces, *added])


def replace_pieces(model: PieceModel, pieces: list[Piece], **changes: int) -> PieceModel:
    """Return the model with other pieces and with ``changes`` to its settings, named as ``_CHANGEABLE`` lists them."""
    numbers = {"vocab_size": len(pieces), **changes}
    others = list(model.others)
    for name, new in numbers.items():
        message, field = _CHANGEABLE[name]
        others = [
            (number, wire, _set_varint(value, field, new) if number == message and isinstance(value, bytes) else value)
            for number, wire, value in others
        ]
    return replace(model, pieces=tuple(pieces), others=tuple(others))


def write_model(model: PieceModel, path: Path) -> None:
    """Write a model; ``read_model`` is the inverse."""
    pieces = [(_PIECES, _BYTES, _build_piece(piece)) for piece in model.pieces]
    path.write_bytes(_build([*pieces, *model.others]))


def convert_model(model: PieceModel, *, adds_bos: bool) -> Tokenizer:
    """Build the ``tokenizers.Tokenizer`` that gives the same ids as the SentencePiece model.

    Raises:
        DataError: the model normalises text in a way this conversion does not carry over.
    """
    _require_plain_normalizer(model)
    tokenizer = Tokenizer(make_algorithm(model))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = [piece.text for piece in model.pieces if piece.kind in (UNKNOWN, CONTROL)]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    defined = [piece.text for piece in model.pieces if piece.kind == USER_DEFINED]
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in defined])
    bos = "<s>"
    if adds_bos and bos in special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0",
            pair=f"{bos}:0 $A:0 {bos}:1 $B:1",
            special_tokens=[(bos, tokenizer.token_to_id(bos))],
        )
    return tokenizer


def make_algorithm(model: PieceModel) -> models.BPE | models.Unigram:
    """Build the part of a ``tokenizers.Tokenizer`` that cuts text into pieces, without what surrounds it."""
    unknown = next((index for index, piece in enumerate(model.pieces) if piece.kind == UNKNOWN), None)
    if model.algorithm == "Unigram":
        lowest = min((piece.score for piece in model.pieces if piece.kind == NORMAL), default=-1.0)
        # Less than the sum over the characters of any such text.
        shunned = lowest * (1 + max(len(piece.text) for piece in model.pieces))
        scores = [(piece.text, piece.score if piece.kind == NORMAL else shunned) for piece in model.pieces]
        return models.Unigram(scores, unknown, byte_fallback=True)
    vocab = {piece.text: index for index, piece in enumerate(model.pieces)}
    order = list_by_score(model)
    merges = list_merges(order, {text: vocab[text] for text in order})
    name = None if unknown is None else model.pieces[unknown].text
    return models.BPE(vocab, merges, unk_token=name, fuse_unk=True, byte_fallback=True)


def list_by_score(model: PieceModel) -> list[str]:
    """List the pieces that text can merge to, the highest score first."""
    normal = (piece for piece in model.pieces if piece.kind == NORMAL)
    return [piece.text for piece in sorted(normal, key=lambda piece: -piece.score)]


def list_merges(order: list[str], ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """List every split of every piece into two pieces, pieces in the given order, the shorter left part first.

    SentencePiece merges any pair whose concatenation is a piece; all splits together say the same.
    """
    return [pair for piece in order for pair in list_splits(piece, ids)]


def list_splits(piece: str, ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """List the splits of one piece into two known pieces, the shorter left part first."""
    pairs = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
    return [(left, right) for left, right in pairs if left in ids and right in ids]


def _require_plain_normalizer(model: PieceModel) -> None:
    found = {
        "a character map": bool(model.setting(_NORMALIZER, _CHARSMAP, b"")),
        "no leading space": not model.setting(_NORMALIZER, _ADD_DUMMY_PREFIX, 1),
        "removal of extra spaces": bool(model.setting(_NORMALIZER, _REMOVE_SPACES, 1)),
        "spaces that are not U+2581": not model.setting(_NORMALIZER, _ESCAPE_SPACES, 1),
    }
    for what, present in found.items():
        if present:
            raise DataError(
                f"{model.path}: normalises text ({what}), which needs a tokenizer.json to say how; "
                "save the tokenizer once with transformers and use that folder"
            )


def _parse_piece(data: bytes) -> Piece:
    text, score, kind = "", 0.0, NORMAL
    for number, wire, value in _parse(data):
        if number == 1 and isinstance(value, bytes):
            text = value.decode()
        elif number == 2 and wire == _FIXED32 and isinstance(value, bytes):
            score = struct.unpack("<f", value)[0]
        elif number == 3 and isinstance(value, int):
            kind = value
    return Piece(text, score, kind)


def _build_piece(piece: Piece) -> bytes:
    fields: Fields = [(1, _BYTES, piece.text.encode()), (2, _FIXED32, struct.pack("<f", piece.score))]
    return _build(fields if piece.kind == NORMAL else [*fields, (3, _VARINT, piece.kind)])


def _set_varint(message: bytes, number: int, new: int) -> bytes:
    fields = list(_parse(message))
    if not any(field == number for field, _, _ in fields):
        fields.append((number, _VARINT, new))
    return _build([(field, wire, new if field == number else value) for field, wire, value in fields])


def _parse(data: bytes) -> Iterator[tuple[int, int, Value]]:
    """Yield field number, wire type and value (https://protobuf.dev/programming-guides/encoding)."""
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, at = _read_varint(data, at)
            yield number, wire, value
            continue
        if wire not in (_FIXED64, _BYTES, _FIXED32):
            raise ValueError(f"wire type {wire}")
        size = {_FIXED64: 8, _FIXED32: 4}.get(wire)
        if size is None:
            size, at = _read_varint(data, at)
        if number == 0 or at + size > len(data):
            raise ValueError(f"field {number} of {size} bytes at {at} of {len(data)}")
        yield number, wire, data[at : at + size]
        at += size


def _build(fields: Fields) -> bytes:
    out = bytearray()
    for number, wire, value in fields:
        out += _write_varint(number << 3 | wire)
        if isinstance(value, int):
            out += _write_varint(value)
        else:
            out += (_write_varint(len(value)) if wire == _BYTES else b"") + value
    return bytes(out)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _write_varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
