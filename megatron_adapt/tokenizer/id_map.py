"""Which id of a new tokenizer is which id of its base: the file every later stage reads.

``added_pieces.json``: ``{"base_vocab_size": n, "vocab_size": m, "moved": {new: old}, "pieces": {new: [old, ...]}}``.
An id under ``pieces`` is new: the old ids spell its surface form. Every other id stands for the same token as the old
id that ``moved`` gives, or as the same id of the base where ``moved`` is silent.

Two tokens are the same when they stand for the same bytes of text, or are the same special token; how a family writes
its pieces does not matter (``pieces.piece_bytes``).
"""

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from megatron_adapt.errors import DataError
from megatron_adapt.files import read_json, write_json
from megatron_adapt.tokenizer.pieces import SPACE, LoadedTokenizer, piece_bytes, to_byte_piece, to_letters
from megatron_adapt.tokenizer.words import strip_tokenizer

MAP_FILE = "added_pieces.json"


@dataclass(frozen=True, kw_only=True)
class IdMap:
    """Old ids of every id of a tokenizer."""

    base_vocab_size: int
    vocab_size: int
    moved: dict[int, int]
    "New id to the other old id of the same token."
    pieces: dict[int, list[int]]
    "New id to the old ids that spell its surface form, in ascending order; none for a token without text."

    def old_id(self, index: int) -> int | None:
        """Return the old id of the same token, or None for a new one."""
        return None if index in self.pieces else self.moved.get(index, index)


def map_ids(base: LoadedTokenizer, made: LoadedTokenizer) -> IdMap:
    """Find for every id of ``made`` the same token in ``base``, or the old pieces that spell it."""
    by_name = base.tokenizer.get_vocab(with_added_tokens=True)
    by_bytes = _find_by_bytes(base)
    bare = strip_tokenizer(base)
    moved: dict[int, int] = {}
    pieces: dict[int, list[int]] = {}
    for index, data in enumerate(piece_bytes(made)):
        token = made.tokenizer.id_to_token(index)
        # A special token, which has no bytes, goes by its name; so does a byte piece, which has those of a character.
        named = base.kind == made.kind or not data
        if named and index < base.vocab_size and token == base.tokenizer.id_to_token(index):
            continue
        old = by_name.get(token) if named and token else None
        old = by_bytes.get(data) if old is None else old
        if old is None:
            pieces[index] = _spell(base, bare, data)
        elif old != index:
            moved[index] = old
    return IdMap(base_vocab_size=base.vocab_size, vocab_size=made.vocab_size, moved=moved, pieces=pieces)


def _find_by_bytes(base: LoadedTokenizer) -> dict[bytes, int]:
    found: dict[bytes, int] = {}
    for index, data in enumerate(piece_bytes(base)):
        if data and base.tokenizer.id_to_token(found.get(data, index)) in (
            base.tokenizer.id_to_token(index),
            to_byte_piece(data[0]),
        ):
            found[data] = index
    return found


def _spell(base: LoadedTokenizer, bare: Tokenizer, data: bytes) -> list[int]:
    """Return the old ids that the base's merges make of a surface form standing alone."""
    if base.kind == "byte_level":
        ids: list[int] = bare.encode(to_letters(data)).ids
        return ids
    try:
        ids = bare.encode(data.decode().replace(" ", SPACE)).ids
    except UnicodeDecodeError:
        vocab = base.tokenizer.get_vocab(with_added_tokens=False)
        ids = [vocab[to_byte_piece(byte)] for byte in data]
    return ids


def write_id_map(id_map: IdMap, folder: Path) -> None:
    """Write ``added_pieces.json`` into a tokenizer folder; ``read_id_map`` is the inverse."""
    write_json(
        folder / MAP_FILE,
        {
            "base_vocab_size": id_map.base_vocab_size,
            "vocab_size": id_map.vocab_size,
            "moved": {str(new): old for new, old in id_map.moved.items()},
            "pieces": {str(new): olds for new, olds in id_map.pieces.items()},
        },
    )


def read_id_map(tokenizer: LoadedTokenizer) -> IdMap:
    """Read the map of a tokenizer that ``tools/build_tokenizer.py`` wrote.

    Raises:
        DataError: there is none, it is damaged, or it belongs to another tokenizer.
    """
    path = tokenizer.folder / MAP_FILE
    again = "make both again with tools/build_tokenizer.py"
    if not path.is_file():
        raise DataError(
            f"{tokenizer.folder}: no {MAP_FILE}, so it is unknown how its new tokens were spelt; "
            "make the tokenizer with tools/build_tokenizer.py"
        )
    content = read_json(path)
    try:
        id_map = IdMap(
            base_vocab_size=int(content["base_vocab_size"]),
            vocab_size=int(content["vocab_size"]),
            moved={int(new): int(old) for new, old in content["moved"].items()},
            pieces={
                int(new): [int(old) for old in content["pieces"][new]] for new in sorted(content["pieces"], key=int)
            },
        )
    except (LookupError, TypeError, ValueError, AttributeError):
        raise DataError(f"{path}: not of the form that tools/build_tokenizer.py writes; make it again") from None
    if id_map.vocab_size != tokenizer.vocab_size:
        raise DataError(
            f"{path}: maps {id_map.vocab_size} ids, the tokenizer has {tokenizer.vocab_size}; "
            f"the two files do not belong together, {again}"
        )
    for index in range(id_map.vocab_size):
        old = id_map.old_id(index)
        if old is not None and not 0 <= old < id_map.base_vocab_size:
            raise DataError(f"{path}: id {index} has no old id below {id_map.base_vocab_size}; {again}")
    for new, olds in id_map.pieces.items():
        if not 0 <= new < id_map.vocab_size or any(not 0 <= old < id_map.base_vocab_size for old in olds):
            raise DataError(f"{path}: id {new} is spelt by {olds}, not all below {id_map.base_vocab_size}; {again}")
    return id_map
