"""Which tokens get which vectors, from each source; what is refused before and while they are made."""

import dataclasses
import logging

import numpy as np
import pytest
import torch

from megatron_adapt.errors import ConfigError, DataError
from megatron_adapt.vocab.vectors import divide_sentence, plan_vectors
from tests.tokenizer.bases import write_corpus
from tests.vocab.pairs import make_pair, make_pair_sources, name_tokens
from tests.vocab.test_encoder import write_bert

METHOD = {"method": "similarity_topk"}
WORDS = "dog 1 0\nhund 0.8 0.6\ncat 0 2\n"
TEXTS = ["dog hund cat", "hund dog. car", "Д д дд hund"] * 6


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair"))


def write(path, content):
    path.write_text(content, encoding="utf-8")
    return path


def make_by_name(pair, sources):
    """Return vectors of old and new tokens by piece."""
    return [
        dict(zip(name_tokens(tokenizer, found.ids), found.rows, strict=True))
        for tokenizer, found in zip(pair, plan_vectors(sources)(), strict=True)
    ]


def test_word_vectors_go_to_texts_without_bytes_and_special_tokens(pair, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = write(tmp_path / "x.vec", WORDS)
    olds, news = make_by_name(pair, make_pair_sources(pair, vectors=path, **METHOD))
    assert set(olds) == {"dog", "cat", "Ġdog", "Ġcat", "do", "ca", *"doghuncat"}
    assert set(news) == {"hu", "hun", "hund", "Ġhund"}
    for found in (*olds.values(), *news.values()):
        assert found.norm() == pytest.approx(1)
    assert torch.allclose(olds["Ġcat"], torch.tensor([0.0, 1.0]))
    assert torch.equal(news["Ġhund"], news["hund"])
    assert torch.allclose(news["hu"], torch.tensor([0.8, 0.6]))
    d = torch.tensor([1 + 0.8 / 2, 0.6 / 2])
    assert torch.allclose(olds["d"], d / d.norm())
    assert "similarity_topk: 15 of 264 old and 4 of 6 new tokens have a vector of 2 columns" in caplog.text


def test_a_space_is_rotated_onto_another_by_the_dictionary(pair, tmp_path, caplog):
    draw = np.random.default_rng(0)
    english = {word: draw.normal(size=4) for word in ("dog", "cat", "Cat", "ca", "one", "two")}
    rotation = np.linalg.qr(draw.normal(size=(4, 4)))[0]
    german = {"hund": "dog", "katze": "cat", "Katze": "Cat", "eins": "one", "zwei": "two", "car": "ca"}
    base = "".join(f"{word} {' '.join(map(str, row))}\n" for word, row in english.items())
    other = "".join(f"{word} {' '.join(map(str, 3 * english[of] @ rotation))}\n" for word, of in german.items())
    settings = {
        "base_vectors": write(tmp_path / "en.vec", base),
        "vectors": write(tmp_path / "de.vec", other),
        "dictionary": write(tmp_path / "d.tsv", "dog\thund\ncat\tkatze\none\teins\ntwo\tzwei\nnever\tseen\n"),
    }
    caplog.set_level(logging.INFO)
    olds, news = make_by_name(pair, make_pair_sources(pair, **METHOD, **settings))
    # Cat and Katze besides: in title case.
    assert "d.tsv: 5 pairs fix a rotation of 4 columns" in caplog.text
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
    for left, right in (("dog", "hund"), ("Ġdog", "Ġhund"), ("ca", "car")):
        assert torch.allclose(olds[left], news[right], atol=1e-5)
    write(settings["dictionary"], "dog\thund\n")
    make_by_name(pair, make_pair_sources(pair, **METHOD, **settings))
    assert caplog.records[-2].levelno == logging.WARNING


def test_an_encoder_sees_the_text_of_every_token(pair, tmp_path):
    olds, news = make_by_name(pair, make_pair_sources(pair, encoder=str(write_bert(tmp_path / "bert")), **METHOD))
    assert "Ġ" not in olds
    assert {"dog", "Ġdog", "!", "cat"} <= set(olds)
    assert set(news) == {"hu", "hun", "hund", "Ġhund", "car", "Ð´"}
    assert olds["dog"].shape == (12,)
    # All unknown to it.
    assert torch.allclose(news["hund"], olds["cat"], atol=1e-5)
    assert not torch.allclose(news["hund"], olds["dog"], atol=1e-2)


def test_vectors_are_trained_on_the_words_of_the_corpus(pair, tmp_path):
    corpus = write_corpus(tmp_path / "x.jsonl", TEXTS)
    sources = make_pair_sources(pair, corpus, vector_size=8, **METHOD)
    (olds, news), again = make_by_name(pair, sources), make_by_name(pair, sources)
    assert {"dog", "Ġdog", "do", "cat", "."} <= set(olds)
    assert not {"!", "Ġ", "x", "Ð"} & set(olds)
    assert set(news) == {"hu", "hun", "hund", "Ġhund", "car", "Ð´"}
    assert news["car"].shape == (8,)
    assert all(torch.equal(row, again[0][name]) for name, row in olds.items())
    assert all(torch.equal(row, again[1][name]) for name, row in news.items())


def test_long_texts_are_cut_into_sentences_and_nothing_is_lost():
    words = [str(at) for at in range(2500)]
    sentences = list(divide_sentence(words))
    assert [len(some) for some in sentences] == [1000, 1000, 500]
    assert [word for some in sentences for word in some] == words


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"vectors": "xyz 1 0\n"}, r"vocab\.method: similarity_topk finds vectors for 3 of 264 old and 0 of 6 new"),
        ({"vectors": "hund 0 0\n"}, "finds vectors for 0 of 264 old and 0 of 6 new tokens, so there is nothing to"),
        (
            {"vectors": WORDS, "base_vectors": "dog 1 2 3\n", "dictionary": "dog\thund\n"},
            r"base_vectors: vectors of 3 columns, and .*/vectors has 2; name two files of one width",
        ),
        (
            {"vectors": WORDS, "base_vectors": WORDS, "dictionary": "perro\tchien\ndog\tkatze\n"},
            r"dictionary: none of its 2 pairs is known to both files \(1 words to .*base_vectors, 0 to .*vectors\); is",
        ),
    ],
)
def test_vectors_that_compare_nothing_are_refused_with_the_counts(pair, tmp_path, files, message):
    paths = {name: write(tmp_path / name, content) for name, content in files.items()}
    make_vectors = plan_vectors(make_pair_sources(pair, **METHOD, **paths))
    with pytest.raises(DataError, match=message):
        make_vectors()


