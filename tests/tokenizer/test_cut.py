import os
from collections import Counter
from itertools import chain

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from megatron_adapt.errors import ConfigError, DataError
from megatron_adapt.tokenizer import cut
from megatron_adapt.tokenizer.cut import WordCutter, begins_words_at_spaces, count_batches, count_pre_tokens
from megatron_adapt.tokenizer.filters import make_filter, make_word_pattern
from megatron_adapt.tokenizer.learn import SPLIT_PATTERN
from megatron_adapt.tokenizer.pieces import from_letters, to_letters
from tests.tokenizer.bases import ODD_TEXTS, make_texts

SPLITS = {
    "llama 3": SPLIT_PATTERN,
    "qwen 2": SPLIT_PATTERN.replace("{1,3}", ""),
    "tekken": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
UNKNOWN = {"words of two": r"\S+ \S+|\s+|\S+", "spaces kept behind": r"\S+\s?|\s+", "no lone space": r" ?\p{L}+|\p{N}"}
# Letters, digits, contractions, punctuation, and everything that is white space to anyone.
ALPHABET = (
    "asd'stlſÉжק日か\u030112²-./\u200b\u180e\U0001f469 \t\n\r\v\f\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2003\u2028\u3000"
)
TEXT = st.text(st.one_of(st.sampled_from(ALPHABET), st.just(" ")), max_size=40)


def make_pre_tokenizer(pattern):
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


PRE_TOKENIZERS = {name: make_pre_tokenizer(pattern) for name, pattern in {**SPLITS, **UNKNOWN}.items()}
PRE_TOKENIZERS["gpt-2"] = pre_tokenizers.ByteLevel(add_prefix_space=False)
PRE_TOKENIZERS["gpt-2, space in front"] = pre_tokenizers.ByteLevel(add_prefix_space=True)


def count_plainly(base, texts, allowed):
    """Cut every text alone, as a whole."""
    counts = Counter()
    pattern = make_word_pattern("▁")
    normalizer, pre_tokenizer = base.tokenizer.normalizer, base.tokenizer.pre_tokenizer
    for text in texts:
        normal = normalizer.normalize_str(text) if normalizer else text
        if base.kind == "byte_level":
            counts.update(word for word, _ in pre_tokenizer.pre_tokenize_str(normal))
        else:
            spaced = normal.replace(" ", "▁")
            counts.update(pattern.findall(spaced if spaced.startswith("▁") else "▁" + spaced))
    spell = (lambda word: from_letters(word).decode(errors="ignore")) if base.kind == "byte_level" else str
    return Counter({word: count for word, count in counts.items() if allowed.character.search(spell(word))})


def make_cutter(base, allowed, segmenter=""):
    tokenizer = base.tokenizer
    return WordCutter(base.kind, tokenizer.normalizer, tokenizer.pre_tokenizer, allowed.character, segmenter)


def cut_at_vowels(text):
    """Cut behind every vowel, so that spaces begin, end and make up words."""
    word = ""
    for letter in text:
        word += letter
        if letter in "aeioуаиоを ":
            yield word
            word = ""
    yield word


def fail_on_z(text):
    if "z" in text:
        raise ValueError("no z")
    return [text]


def end_process(text):
    os._exit(1)


HERE = f"{__name__}:"


@pytest.mark.parametrize("scripts", [(), ("Cyrillic",), ("Han", "Hiragana", "Katakana")])
def test_counts_are_those_of_cutting_each_text_alone(base, scripts):
    texts = [*ODD_TEXTS, *chain.from_iterable(make_texts(language, 40) for language in ("en", "ru", "ja", "ar"))]
    allowed = make_filter(scripts)
    assert make_cutter(base, allowed).count(texts) == count_plainly(base, texts, allowed)


@given(st.lists(TEXT, max_size=5))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_counts_of_any_texts_are_those_of_cutting_each_alone(base, texts):
    allowed = make_filter(())
    assert make_cutter(base, allowed).count(texts) == count_plainly(base, texts, allowed)


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
@given(texts=st.lists(TEXT, max_size=5))
def test_pre_tokens_are_those_of_each_text_alone(name, texts):
    pre_tokenizer = PRE_TOKENIZERS[name]
    expected = Counter(word for text in texts for word, _ in pre_tokenizer.pre_tokenize_str(text))
    assert count_pre_tokens(pre_tokenizer, texts) == expected


def test_only_known_expressions_are_taken_apart_at_spaces():
    known = {name for name, item in PRE_TOKENIZERS.items() if begins_words_at_spaces(item)}
    assert known == {*SPLITS, "gpt-2", "gpt-2, space in front"}
    removed = pre_tokenizers.Split(Regex(SPLIT_PATTERN), "removed")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    assert not begins_words_at_spaces(pre_tokenizers.Sequence([removed, letters]))
    assert not begins_words_at_spaces(pre_tokenizers.Sequence([letters, pre_tokenizers.Digits()]))
    assert not begins_words_at_spaces(letters)


@pytest.mark.parametrize("name", ["llama 3", "gpt-2", "words of two"])
def test_no_repeated_part_is_lost_in_long_texts(name, monkeypatch):
    monkeypatch.setattr(cut, "_JOINED_PARTS", 3)
    texts = make_texts("en", 60)
    pre_tokenizer = PRE_TOKENIZERS[name]
    expected = Counter(word for text in texts for word, _ in pre_tokenizer.pre_tokenize_str(text))
    assert count_pre_tokens(pre_tokenizer, texts) == expected


# ---------------------------------------------------------------- segmenters


def test_words_of_a_segmenter_cut_runs_and_pre_tokens(bases):
    allowed = make_filter(())
    text = "no more pie\ndone"
    counts = make_cutter(bases["sentencepiece"], allowed, HERE + "cut_at_vowels").count([text])
    assert counts == {"▁no": 1, "▁mo": 1, "re": 1, "▁pi": 1, "e": 1, "do": 1, "ne": 1}
    counts = make_cutter(bases["byte_level"], allowed, HERE + "cut_at_vowels").count([text])
    assert counts == {"no": 1, "Ġmo": 1, "re": 1, "Ġpi": 1, "e": 1, "do": 1, "ne": 1}


def test_letters_that_a_pre_tokenizer_puts_in_front_stay_there(bases):
    pre_tokenizer = PRE_TOKENIZERS["gpt-2, space in front"]
    wanted = make_filter(()).character
    cutter = WordCutter("byte_level", None, pre_tokenizer, wanted, HERE + "cut_at_vowels")
    assert cutter.count(["nose か"]) == {"Ġno": 1, "se": 1, to_letters(" か".encode()): 1}


@given(st.lists(st.text(st.sampled_from("aeb 日を\n1"), max_size=20), max_size=3))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_segmenter_loses_no_letter(base, texts):
    allowed = make_filter(())
    whole = make_cutter(base, allowed).count(texts)
    parts = make_cutter(base, allowed, HERE + "cut_at_vowels").count(texts)
    assert spell_out(whole) == spell_out(parts)
    for word in parts:
        text = (from_letters(word).decode() if base.kind == "byte_level" else word).strip(" ▁\n")
        assert not set(text[:-1]) & set("aeioを")


def spell_out(counts):
    found = Counter()
    for word, count in counts.items():
        for letter in word:
            found[letter] += count * (letter not in "▁ĠĊ")
    return found


def test_an_unknown_segmenter_is_refused_before_any_text_is_read(base):
    unread = iter([["text"]])
    with pytest.raises(ConfigError, match="'mecab' is no segmenter"):
        list(count_batches(base, unread, make_filter(()), "mecab"))
    assert list(unread) == [["text"]]


# ---------------------------------------------------------------- processes


@pytest.fixture
def two_workers(monkeypatch):
    monkeypatch.setattr(cut, "_BATCHES_ALONE", 0)
    monkeypatch.setattr(cut, "_count_cores", lambda: 2)


def test_worker_processes_give_the_same_counts_in_order(bases, two_workers):
    base, allowed = bases["byte_level"], make_filter(())
    batches = [make_texts("ru", 5, seed) for seed in range(7)]
    expected = [make_cutter(base, allowed, HERE + "cut_at_vowels").count(batch) for batch in batches]
    assert list(count_batches(base, batches, allowed, HERE + "cut_at_vowels")) == expected


def test_a_mistake_in_a_worker_process_is_told(bases, two_workers):
    with pytest.raises(DataError, match=r"fail_on_z failed on ' buzz'\.\.\. \(ValueError: no z\)"):
        list(count_batches(bases["sentencepiece"], [["a"], ["buzz"]], make_filter(()), HERE + "fail_on_z"))


def test_a_worker_process_that_dies_is_told(bases, two_workers):
    with pytest.raises(DataError, match=r"reading the corpus: one of 2 processes was ended from outside"):
        list(count_batches(bases["byte_level"], [["a"]], make_filter(()), HERE + "end_process"))


def test_little_text_and_runs_are_counted_in_this_process(bases, monkeypatch):
    monkeypatch.setattr(cut, "_count_in_workers", None)
    monkeypatch.setattr(cut, "_count_cores", lambda: 2)
    batches = [["a b"]] * 5
    assert len(list(count_batches(bases["sentencepiece"], batches, make_filter(()), ""))) == 5
    assert len(list(count_batches(bases["byte_level"], batches[:2], make_filter(()), ""))) == 2
    monkeypatch.setattr(cut, "_count_cores", lambda: 1)
    assert len(list(count_batches(bases["byte_level"], batches, make_filter(()), HERE + "cut_at_vowels"))) == 5
