"""The tokens of a resized model: which stayed, moved or are new, in what scripts, and which of them a text uses.

Reads: two tokenizers, documents. Pure counting; no rows.

1. ``Census.of`` finds the same tokens in both (``id_map.map_ids``).
2. ``count_scripts`` divides them by script, ``count_tokens`` counts them in texts, ``describe_use`` makes the shares.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import regex

from megatron_adapt.errors import CheckpointError
from megatron_adapt.scripts import make_script_class
from megatron_adapt.tokenizer.figures import take_batches
from megatron_adapt.tokenizer.id_map import IdMap, map_ids
from megatron_adapt.tokenizer.pieces import LoadedTokenizer, list_byte_pieces, piece_bytes

Ids = npt.NDArray[np.int64]
# Where a character belongs to several, the first counts.
_SCRIPTS = (
    *("Latin", "Cyrillic", "Greek", "Armenian", "Georgian", "Hebrew", "Arabic", "Devanagari", "Bengali", "Gurmukhi"),
    *("Gujarati", "Tamil", "Telugu", "Kannada", "Malayalam", "Sinhala", "Thai", "Lao", "Myanmar", "Khmer", "Tibetan"),
    *("Ethiopic", "Hangul", "Katakana", "Hiragana", "Han"),
)
_LETTER = regex.compile(r"[\p{L}\p{M}]")


@dataclass(frozen=True, kw_only=True)
class Census:
    """Tokens of a model before and after a resize."""

    base: LoadedTokenizer
    made: LoadedTokenizer
    id_map: IdMap
    kept: Ids
    "Ids of the tokens that the base has too, ascending."
    kept_before: Ids
    "Their ids in the base."
    new: Ids
    "The other ids, ascending."

    @classmethod
    def of(cls, base: LoadedTokenizer, made: LoadedTokenizer) -> "Census":
        """Compare two tokenizers.

        Raises:
            CheckpointError: they share no token, or the second has no new one.
        """
        id_map = map_ids(base, made)
        olds = {index: id_map.old_id(index) for index in range(id_map.vocab_size)}
        kept = [(index, old) for index, old in olds.items() if old is not None]
        if not kept:
            raise CheckpointError(
                f"{made.folder}: its tokenizer shares no token with {base.folder}; name the model it was resized from"
            )
        if len(kept) == len(olds):
            raise CheckpointError(
                f"{made.folder}: its tokenizer has no token that {base.folder} lacks; name a model that "
                "tools/resize_vocab.py gave rows"
            )
        after, before = np.array(kept, np.int64).T
        return cls(
            base=base,
            made=made,
            id_map=id_map,
            kept=after,
            kept_before=before,
            new=np.array([*id_map.pieces], np.int64),
        )


def name_tokens(tokenizer: LoadedTokenizer) -> list[str]:
    """Return the text of every id, by id; the piece as it is written where it stands for no whole characters."""
    names = []
    for index, data in enumerate(piece_bytes(tokenizer)):
        piece = tokenizer.tokenizer.id_to_token(index) or ""
        names.append(data.decode(errors="replace") if data else piece)
        if "\ufffd" in names[-1]:
            names[-1] = piece
    return names


def classify_tokens(tokenizer: LoadedTokenizer) -> list[str]:
    """Return the script of every id, by id: the one of most of its letters.

    ``special`` stands for a token without text, ``bytes`` for one that is a byte or no whole characters, ``no letters``
    for digits, signs and spaces, ``other`` for letters of a script not listed here.
    """
    byte_pieces = list_byte_pieces(tokenizer)
    found = []
    for index, data in enumerate(piece_bytes(tokenizer)):
        try:
            is_bytes = tokenizer.tokenizer.id_to_token(index) in byte_pieces
            found.append("bytes" if is_bytes else _classify_text(data.decode()) if data else "special")
        except UnicodeDecodeError:
            found.append("bytes")
    return found


def _classify_text(text: str) -> str:
    scripts = Counter(map(_find_script, _LETTER.findall(text)))
    order = (*_SCRIPTS, "other")
    return min(scripts, key=lambda name: (-scripts[name], order.index(name))) if scripts else "no letters"


@cache
def _find_script(letter: str) -> str:
    for name in _SCRIPTS:
        if _script_pattern(name).match(letter):
            return name
    return "other"


@cache
def _script_pattern(name: str) -> Any:
    return regex.compile(f"[{make_script_class([name], 'scripts')}]")


def count_scripts(census: Census) -> dict[str, dict[str, int]]:
    """Count tokens by script, most first: ``kept`` under their id, ``moved`` to another, ``new``, ``dropped``."""
    after, before = classify_tokens(census.made), classify_tokens(census.base)
    table: dict[str, Counter[str]] = {}
    for index, script in enumerate(after):
        way = "new" if index in census.id_map.pieces else "moved" if index in census.id_map.moved else "kept"
        table.setdefault(script, Counter())[way] += 1
    for index in set(range(len(before))) - set(census.kept_before.tolist()):
        table.setdefault(before[index], Counter())["dropped"] += 1
    order = sorted(table, key=lambda script: (-table[script].total(), script))
    return {script: {way: table[script][way] for way in ("kept", "moved", "new", "dropped")} for script in order}


def count_tokens(tokenizer: LoadedTokenizer, texts: Iterable[str]) -> Ids:
    """Return how often each id occurs in texts: [V]."""
    frequency_V = np.zeros(tokenizer.vocab_size, np.int64)
    for batch in take_batches(texts):
        encoded = tokenizer.tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        ids = np.fromiter(chain.from_iterable(item.ids for item in encoded), np.int64)
        frequency_V += np.bincount(ids, minlength=len(frequency_V))
    return frequency_V


def describe_vocabulary(census: Census) -> dict[str, Any]:
    """Return the sizes, the mean number of old pieces of a new token, and the scripts."""
    lengths = [len(olds) for olds in census.id_map.pieces.values()]
    num_moved = len(census.id_map.moved)
    return {
        "base_vocab_size": census.base.vocab_size,
        "vocab_size": census.made.vocab_size,
        "kept": len(census.kept) - num_moved,
        "moved": num_moved,
        "new": len(census.new),
        "dropped": census.base.vocab_size - len(set(census.kept_before.tolist())),
        "pieces_per_new_token": sum(lengths) / len(lengths),
        "scripts": count_scripts(census),
    }


def describe_use(census: Census, frequency_V: Ids) -> dict[str, float]:
    """Return what a text, in which every id occurs so often, uses of the vocabulary."""
    total = int(frequency_V.sum())
    return {
        "tokens": total,
        "share_of_new_tokens": int(frequency_V[census.new].sum()) / max(1, total),
        "new_tokens_seen": float(np.count_nonzero(frequency_V[census.new]) / len(census.new)),
        "vocabulary_used": float(np.count_nonzero(frequency_V) / len(frequency_V)),
    }
