"""Words linked to tokens: by hand, and against a slow count of everything."""

from collections import Counter
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_adapt.tokenizer.pieces import read_tokenizer
from megatron_adapt.vocab import cooccurrence
from megatron_adapt.vocab.census import name_tokens
from megatron_adapt.vocab.cooccurrence import MIN_PAIRS, link_words
from tests.helpers.tiny import NUM_BASE_IDS, write_byte_tokenizer

LETTERS = "qrstuvwxyz"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Tokens of two equal letters; a text of them with spaces between is cut into them."""
    folder = tmp_path_factory.mktemp("tokenizer")
    return read_tokenizer(write_byte_tokenizer(folder, merges=[(letter, letter) for letter in LETTERS] + [("1", "1")]))


@pytest.fixture(scope="module")
def texts(tokenizer):
    return dict(enumerate(name_tokens(tokenizer)[NUM_BASE_IDS:], start=NUM_BASE_IDS))


def link(pairs, tokenizer, texts):
    return {word: texts[index] for word, index in link_words(pairs, tokenizer, texts).items()}


def test_words_are_linked_to_the_token_they_keep_occurring_with(tokenizer, texts):
    # "the" is everywhere and takes the token that is; what occurs in fewer than five pairs is not linked.
    pairs = [("the cat.", "qq rr")] * 6 + [("the dog!", "qq ss")] * 5 + [("the rare", "qq tt")] * 4
    assert link(pairs, tokenizer, texts) == {"the": "qq", "cat": "rr", "dog": "ss"}


def test_the_best_pairs_come_first_and_each_word_and_token_once(tokenizer, texts):
    # cat with rr: 2 * 8 / (8 + 10) = 0.89, animal with rr: 2 * 10 / (12 + 10) = 0.91, so cat is left without.
    pairs = [("cat animal", "rr")] * 8 + [("animal", "rr")] * 2 + [("animal", "")] * 2 + [("sun", "uu")] * 5
    assert list(link(pairs, tokenizer, texts).items()) == [("sun", "uu"), ("animal", "rr")]


def test_names_signs_and_other_tokens_are_left_out(tokenizer, texts):
    pairs = [("one", "uu 11")] * 9 + [("cat", "vv")] * 9
    assert link(pairs, tokenizer, {index: text for index, text in texts.items() if text != "vv"}) == {"one": "uu"}
    # A word that is its own translation is a name, and takes its token with it.
    pairs = [("uu", "uu")] * 9 + [("cat", "vv")] * 9
    assert link(pairs, tokenizer, texts) == {"cat": "vv"}


def test_no_pairs_give_no_words(tokenizer, texts):
    assert link([], tokenizer, texts) == link([("", "")] * 9, tokenizer, texts) == {}


@settings(deadline=None)
@given(
    st.lists(st.tuples(*[st.lists(st.integers(0, 3), max_size=4)] * 2), min_size=1, max_size=12),
    st.integers(1, 40),
)
def test_links_are_mutual_best_by_dice_whatever_the_blocks(tokenizer, texts, chosen, block):
    words = ["ant", "bee", "cow", "doe"]
    pairs = [(" ".join(words[at] for at in old), " ".join(LETTERS[at] * 2 for at in new)) for old, new in chosen] * 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cooccurrence, "_BLOCK_KEYS", block)
        found = link(pairs, tokenizer, texts)
    sides = [(set(old.split()), set(new.split())) for old, new in pairs]
    together = Counter(both for old, new in sides for both in product(old, new))
    alone = Counter(word for side in sides for group in side for word in group)
    dice = {
        (word, token): 2 * count / (alone[word] + alone[token])
        for (word, token), count in together.items()
        if count >= MIN_PAIRS
    }
    for word, token in found.items():
        rivals = [value for both, value in dice.items() if word in both or token in both]
        assert dice[word, token] == max(rivals)
    # Whatever is better than all its rivals is found.
    for (word, token), value in dice.items():
        rivals = [other for both, other in dice.items() if (word in both) != (token in both)]
        if all(value > other for other in rivals):
            assert found.get(word) == token
