"""An old tokenizer and one with more pieces, and the sources of a method that compares their tokens."""

from megatron_adapt.config import VocabSettings
from megatron_adapt.tokenizer.id_map import map_ids
from megatron_adapt.tokenizer.pieces import read_tokenizer
from megatron_adapt.vocab.rows import FillSources
from tests.helpers.tiny import write_byte_tokenizer

OLD = [("d", "o"), ("do", "g"), ("c", "a"), ("ca", "t"), ("Ġ", "dog"), ("Ġ", "cat")]
NEW = [("h", "u"), ("hu", "n"), ("hun", "d"), ("Ġ", "hund"), ("ca", "r"), ("Ð", "´")]


def make_pair(root):
    """Make tokenizers of dog and cat, and of hund, car and a Cyrillic letter besides."""
    own = write_byte_tokenizer(root / "own", merges=OLD)
    made = write_byte_tokenizer(root / "made", merges=[*OLD, *NEW])
    return read_tokenizer(own), read_tokenizer(made)


def make_pair_sources(pair, *corpus, **settings):
    own, made = pair
    return FillSources(
        id_map=map_ids(own, made), settings=VocabSettings(**settings), own=own, made=made, corpus=tuple(corpus)
    )


def name_tokens(tokenizer, ids):
    return [tokenizer.tokenizer.id_to_token(int(index)) for index in ids]
