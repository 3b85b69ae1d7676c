from collections import Counter

import numpy as np
import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from megatron_adapt.tokenizer import runs
from megatron_adapt.tokenizer.filters import list_runs, make_filter
from megatron_adapt.tokenizer.runs import RunCounter
from tests.tokenizer.bases import ODD_TEXTS, make_texts

ALL, CYRILLIC, JAPANESE = ((), ("Cyrillic",), ("Han", "Hiragana", "Katakana"))
# Letters of listed and other scripts, digits of scripts, marks of one script, of all and of none, symbols of a script,
# joiners, white space, controls, and characters of no use.
TRICKY = (
    "aéяЁ日か〇ーｶ゙゚\u3099\u0301كَ\u064b،ก็१े€©ªʰ᠎ⴰ"
    "²Ⅷ.-!▁ \t\n\r\0\x85\xa0\u200d\u200b\u3000\ufeff\U0001f469\U0001d165\u0378\ue000"
)

compiled = pytest.mark.skipif(runs._csrc is None, reason="the C++ extension is not built")


def test_words_by_hand():
    counts = RunCounter(make_filter(()).character).count(["the cat, the", "▁the  12日本\nthe"])
    assert counts == {"▁the": 3, "▁cat": 1, ",": 1, "▁1": 1, "2": 1, "日本": 1, "the": 1}
    counts = RunCounter(make_filter(CYRILLIC).character).count(["кот and кот.", "кот"])
    assert counts == {"▁кот": 3}


def test_no_text_has_no_words():
    assert RunCounter(make_filter(()).character).count(["", " ", "\n"]) == {}


def test_the_expression_serves_without_the_extension(monkeypatch):
    texts = [*ODD_TEXTS, *make_texts("ja", 5)]
    expected = RunCounter(make_filter(()).character).count(texts)
    monkeypatch.setattr(runs, "_csrc", None)
    assert RunCounter(make_filter(()).character).count(texts) == expected


@compiled
@pytest.mark.parametrize("scripts", [ALL, CYRILLIC, JAPANESE])
def test_the_twins_agree_on_every_character(scripts):
    counter = RunCounter(make_filter(scripts).character)
    characters = regex.findall(r"[^\p{Cn}\p{Co}\p{Cs}]", "".join(map(chr, range(0x110000))))
    characters += ["\u0378", "\ue000", "\U0010ffff"]
    for before, behind in (("", ""), ("a", "b"), ("日", "日"), (".", "."), ("\u0301", "1"), ("ك", " ")):
        texts = ["\n".join(f"{before}{character}{behind}" for character in characters)]
        assert counter.count(texts) == counter.count_python(texts)


@compiled
@given(st.lists(st.text(st.sampled_from(TRICKY), max_size=30), max_size=5), st.sampled_from([ALL, CYRILLIC, JAPANESE]))
def test_the_twins_agree_on_any_text(texts, scripts):
    counter = RunCounter(make_filter(scripts).character)
    assert counter.count(texts) == counter.count_python(texts)


@compiled
def test_many_words_and_very_long_ones_are_kept():
    words = [f"x{'日' * (number % 50)}" for number in range(100)] + ["y" * 3_000_000, "z" * 2_000_000, "a"]
    texts = [" ".join(words), *(str(chr(0x4E00 + number) * 9) for number in range(20_000))]
    counter = RunCounter(make_filter(()).character)
    assert counter.count(texts) == counter.count_python(texts)


@compiled
def test_wrong_tables_are_refused():
    classes = np.zeros(0x110000, np.uint8)
    one = np.zeros(1, np.uint8), np.zeros(1, np.uint64), np.zeros(1, bool)
    assert runs._csrc.count_runs(["a"], classes, *one) == {}
    with pytest.raises(ValueError, match="one class a code point"):
        runs._csrc.count_runs(["a"], classes[1:], *one)
    with pytest.raises(ValueError, match="of a class that has no entry"):
        runs._csrc.count_runs(["a"], classes + 1, *one)
    with pytest.raises(ValueError, match="a text that is no string"):
        runs._csrc.count_runs([b"a"], classes, *one)


def test_every_kind_of_run_has_its_own_bit():
    assert len(list_runs("▁")) <= 64
    assert Counter(first for first, _ in list_runs("▁")).most_common(1)[0][1] == 1
