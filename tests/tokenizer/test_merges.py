import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_adapt.tokenizer import merges
from megatron_adapt.tokenizer.merges import SegmentedWords, learn_merges, learn_merges_python

compiled = pytest.mark.skipif(merges._csrc is None, reason="the C++ extension is not built")


def make_words(words, symbols=None, counts=None):
    symbols = symbols or [bytes([code]) for code in range(256)]
    ids = [index for word in words for index in word]
    offsets = np.cumsum([0, *map(len, words)])
    counts = counts or [1] * len(words)
    return SegmentedWords(
        symbols, np.array(ids, dtype=np.int32), offsets.astype(np.int64), np.array(counts, dtype=np.int64)
    )


LEARNERS = [pytest.param(learn_merges, marks=compiled), learn_merges_python]


@pytest.mark.parametrize("learn", LEARNERS)
def test_counts_by_hand(learn):
    words = make_words([b"abc", b"abz", b"cd"], counts=[3, 2, 4])
    # ab 5, cd 4, then abc 3, abz 2
    assert learn(words, 10, 1, lambda piece: True) == [(b"ab", 5), (b"cd", 4), (b"abc", 3), (b"abz", 2)]
    assert learn(words, 2, 1, lambda piece: True) == [(b"ab", 5), (b"cd", 4)]
    assert learn(words, 10, 3, lambda piece: True) == [(b"ab", 5), (b"cd", 4), (b"abc", 3)]


@pytest.mark.parametrize("learn", LEARNERS)
def test_ties_go_to_the_shorter_then_the_smaller(learn):
    words = make_words([[0, 1], [2, 3], [4, 5]], symbols=[b"x", b"yz", b"d", b"e", b"c", b"f"])
    assert [piece for piece, _ in learn(words, 3, 1, lambda piece: True)] == [b"cf", b"de", b"xyz"]


@pytest.mark.parametrize("learn", LEARNERS)
def test_every_pair_that_spells_a_piece_counts_and_merges(learn):
    words = make_words([[0, 1], [2, 3], [0, 1, 4]], symbols=[b"a", b"bc", b"ab", b"c", b"d"])
    assert learn(words, 9, 1, lambda piece: True) == [(b"abc", 3), (b"abcd", 1)]


@pytest.mark.parametrize("learn", LEARNERS)
def test_a_refused_candidate_is_asked_once_and_never_learned(learn):
    asked = []

    def accept(piece):
        asked.append(piece)
        return piece != b"ab"

    learned = learn(make_words([b"abab", b"abc"]), 9, 1, accept)
    assert b"ab" not in dict(learned)
    assert len(asked) == len(set(asked))


@pytest.mark.parametrize("learn", LEARNERS)
def test_a_run_of_one_letter_merges_from_the_left(learn):
    assert learn(make_words([b"aaaaa"]), 1, 1, lambda piece: True) == [(b"aa", 4)]
    # aa aa a: the run now holds aa-aa once and aa-a once
    assert learn(make_words([b"aaaaa"]), 2, 1, lambda piece: True)[1] == (b"aaa", 1)


@pytest.mark.parametrize("learn", LEARNERS)
def test_nothing_to_learn_gives_nothing(learn):
    assert learn(make_words([]), 5, 1, lambda piece: True) == []
    assert learn(make_words([b"a", b""]), 5, 1, lambda piece: True) == []


@compiled
@settings(max_examples=300, deadline=None)
@given(
    words=st.lists(st.tuples(st.lists(st.integers(0, 6), max_size=14), st.integers(1, 4)), max_size=14),
    num_letters=st.integers(1, 5),
    num_pieces=st.integers(1, 60),
    min_frequency=st.integers(1, 3),
    refuse=st.integers(0, 7),
)
def test_compiled_learner_equals_its_twin(words, num_letters, num_pieces, min_frequency, refuse):
    letters = [bytes([97 + at]) for at in range(num_letters)]
    symbols = [*letters, b"ab", b"ba", b"aab"]
    made = make_words(
        [[index % len(symbols) for index in word] for word, _ in words], symbols, [count for _, count in words]
    )
    asked = {}

    def run(learn):
        order = asked[learn] = []

        def accept(piece):
            order.append(piece)
            return sum(piece) % 8 != refuse

        return learn(made, num_pieces, min_frequency, accept)

    assert run(learn_merges) == run(learn_merges_python)
    assert asked[learn_merges] == asked[learn_merges_python]


@compiled
def test_compiled_learner_checks_its_arrays():
    good = make_words([b"ab"])
    with pytest.raises(ValueError, match="offsets do not fit"):
        learn_merges(SegmentedWords(good.symbols, good.ids[:1], good.offsets, good.counts), 1, 1, bool)
    with pytest.raises(ValueError, match="an id has no symbol"):
        learn_merges(SegmentedWords([b"a"], good.ids, good.offsets, good.counts), 1, 1, bool)
    wrong = np.array([0, 2, 1, 2], dtype=np.int64)
    with pytest.raises(ValueError, match="offsets decrease"):
        learn_merges(SegmentedWords(good.symbols, good.ids, wrong, np.ones(3, dtype=np.int64)), 1, 1, bool)


def test_the_twin_serves_without_the_extension_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr(merges, "_csrc", None)
    with caplog.at_level(logging.WARNING):
        assert learn_merges(make_words([b"ab"]), 1, 1, lambda piece: True) == [(b"ab", 1)]
    assert "the C++ extension is missing" in caplog.text
