import math
from itertools import chain

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from megatron_adapt.tokenizer.figures import Tally, count_renyi_efficiency, measure
from megatron_adapt.tokenizer.pieces import read_tokenizer
from tests.tokenizer.bases import make_texts


def test_figures_by_hand(bases):
    tokenizer = bases["byte_level"]
    pieces = tokenizer.tokenizer.get_vocab()
    assert "Ġthe" in pieces
    figures = measure(tokenizer, [" the the", " é", ""])
    # Ġthe Ġthe, then Ġ and two bytes
    assert (figures.documents, figures.bytes, figures.characters, figures.words, figures.tokens) == (3, 11, 10, 3, 5)
    assert figures.tokens_per_word == pytest.approx(5 / 3)
    assert figures.tokens_per_character == pytest.approx(0.5)
    assert figures.tokens_per_byte == pytest.approx(5 / 11)
    assert figures.bytes_per_token == pytest.approx(11 / 5)
    assert figures.single_token_words == pytest.approx(2 / 3)
    assert figures.vocabulary_used == pytest.approx(4 / 418)
    power_sum = 0.4**2.5 + 3 * 0.2**2.5
    assert figures.renyi_efficiency == pytest.approx(math.log(power_sum) / -1.5 / math.log(418))
    assert (figures.parallel_documents, figures.premium) == (0, None)


def test_no_text_gives_zeros(base):
    figures = measure(base, [])
    assert (figures.tokens, figures.tokens_per_word, figures.bytes_per_token) == (0, 0, 0)
    assert (figures.single_token_words, figures.vocabulary_used, figures.renyi_efficiency) == (0, 0, 0)


def test_special_tokens_in_the_text_are_no_use_of_the_vocabulary(base):
    figures = measure(base, [base.tokenizer.id_to_token(base.eos_id)])
    assert (figures.vocabulary_used, figures.renyi_efficiency) == (0, 0)


def test_a_sentencepiece_word_counts_with_its_space(bases):
    assert "▁the" in bases["sentencepiece"].tokenizer.get_vocab()
    assert measure(bases["sentencepiece"], ["the the"]).single_token_words == 1


def test_a_unigram_tokenizer_is_measured_too(tmp_path):
    texts = make_texts("en", 100)
    with (tmp_path / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=chain.from_iterable(map(str.splitlines, texts)),
            model_writer=file,
            model_type="unigram",
            vocab_size=320,
            byte_fallback=True,
            minloglevel=2,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
        )
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    figures = measure(read_tokenizer(tmp_path), texts)
    assert figures.tokens == sum(map(len, model.encode(texts)))
    assert figures.single_token_words > 0


def test_a_tally_gives_the_tokens_of_every_text_and_batches_do_not_matter(base):
    texts = [*make_texts("ru", 20), ""]
    tally = Tally(base)
    lengths = [length for text in texts for length in tally.add([text])]
    assert lengths == [len(base.tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    assert tally.describe() == measure(base, texts)


def test_renyi_efficiency_by_hand():
    # p = 1/2, 1/4, 1/4, 0: H = log(2^-2.5 + 2 * 2^-5) / -1.5, over log 4
    by_hand = math.log2(2**-2.5 + 2**-4) / -1.5 / 2
    assert count_renyi_efficiency(np.array([2, 1, 1, 0])) == pytest.approx(by_hand)
    assert by_hand == pytest.approx(0.6877, abs=1e-4)


@given(st.lists(st.integers(0, 10**6), min_size=2, max_size=20).filter(any))
def test_renyi_efficiency_is_a_share_whatever_the_order_and_scale(counts):
    found = count_renyi_efficiency(np.array(counts))
    assert -1e-9 <= found <= 1 + 1e-9
    assert count_renyi_efficiency(3 * np.array(sorted(counts))) == pytest.approx(found, abs=1e-9)


def test_renyi_efficiency_of_even_and_of_one_sided_use():
    assert count_renyi_efficiency(np.full(100, 7)) == pytest.approx(1)
    assert count_renyi_efficiency(np.array([0, 5, 0])) == pytest.approx(0)
    assert count_renyi_efficiency(np.zeros(5)) == 0
    assert count_renyi_efficiency(np.array([5])) == 0