def test_what_is_missing_is_refused_before_anything_is_computed(pair, tmp_path):
    path, corpus = write(tmp_path / "x.vec", WORDS), tmp_path / "x.jsonl"
    with pytest.raises(DataError, match=r"none: cannot be read as word vectors"):
        plan_vectors(make_pair_sources(pair, vectors=tmp_path / "none", **METHOD))
    with pytest.raises(DataError, match=r"none: cannot be read as a dictionary"):
        plan_vectors(make_pair_sources(pair, vectors=path, base_vectors=path, dictionary=tmp_path / "none", **METHOD))
    with pytest.raises(ConfigError, match=r"vocab\.encoder: .*none cannot be loaded"):
        plan_vectors(make_pair_sources(pair, encoder=str(tmp_path / "none"), **METHOD))
    with pytest.raises(DataError, match=r"x\.jsonl: no such file"):
        plan_vectors(make_pair_sources(pair, corpus, **METHOD))
    with pytest.raises(DataError, match=r"corpus: no documents in .*x\.jsonl; name some in the new language"):
        plan_vectors(make_pair_sources(pair, write_corpus(corpus, []), **METHOD))
    with pytest.raises(ConfigError, match="similarity_topk reads the model's own tokenizer"):
        plan_vectors(dataclasses.replace(make_pair_sources(pair, vectors=path, **METHOD), own=None))


def test_training_needs_gensim_and_words_that_come_again(pair, tmp_path, monkeypatch):
    sources = make_pair_sources(pair, write_corpus(tmp_path / "x.jsonl", ["hund dog"]), **METHOD)
    with pytest.raises(DataError, match="corpus: no word occurs 5 times in it; name more text, or use --method subtok"):
        plan_vectors(sources)()
    monkeypatch.setitem(__import__("sys").modules, "gensim.models", None)
    with pytest.raises(ConfigError, match="similarity_topk without vectors or encoder needs gensim, which is not"):
        plan_vectors(sources)
