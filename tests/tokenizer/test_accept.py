import pytest

from megatron_adapt.tokenizer.accept import Acceptance
from megatron_adapt.tokenizer.filters import find_prefixes, make_filter


@pytest.fixture
def accept(base):
    allowed = make_filter(("Cyrillic", "Han"))
    return Acceptance(base, allowed, find_prefixes("к日本", allowed), frozenset(["кб".encode()]))


def test_whole_characters_of_the_scripts_are_accepted(base, accept):
    space = " " if base.kind == "byte_level" else "▁"
    assert all(accept(text.encode()) for text in ("к", "ко", space + "ко", "日本"))
    assert accept.reasons == {"accepted": 4}


def test_only_the_beginning_of_a_character_may_be_cut_inside(base, accept):
    assert accept(b"\xe6\x97") == (base.kind == "byte_level")
    for piece in (b"\x97\xa5", b"\xe6\x97\xa5\xe6", b" \xd0", b"\xe2\x80", b"\xff\x01"):
        assert not accept(piece)
    assert accept.reasons["part of a character"] == (5 if base.kind == "byte_level" else 6)


def test_old_banned_and_foreign_pieces_are_refused_for_their_reason(accept):
    for piece in (b"in", b"e", "кб".encode(), b"xyz", "кz".encode(), ("к" * 17).encode()):
        assert not accept(piece)
    assert accept.reasons == {"old piece": 2, "unreachable": 1, "script": 2, "long": 1}


def test_what_the_pre_tokenizer_cuts_is_refused(bases):
    accept = Acceptance(bases["byte_level"], make_filter(()), frozenset(), frozenset())
    assert not accept("к л".encode())
    assert not accept(b"zq.zq")
    assert accept.reasons == {"cut by the pre-tokenizer": 2}


def test_a_byte_that_sentencepiece_falls_back_to_is_no_new_piece(bases):
    base = bases["sentencepiece"]
    assert base.tokenizer.token_to_id("~") is None
    accept = Acceptance(base, make_filter(()), frozenset(), frozenset())
    assert accept.refuse(b"~") == "old piece"
    assert not accept.reasons
