import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_adapt.errors import ConfigError
from megatron_adapt.tokenizer.id_map import read_id_map
from megatron_adapt.tokenizer.pieces import read_tokenizer
from megatron_adapt.vocab.fill import plan_fill
from megatron_adapt.vocab.merge_tree import list_parts, weigh_olds
from megatron_adapt.vocab.rows import FillSources
from tests.helpers.tiny import write_byte_tokenizer, write_extended_tokenizer
from tests.vocab.matrices import Rows, collect, make_sources


def test_a_token_is_half_of_each_part_down_to_old_tokens():
    ranks = {("a", "b"): 0, ("ab", "c"): 1, ("d", "abc"): 2}
    leaves = {"a": [0], "b": [1], "c": [2], "d": [3]}
    assert weigh_olds("dabc", ranks, leaves) == {3: 1 / 2, 2: 1 / 4, 1: 1 / 8, 0: 1 / 8}
    # A part that is an old token is not halved.
    assert weigh_olds("dabc", ranks, {**leaves, "ab": [7]}) == {3: 1 / 2, 2: 1 / 4, 7: 1 / 4}
    # A character that was spelt by bytes shares its part among them.
    assert weigh_olds("ab", ranks, {"a": [4, 5], "b": [1]}) == {4: 1 / 4, 5: 1 / 4, 1: 1 / 2}


def test_the_tree_is_that_of_the_merges_in_their_order():
    # b c merges first, so "abc" is a + bc although ab + c is a merge too.
    ranks = {("b", "c"): 0, ("a", "b"): 1, ("ab", "c"): 2, ("a", "bc"): 3}
    assert list_parts("abc", ranks) == {"bc": ("b", "c"), "abc": ("a", "bc")}


def test_what_the_merges_do_not_build_has_no_weights():
    assert weigh_olds("ab", {}, {"a": [0], "b": [1]}) == {}
    assert weigh_olds("", {}, {"a": [0]}) == {}


@given(st.text("abc", min_size=1, max_size=8), st.permutations(["ab", "bc", "ca", "aa", "abc", "bca", "abcab", "aab"]))
def test_weights_sum_to_one_and_name_leaves_of_the_piece(piece, order):
    splits = [(name[:at], name[at:]) for name in order for at in range(1, len(name))]
    weights = weigh_olds(piece, {pair: at for at, pair in enumerate(splits)}, {"a": [0], "b": [1], "c": [2]})
    if weights:
        assert sum(weights.values()) == pytest.approx(1)
        assert set(weights) == {"abc".index(letter) for letter in piece}


def test_rows_of_a_made_tokenizer_and_head_rows_from_head_rows(tmp_path):
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the")]
    made = read_tokenizer(write_extended_tokenizer(write_byte_tokenizer(tmp_path / "b", 300), tmp_path / "m", merges))
    fill = plan_fill(
        dataclasses.replace(make_sources({}, 300, method="merge_tree"), id_map=read_id_map(made), made=made)
    )
    ids = made.tokenizer.get_vocab()
    for is_head in (False, True):
        rows_VH = torch.randn(300, 4)
        _, rows = collect(fill, Rows(rows_VH, is_head))
        space, t, h, e = (rows_VH[ids[piece]] for piece in ("Ġ", "t", "h", "e"))
        assert torch.allclose(rows[1], t / 4 + h / 4 + e / 2, atol=1e-6)
        assert torch.allclose(rows[2], space / 2 + t / 8 + h / 8 + e / 4, atol=1e-6)


def test_a_tokenizer_without_merges_is_refused(tmp_path):
    made = dataclasses.replace(read_tokenizer(write_byte_tokenizer(tmp_path)), algorithm="Unigram")
    sources = make_sources({300: [0]}, 300, method="merge_tree")
    with pytest.raises(ConfigError, match=r"vocab.method: merge_tree needs merges, and .* is a Unigram; use subtoken_"):
        plan_fill(FillSources(id_map=sources.id_map, settings=sources.settings, made=made))
