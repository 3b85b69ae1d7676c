import pytest

from megatron_adapt.config import CorpusSettings
from megatron_adapt.corpus.clean import RULES, Limits, find_reason, normalise


def find(text, script=None, **settings):
    return find_reason(text, Limits(CorpusSettings(**settings), script))


def test_every_rule_is_off_by_default():
    for text in ("", "a", "a a a a " * 500, "same line\n" * 50, "\u3042" * 300):
        assert find(text) is None


def test_length_counts_characters_not_bytes():
    assert find("\u3042\u3044", min_characters=3) == "short"
    assert find("\u3042\u3044\u3046", min_characters=3, max_characters=3) is None
    assert find("\u3042\u3044\u3046\u3048", max_characters=3) == "long"


def test_repeated_lines_count_by_their_characters():
    # Of 4 + 4 + 2 characters the second line of four is a repetition: 0.4.
    text = "abcd\n\n  abcd \nxy"
    assert find(text, max_repeated_lines=0.4) is None
    assert find(text, max_repeated_lines=0.39) == "repeated_lines"


def test_repeated_runs_cover_words_once_however_they_overlap():
    words = [f"w{number}" for number in range(10)]
    # The second ten words, and no other, lie in a run that occurred before.
    text = " ".join([*words, *words])
    assert find(text, max_repeated_runs=0.5) is None
    assert find(text, max_repeated_runs=0.49) == "repeated_runs"
    # A loop of one word: every word from the second on is covered.
    assert find("la " * 100, max_repeated_runs=0.98) == "repeated_runs"
    assert find("la " * 100, max_repeated_runs=0.99) is None


def test_scripts_without_spaces_are_counted_by_characters():
    text = "\u4eca\u65e5\u306f\u826f\u3044\u5929\u6c17\u3067\u3059\u306d" * 2
    assert find(text, max_repeated_runs=0.5) is None
    assert find(text, max_repeated_runs=0.49) == "repeated_runs"


def test_the_share_of_a_script_counts_letters_alone():
    import regex

    cyrillic = regex.compile(r"\p{Script_Extensions=Cyrillic}")
    text = "\u0430\u0431\u0432 abc 123 !!!"
    assert find(text, cyrillic, min_script_share=0.5) is None
    assert find(text, cyrillic, min_script_share=0.51) == "script"
    assert find("123", cyrillic, min_script_share=0.1) == "script"


@pytest.mark.parametrize(
    ("form", "expected"), [("none", "\uff21e\u0301"), ("NFC", "\uff21\u00e9"), ("NFKC", "A\u00e9")]
)
def test_normal_forms(form, expected):
    assert normalise("\uff21e\u0301", CorpusSettings(normal_form=form)) == expected


def test_the_first_rule_in_the_table_names_the_reason():
    assert list(RULES) == ["short", "long", "repeated_lines", "repeated_runs", "script"]
    assert find("a\na", min_characters=9, max_repeated_lines=0.1) == "short"
