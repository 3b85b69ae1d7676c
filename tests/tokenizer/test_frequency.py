from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from megatron_adapt.tokenizer.filters import make_filter
from megatron_adapt.tokenizer.frequency import count_builds
from megatron_adapt.tokenizer.words import count_words, strip_tokenizer
from tests.tokenizer.bases import make_texts

LETTERS = "abc"


def count_slowly(merges, counts):
    """Run BPE on every word as its definition says and note every symbol that exists at some time."""
    builds = Counter()
    for word, count in counts.items():
        parts = list(word)
        seen = list(parts)
        while known := [pair for pair in pairwise(parts) if pair in merges]:
            left, right = min(known, key=merges.index)
            at = next(at for at, pair in enumerate(pairwise(parts)) if pair == (left, right))
            parts[at : at + 2] = [left + right]
            seen.append(left + right)
        for piece in seen:
            builds[piece] += count
    return builds


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.text(LETTERS, min_size=1, max_size=3), st.text(LETTERS, min_size=1, max_size=3)), max_size=9),
    st.dictionaries(st.text(LETTERS, min_size=1, max_size=9), st.integers(1, 5), max_size=9),
)
def test_builds_are_the_symbols_that_bpe_makes(drawn, counts):
    pieces, merges = list(LETTERS), []
    for left, right in drawn:
        if left in pieces and right in pieces and (left, right) not in merges:
            merges.append((left, right))
            if left + right not in pieces:
                pieces.append(left + right)
    bare = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, merges))
    assert count_builds(bare, counts) == count_slowly(merges, counts)


def test_parts_come_before_what_they_make_and_are_built_as_often(base):
    words = count_words(base, make_texts("en"), make_filter(())).counts
    bare = strip_tokenizer(base)
    builds = count_builds(bare, words)
    places = {piece: place for place, piece in enumerate(builds)}
    vocab, made = bare.get_vocab(), 0
    for piece in (piece for piece in builds if len(piece) > 1):
        # Every split that the merges use has parts that were built; some split is at least as frequent as the piece.
        parts = [(piece[:at], piece[at:]) for at in range(1, len(piece)) if piece[:at] in vocab and piece[at:] in vocab]
        used = [pair for pair in parts if min(builds[part] for part in pair) >= builds[piece]]
        assert any(max(places[left], places[right]) < places[piece] for left, right in used)
        made += 1
    assert made > 50


def test_bytes_that_a_character_falls_back_to_are_not_pieces_built(bases):
    bare = strip_tokenizer(bases["sentencepiece"])
    builds = count_builds(bare, {"▁日the": 7})
    assert builds["the"] == 7
    assert not [piece for piece in builds if piece.startswith("<0x")]


@pytest.mark.parametrize("counts", [{}, {"": 3}])
def test_no_words_build_nothing(base, counts):
    assert count_builds(strip_tokenizer(base), counts) == {}
