import pytest

from megatron_adapt.errors import ConfigError
from megatron_adapt.tokenizer.filters import find_prefixes, make_filter, make_word_pattern


@pytest.mark.parametrize(
    ("scripts", "text", "reason"),
    [
        (("Arabic",), " كتاب", None),
        (("Arabic",), "كِتَاب", None),  # with combining marks
        (("Arabic",), "می‌خواهم", None),  # with a zero-width non-joiner
        (("Arabic",), "،", None),  # common by script, Arabic by extension
        (("Arabic",), "book", "script"),
        (("Arabic",), "كتاب.", "script"),
        (("Arabic",), "كتاب كتاب", "script"),
        (("Arabic",), " ", "script"),
        (("Arabic",), "\u200d", "script"),
        (("Arabic",), "٣", None),
        (("Arabic",), "٣٤", "digits"),
        (("Han", "Hiragana", "Katakana"), "食べる。", None),
        (("Han", "Hiragana", "Katakana"), "ユーザー", None),
        (("Hiragana",), "食べる", "script"),
        ((), "anything ✓", None),
        ((), "2024", "digits"),
        ((), "a" * 16, None),
        ((), "a" * 17, "long"),
        ((), "\n\n", None),
    ],
)
def test_what_may_become_a_piece(scripts, text, reason):
    assert make_filter(scripts).refuse(text) == reason


@pytest.mark.parametrize("name", ["Arabix", "", "Han}|x{", "a b"])
def test_an_unknown_script_is_refused(name):
    with pytest.raises(ConfigError, match=r"tokenizer\.scripts: .* is no Unicode script"):
        make_filter((name,))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("▁the▁cat", ["▁the", "▁cat"]),
        ("▁abc123", ["▁abc", "1", "2", "3"]),
        ("▁日本語テキストabc", ["▁日本語テキスト", "abc"]),
        ("▁абвabc", ["▁абв", "abc"]),
        ("▁don't,stop", ["▁don", "'", "t", ",", "stop"]),
        ("▁▁▁a\n▁\tb", ["▁a", "b"]),
        ("▁cafe\u0301▁كِتَاب", ["▁cafe\u0301", "▁كِتَاب"]),
        ("▁👩‍👧", ["▁👩‍👧"]),
        ("▁ユーザー。", ["▁ユーザー", "。"]),
        ("▁", []),
    ],
)
def test_words_end_at_spaces_scripts_and_digits(text, words):
    assert make_word_pattern("▁").findall(text) == words


def test_prefixes_are_proper_beginnings():
    assert find_prefixes(["日", "é", "a"], make_filter(())) == {b"\xe6", b"\xe6\x97", b"\xc3"}


def test_prefixes_shared_with_letters_of_other_scripts_are_left_out():
    japanese, arabic = make_filter(("Han", "Hiragana", "Katakana")), make_filter(("Arabic",))
    # Half-width kana share two bytes with full-width Latin, the kana of a plane beyond the first share none.
    assert find_prefixes(["ｶ", "か", "。"], japanese) == {b"\xef", b"\xe3", b"\xe3\x81", b"\xe3\x80"}
    kana = "\U0001b000".encode()
    assert find_prefixes([kana.decode()], japanese) == {kana[:end] for end in (1, 3)}
    # The presentation forms of Arabic share theirs with Latin ligatures, or with nobody.
    assert find_prefixes(["\ufb50", "\ufdf2"], arabic) == {b"\xef", b"\xef\xb7"}
