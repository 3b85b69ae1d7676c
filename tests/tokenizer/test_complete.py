import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_adapt.tokenizer.accept import Acceptance, make_acceptance
from megatron_adapt.tokenizer.complete import Choice, append_complete
from megatron_adapt.tokenizer.filters import find_prefixes, make_filter
from megatron_adapt.tokenizer.pieces import read_tokenizer, to_letters
from megatron_adapt.tokenizer.words import strip_tokenizer


def choose(base, ranked, num_pieces, rare=(), prefixes="", scripts=()):
    allowed = make_filter(scripts)
    accept = Acceptance(base, allowed, find_prefixes(prefixes, allowed), frozenset())
    return Choice(base.kind, accept, ranked, order=sorted(ranked), rare=set(rare), num_pieces=num_pieces)


def encode(folder, text):
    return strip_tokenizer(read_tokenizer(folder)).encode(text).tokens


def test_the_first_that_are_accepted_are_taken_in_the_given_order(base):
    choice = choose(base, [b"zzz", b"the", b"bbb", b"rrr", b"aaa"], 2, rare={b"rrr"})
    assert choice.take() == [b"bbb", b"zzz"]
    assert choice.reasons == {"accepted": 2, "old piece": 1}
    choice = choose(base, [b"zzz", b"the", b"bbb", b"rrr", b"aaa"], 9, rare={b"rrr"})
    assert choice.take() == [b"aaa", b"bbb", b"zzz"]
    assert choice.reasons == {"accepted": 3, "old piece": 1, "rare": 1}


def test_joints_come_last_and_count_towards_the_size(base):
    choice = choose(base, [b"zqzqzq", b"zzz", b"bbb"], 4)
    choice.complete(b"zqzqzq", [b"z", b"q", b"z", b"q", b"zq"])
    assert choice.take() == [b"zqzqzq", b"zq", b"zqz", b"zqzq"]
    assert choice.reasons == {"accepted": 1, "joint": 3}
    # A piece whose joints do not fit makes room for later ones.
    choice = choose(base, [b"zqzqzq", b"zzz", b"bbb"], 3)
    choice.complete(b"zqzqzq", [b"z", b"q", b"z", b"q", b"zq"])
    assert choice.take() == [b"bbb", b"zzz"]
    assert choice.reasons == {"accepted": 2, "no room for its joints": 1}


def test_a_joint_that_is_chosen_itself_is_not_counted_twice(base):
    choice = choose(base, [b"zq", b"zqzqz", b"zqzq"], 4)
    choice.complete(b"zqzqz", [b"zq", b"zq", b"z"])
    assert choice.take() == [b"zq", b"zqzqz", b"zqzq"]


def test_characters_are_joined_before_they_are_joined_with_others(bases):
    data = "日本".encode()
    choice = choose(bases["byte_level"], [data], 9, prefixes="日本")
    choice.complete(data, [data[at : at + 1] for at in range(6)])
    assert choice.take() == [data, data[:2], data[:3], data[3:5], data[3:]]
    choice = choose(bases["sentencepiece"], [data], 9)
    choice.complete(data, [data[at : at + 1] for at in range(6)])
    assert choice.take() == [data, data[:3], data[3:]]


@pytest.mark.parametrize(
    "tokens",
    [
        [b"\xe6", b"\x97", b"\xa5\xe6", b"\x9c", b"\xac"],  # cut across the two characters
        ["日".encode(), b"x", "本".encode()],  # joined with another script
    ],
)
def test_a_piece_that_needs_a_joint_that_is_refused_is_dropped(bases, tokens):
    data = b"".join(tokens)
    choice = choose(bases["byte_level"], [data], 9, prefixes="日本", scripts=("Han",))
    choice.complete(data, tokens)
    assert choice.take() == []
    assert choice.reasons == {"unreachable": 1}


def test_a_piece_is_completed_once(base):
    choice = choose(base, [b"zqz", b"zzz"], 9)
    choice.complete(b"zqz", [b"z", b"q", b"z"])
    assert choice.take() == [b"zqz", b"zzz", b"zq"]
    choice.complete(b"zqz", [b"z", b"qz"])
    assert choice.take() == [b"zzz"]
    assert choice.reasons == {"unreachable": 1, "accepted": 1}


def test_a_piece_whose_joint_is_lost_is_dropped_with_it(base):
    choice = choose(base, [b"zqz"], 9)
    choice.complete(b"zqz", [b"z", b"q", b"z"])
    choice.complete(b"zq", [b"z", b"q"])
    choice.complete(b"zq", [b"z", b"q"])
    assert choice.take() == []


def test_a_piece_that_the_base_cuts_otherwise_comes_out_once_completed(base, tmp_path):
    # The base knows "the" and "in"; nothing joins "th" and "ein".
    choice = choose(base, [b"theinthe", b"ein"], 9)
    assert set(append_complete(base, choice, tmp_path)) == {"theinthe", "thein", "ein"}
    assert encode(tmp_path, "theinthe") == ["theinthe"]
    assert encode(tmp_path, "thein") == ["thein"]


def test_no_candidate_writes_nothing(base, tmp_path):
    assert append_complete(base, choose(base, [b"the"], 9), tmp_path) == []
    assert not list(tmp_path.iterdir())


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.text("theinrдоい本", min_size=2, max_size=7), min_size=1, max_size=12, unique=True), st.integers(1, 20)
)
def test_whatever_is_appended_is_reachable_and_fits(bases, tmp_path_factory, texts, num_pieces):
    ranked = [text.encode() for text in texts]
    for base in bases.values():
        folder = tmp_path_factory.mktemp("any")
        words = [to_letters(data) if base.kind == "byte_level" else data.decode() for data in ranked]
        accept = make_acceptance(base, words, make_filter(()), frozenset())
        choice = Choice(base.kind, accept, ranked, order=ranked, rare=set(), num_pieces=num_pieces)
        spelled = append_complete(base, choice, folder)
        assert len(spelled) == len(set(spelled)) <= num_pieces
        assert len(spelled) == choice.reasons["accepted"] + choice.reasons["joint"]
        for piece in spelled:
            assert encode(folder, piece) == [piece]
