import re
import time

import nltk
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.tokenize.punkt import PunktSentenceTokenizer

from megatron_adapt.corpus.sentences import (
    learn_splitter,
    read_installed_splitter,
    read_splitter,
    write_splitter,
)
from megatron_adapt.errors import ConfigError, DataError

# "approx" always has a full stop, mostly before a word in lower case; every other last word stands without one too.
ENGLISH = [
    f"The wall is approx. {number} metres long and old. Nobody knows how long it was. It was built by the town. "
    "The town is small and nobody lives there now. An old house of approx. equal size stands beside the wall."
    for number in range(100, 160)
]


@pytest.fixture(scope="module")
def splitter():
    return learn_splitter(ENGLISH)


def test_abbreviations_of_the_corpus_end_no_sentence(splitter):
    assert "approx" in splitter.parameters.abbrev_types
    text = "It is approx. nine metres long. Nobody knows."
    assert splitter.split(text) == ["It is approx. nine metres long. ", "Nobody knows."]


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        (
            "今日は良い天気です。明日は？「雨だ。」と言った。",
            ["今日は良い天気です。", "明日は？", "「雨だ。」", "と言った。"],
        ),
        ("यह घर है। वह पेड़ है॥ अंत", ["यह घर है। ", "वह पेड़ है॥ ", "अंत"]),
        ("كيف حالك؟ أنا بخير.", ["كيف حالك؟ ", "أنا بخير."]),
        ("他来了。！“好。”她说", ["他来了。！", "“好。”", "她说"]),
        ("A heading\n\nText under it", ["A heading\n\n", "Text under it"]),
    ],
    ids=["ja", "hi", "ar", "zh", "blank_line"],
)
def test_plain_marks_end_a_sentence_without_a_space(splitter, text, sentences):
    assert splitter.split(text) == sentences


@settings(deadline=None, max_examples=60)
@given(st.text(st.sampled_from("ab .?!。？।\n\t\"'」\u3000é1"), max_size=60))
def test_sentences_end_to_end_are_the_text(splitter, text):
    sentences = splitter.split(text)
    assert "".join(sentences) == text
    assert all(sentence.strip() for sentence in sentences) or len(sentences) < 2


@pytest.mark.parametrize("run", [" ", "\t\u3000", ". ", "?!", "。", "ab"], ids=repr)
def test_time_grows_with_the_length_of_a_text_not_its_square(splitter, run):
    text = "a" + run * 40_000 + "\n" + run * 40_000 + "b"
    start = time.process_time()
    assert "".join(splitter.split(text)) == text
    assert time.process_time() - start < 12  # the square of a run of blanks would take 18 on a fast machine


@settings(deadline=None, max_examples=200)
@given(st.text(st.sampled_from("ab .?!\n\t\"')(A1"), max_size=60))
def test_where_punkt_alone_decides_sentences_are_those_of_nltk_but_for_white_space(splitter, text):
    text = re.sub(r"\n\s*\n", "\n", text)
    found = [sentence for item in splitter.split(text) if (sentence := item.rstrip())]
    assert found == PunktSentenceTokenizer(splitter.parameters).tokenize(text)


def test_leading_white_space_belongs_to_the_first_sentence(splitter):
    assert splitter.split(" \n\nA heading\n\nText. ") == [" \n\nA heading\n\n", "Text. "]
    assert splitter.split(" \n\n ") == [" \n\n "]


def test_what_was_learned_reads_back_equal(splitter, tmp_path):
    write_splitter(splitter, tmp_path / "punkt.json")
    again = read_splitter(tmp_path / "punkt.json")
    for name in ("abbrev_types", "collocations", "sent_starters", "ortho_context"):
        assert getattr(again.parameters, name) == getattr(splitter.parameters, name)
    assert [again.split(text) for text in ENGLISH] == [splitter.split(text) for text in ENGLISH]


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "punkt.json"
    path.write_text('{"abbrev_types": 3}')
    with pytest.raises(DataError, match=r"punkt\.json: no parameters of a sentence splitter; learn them again"):
        read_splitter(path)


def test_no_text_is_refused():
    with pytest.raises(DataError, match="sentences: no text to learn from"):
        learn_splitter([])


def test_an_installed_nltk_data_is_used(splitter, tmp_path, monkeypatch):
    folder = tmp_path / "tokenizers" / "punkt_tab" / "english"
    folder.mkdir(parents=True)
    (folder / "abbrev_types.txt").write_text("approx\n")
    for name in ("collocations.tab", "ortho_context.tab", "sent_starters.txt"):
        (folder / name).write_text("")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    assert read_installed_splitter("english").split("It is approx. nine. So.") == ["It is approx. nine. ", "So."]
    with pytest.raises(ConfigError, match="nltk_data has no punkt_tab/klingon; install it, or learn"):
        read_installed_splitter("klingon")
