"""Rows of ``focus``: convex combinations of tokens that stay and that the corpus has; what is refused."""

import logging

import pytest
import torch

from megatron_adapt.errors import ConfigError, DataError
from megatron_adapt.vocab.fill import plan_fill
from megatron_adapt.vocab.focus import plan_focus
from tests.tokenizer.bases import write_corpus
from tests.vocab.matrices import Rows, collect
from tests.vocab.pairs import make_pair, make_pair_sources, name_tokens

TEXTS = ["dog hund cat", "hund dog cat", "a dog, a hund"] * 12 + ["do д!"] * 9


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair"))


def make_sources(pair, tmp_path, texts=TEXTS, **settings):
    corpus = write_corpus(tmp_path / "x.jsonl", texts)
    return make_pair_sources(pair, corpus, method="focus", vector_size=8, **settings)


def fill_weights(pair, sources):
    own, made = pair
    ids, rows = collect(plan_focus(sources), Rows(torch.eye(own.vocab_size)))
    assert ids == list(sources.id_map.pieces)
    return dict(zip(name_tokens(made, ids), rows, strict=True))


def test_rows_are_convex_combinations_of_tokens_that_stay_and_occur_in_the_corpus(pair, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    weights = fill_weights(pair, make_sources(pair, tmp_path))
    used = set()
    for name in ("hund", "Ġhund"):
        assert weights[name].min() >= 0
        assert float(weights[name].sum()) == pytest.approx(1, abs=1e-5)
        used |= set(name_tokens(pair[0], weights[name].nonzero()[:, 0]))
    # Not "h", which the new tokenizer makes nowhere, nor "do" and "!", which it makes nine times.
    assert used
    assert used <= {"dog", "Ġdog", "Ġcat", "a", "Ġ", ","}
    # In no text, or too seldom.
    assert not any(weights[name].any() for name in ("hu", "hun", "car", "Ð´"))
    assert "tokens that stay and 2 of 6 new ones have a vector; a new one combines" in caplog.text


def test_the_same_settings_give_the_same_rows_and_another_seed_others(pair, tmp_path):
    first, second, other = (
        fill_weights(pair, make_sources(pair, tmp_path, **settings)) for settings in ({}, {}, {"seed": 7})
    )
    assert all(torch.equal(row, second[name]) for name, row in first.items())
    assert not torch.equal(first["hund"], other["hund"])


def test_tokens_without_a_vector_take_the_mean_of_their_old_pieces(pair, tmp_path, caplog):
    rows_VH = torch.randn(pair[0].vocab_size, 4)
    sources = make_sources(pair, tmp_path)
    ids, rows = collect(plan_fill(sources), Rows(rows_VH))
    at = name_tokens(pair[1], ids).index("car")
    assert torch.allclose(rows[at], rows_VH[sources.id_map.pieces[ids[at]]].mean(0), atol=1e-6)
    assert "input matrix: 4 of 6 new tokens have no row by focus; 4 take the mean of their old pieces" in caplog.text


def test_a_corpus_without_anchors_or_without_new_tokens_is_refused_with_the_counts(pair, tmp_path):
    for texts, counts in (
        (["hund"] * 20, "0 of 264 tokens that stay and 1 of 6 new ones"),
        (["dog"] * 20, "1 of 264 tokens that stay and 0 of 6 new ones"),
        (["dog hund"], "0 of 264 tokens that stay and 0 of 6 new ones"),
    ):
        fill = plan_focus(make_sources(pair, tmp_path, texts))
        message = rf"corpus: {counts} occur 10 times as .*made cuts it, so focus has nothing to compare; name more text"
        with pytest.raises(DataError, match=message):
            next(fill(Rows(torch.eye(pair[0].vocab_size))))


def test_the_corpus_and_gensim_must_be_there(pair, tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"none\.jsonl: no such file"):
        plan_focus(make_pair_sources(pair, tmp_path / "none.jsonl", method="focus"))
    with pytest.raises(DataError, match=r"corpus: no documents in .*x\.jsonl; name some in the new language"):
        plan_focus(make_sources(pair, tmp_path, []))
    monkeypatch.setitem(__import__("sys").modules, "gensim.models", None)
    with pytest.raises(ConfigError, match="focus needs gensim, which is not installed; install the extra"):
        plan_focus(make_sources(pair, tmp_path))
