"""Lengths, odd rows, kept rows and neighbours of rows made by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_adapt.tokenizer.id_map import IdMap
from megatron_adapt.vocab import geometry, rows
from megatron_adapt.vocab.census import Census
from megatron_adapt.vocab.geometry import (
    choose_examples,
    compare_kept,
    describe_norms,
    find_nearest,
    find_odd_rows,
    read_all_norms,
)
from tests.vocab.matrices import Rows


def make_census(num_kept, num_new):
    """A model of which the first tokens stay; tokenizers are not read here."""
    new = range(num_kept, num_kept + num_new)
    id_map = IdMap(
        base_vocab_size=num_kept, vocab_size=num_kept + num_new, moved={}, pieces={index: [0] for index in new}
    )
    kept = np.arange(num_kept)
    return Census(base=None, made=None, id_map=id_map, kept=kept, kept_before=kept, new=np.array(new, np.int64))


def make_rows(lengths, width=3):
    """Rows along the axes in turn, of these lengths."""
    return torch.stack([torch.eye(width)[at % width] * length for at, length in enumerate(lengths)])


def test_lengths_are_those_of_the_rows_and_percentiles_lie_between_neighbours(monkeypatch):
    monkeypatch.setattr(geometry, "CHUNK_ROWS", 4)
    norms = read_all_norms(Rows(make_rows([*range(101), math.inf]).bfloat16()))
    assert norms[:101].tolist() == list(range(101))
    assert math.isnan(norms[101])
    assert describe_norms(norms) == {"1": 1, "5": 5, "25": 25, "50": 50, "75": 75, "95": 95, "99": 99}
    assert describe_norms(np.array([1.0, 2.0]))["25"] == 1.25
    assert describe_norms(np.array([math.nan])) == {}


def test_odd_rows_are_listed_with_their_tokens():
    # Kept lengths 0, 100, 101, ..., 200: the first percentile of those that are not zero is 101.
    lengths = [0, *range(100, 201), math.nan, 0, 100.9, 101, 500]
    names = [f"token {index}" for index in range(len(lengths))]
    found = find_odd_rows(np.array(lengths), make_census(102, 5), names)
    assert found["not_finite"] == {"count": 1, "tokens": [{"id": 102, "token": "token 102", "is_new": True}]}
    assert [item["id"] for item in found["zero"]["tokens"]] == [0, 103]
    assert [item["is_new"] for item in found["zero"]["tokens"]] == [False, True]
    assert found["tiny"] == {"count": 1, "tokens": [{"id": 104, "token": "token 104", "is_new": True}]}


def test_many_odd_rows_are_counted_and_the_first_fifty_listed():
    found = find_odd_rows(np.zeros(70), make_census(10, 60), [""] * 70)
    assert found["zero"]["count"] == 70
    assert len(found["zero"]["tokens"]) == 50
    assert found["tiny"]["count"] == 0


def test_kept_rows_are_compared_with_the_same_token_of_the_base(monkeypatch):
    monkeypatch.setattr(rows, "CHUNK_ROWS", 2)
    before = torch.tensor([[1.0, 0], [0, 1], [1, 1], [0, 0], [math.nan, 0]])
    after = torch.tensor([[9.0, 9], [0, 1], [1, 0], [2, 0], [0, 0], [1, 1]])
    census = make_census(5, 1)
    # New ids 1 to 5 are the old 1, 0, 2, 3, 4: the same, the same, turned by 45 degrees, zero before, NaN before.
    census = Census(
        **{
            **vars(census),
            "kept": np.array([1, 2, 3, 4, 5]),
            "kept_before": np.array([1, 0, 2, 3, 4]),
            "new": np.array([0]),
        }
    )
    found = compare_kept(Rows(before), Rows(after), census)
    assert found["identical"] == 3 / 5
    assert found["mean_cosine"] == pytest.approx((1 + 1 + math.sqrt(0.5)) / 3)


def test_kept_rows_that_cannot_be_compared_have_no_cosine():
    found = compare_kept(Rows(torch.zeros(3, 2)), Rows(torch.ones(4, 2)), make_census(3, 1))
    assert found == {"identical": 0, "mean_cosine": None}


def test_the_nearest_old_tokens_of_a_hand_made_row():
    rows_VH = torch.tensor([[10.0, 0], [3, 4], [0, 0], [0, 2], [-1, 0], [math.nan, 1], [1, 0], [0, 0]])
    near, none = find_nearest(Rows(rows_VH), [6, 7], [0, 1, 2, 3, 4, 5], count=3)
    assert [index for index, _ in near] == [0, 1, 3]
    assert [cosine for _, cosine in near] == pytest.approx([1, 0.6, 0])
    assert none == []
    # Zero rows and those that are not finite are no neighbours, and there may be fewer than asked for.
    assert [index for index, _ in find_nearest(Rows(rows_VH), [6], [2, 4, 5], count=3)[0]] == [4]


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 7), st.integers(1, 9))
def test_chunks_do_not_change_the_nearest_and_ties_go_to_the_lowest_id(seed, chunk, count):
    generator = torch.Generator().manual_seed(seed)
    rows_VH = torch.randint(-1, 2, (30, 3), generator=generator).float()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "CHUNK_ROWS", chunk)
        found = find_nearest(Rows(rows_VH), [25, 26], range(25), count)
    unit = torch.nn.functional.normalize(rows_VH.double())
    for query, near in zip([25, 26], found, strict=True):
        usable = [index for index in range(25) if rows_VH[index].any()] if rows_VH[query].any() else []
        expected = sorted(usable, key=lambda index: (-round(float(unit[index] @ unit[query]), 5), index))[:count]
        assert [index for index, _ in near] == expected


def test_examples_are_the_most_frequent_new_tokens_or_the_first():
    census = make_census(2, 4)
    assert choose_examples(census, np.array([9, 9, 1, 5, 0, 5]), 3) == [3, 5, 2]
    assert choose_examples(census, None, 3) == [2, 3, 4]
