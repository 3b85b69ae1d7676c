import sys

import pytest

from megatron_adapt.errors import ConfigError, DataError
from megatron_adapt.tokenizer.segment import make_segmenter
from tests.tokenizer.bases import ODD_TEXTS, make_texts


def cut_in_twos(text):
    return (text[at : at + 2] for at in range(0, len(text), 2))


def drop_spaces(text):
    return text.split()


def shout(text):
    return [text[:4], text[4:].upper()]


def fail(text):
    raise KeyError(text)


HERE = f"{__name__}:"


def test_no_segmenter_leaves_a_text_whole():
    assert list(make_segmenter("")("ab cd")) == ["ab cd"]


def test_a_function_is_named_by_its_module():
    assert list(make_segmenter(HERE + "cut_in_twos")("abcde")) == ["ab", "cd", "e"]
    assert list(make_segmenter(HERE + "cut_in_twos")("")) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mecab", r"tokenizer\.segmenter: 'mecab' is no segmenter; use fugashi or MODULE:FUNCTION"),
        (":cut", r"':cut' is no segmenter"),
        ("no_such_module:cut", r"'no_such_module:cut' cannot be imported \(No module named .*put its folder on PYTHON"),
        (HERE + "no_such_function", r"no_such_function' cannot be imported"),
    ],
)
def test_an_unknown_segmenter_is_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        make_segmenter(name)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("drop_spaces", "日本 語", r"drop_spaces makes '語' of ' 語'; the words it returns must be the text"),
        ("shout", "abcdefgh", r"shout makes 'EFGH' of 'efgh'"),
        ("fail", "abc", r"fail failed on 'abc'\.\.\. \(KeyError: 'abc'\); correct the segmenter or the text"),
    ],
)
def test_a_segmenter_that_changes_the_text_is_refused(name, text, message):
    with pytest.raises(DataError, match=message):
        list(make_segmenter(HERE + name)(text))


def test_a_missing_fugashi_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "fugashi", None)
    with pytest.raises(
        ConfigError, match=r"fugashi is not installed; install the extra: pip install 'megatron-adapt\["
    ):
        make_segmenter("fugashi")


def test_a_missing_dictionary_names_the_extra(monkeypatch):
    fugashi = pytest.importorskip("fugashi")

    def fail(*_):
        raise RuntimeError("\n---\nFailed initializing MeCab.\nmore")

    monkeypatch.setattr(fugashi, "Tagger", fail)
    with pytest.raises(ConfigError, match=r"finds no dictionary \(Failed initializing MeCab\.\); install the extra"):
        make_segmenter("fugashi")


def test_fugashi_cuts_words_and_keeps_every_text():
    pytest.importorskip("fugashi")
    segment = make_segmenter("fugashi")
    words = segment("私は東京で寿司を食べた。\n 次の行")
    assert {"私", "は", "東京", "寿司", "を", "\n", " 次"} <= set(words)
    for text in [*ODD_TEXTS, *make_texts("ja", 20), "a\0b 日本語\r\n\x85\u2028 終\n\n"]:
        assert "".join(segment(text)) == text
    assert segment("日本語\0東京都")[-2:] == ["\0東京", "都"]
