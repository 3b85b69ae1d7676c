import itertools
import logging
import math
import os
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_adapt.data import blend
from megatron_adapt.data.blend import (
    MAX_PLACE,
    MAX_TOTAL,
    count_prefix,
    count_steps_twin,
    interleave,
    interleave_twin,
    rank_windows,
    whole_weights,
)
from megatron_adapt.errors import ConfigError

_weights = st.one_of(
    st.lists(st.integers(0, 300), min_size=1, max_size=40),
    st.lists(st.sampled_from([1, 2, 3, 5000]), min_size=2, max_size=5),  # extremely unequal
    st.integers(1, 60).map(lambda count: [7] * count),  # all deadlines tie
    st.lists(st.integers(1, MAX_TOTAL // 40), min_size=1, max_size=40),  # a period never seen whole
).filter(any)
_counts = st.integers(0, 700)


def _start(weights: list[int]) -> list[int]:
    return [0] * len(weights)


def _order(weights: list[int], count: int) -> np.ndarray:
    return interleave(weights, _start(weights), count)


def _check_prefixes(order: np.ndarray, weights: list[int]) -> None:
    """Exact, in integers of any size."""
    total = sum(weights)
    for source, weight in enumerate(weights):
        read = np.cumsum(order == source).tolist()
        assert all(abs(had * total - step * weight) < total for step, had in enumerate(read, 1))


@settings(max_examples=150, deadline=None)
@given(weights=_weights, count=_counts)
def test_every_prefix_is_within_one_window_of_every_share(weights, count):
    _check_prefixes(_order(weights, count), weights)
    _check_prefixes(interleave_twin(weights, _start(weights), count), weights)


@settings(max_examples=100, deadline=None)
@given(weights=st.lists(st.integers(0, 60), min_size=1, max_size=20).filter(any))
def test_after_a_period_totals_are_exact_and_the_order_repeats(weights):
    total = sum(weights)
    order = _order(weights, 3 * total)
    assert np.bincount(order[:total], minlength=len(weights)).tolist() == weights
    np.testing.assert_array_equal(order, np.tile(order[:total], 3))
    doubled = [3 * weight for weight in weights]  # only proportions matter
    np.testing.assert_array_equal(_order(doubled, 3 * total), order)


@settings(max_examples=150, deadline=None)
@given(weights=_weights, cuts=st.lists(_counts, max_size=6))
def test_an_order_continued_from_its_counts_is_the_whole_order(weights, cuts):
    whole = _order(weights, 700)
    for continue_order in (interleave, interleave_twin):
        placed = np.zeros(len(weights), np.int64)
        for first, last in itertools.pairwise([0, *sorted(cuts), 700]):
            part = continue_order(weights, placed.tolist(), last - first)
            np.testing.assert_array_equal(part, whole[first:last])  # also: a longer run begins as a shorter one
            placed += np.bincount(part, minlength=len(weights))


@settings(max_examples=150, deadline=None)
@given(weights=_weights, skipped=_counts, count=_counts)
def test_compiled_order_equals_the_twin(weights, skipped, count):
    if os.environ.get("MEGATRON_ADAPT_REQUIRE_CSRC") != "1":
        pytest.importorskip("megatron_adapt._csrc")
    assert blend._csrc is not None
    placed = count_steps_twin(weights, _start(weights), skipped)
    arrays = np.array(weights, np.int64), placed, count
    expected = interleave_twin(weights, placed.tolist(), count)
    np.testing.assert_array_equal(blend._csrc.interleave(*arrays), expected)
    np.testing.assert_array_equal(blend._csrc.count_steps(*arrays), np.bincount(expected, minlength=len(weights)))


@settings(max_examples=300, deadline=None)
@given(weights=_weights, count=st.integers(0, 3000))
def test_counts_of_a_prefix_are_those_of_the_order(weights, count):
    expected = np.bincount(_order(weights, count), minlength=len(weights))
    np.testing.assert_array_equal(count_prefix(weights, count), expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blend, "_MAX_STEPS", -1)  # by a walk
        np.testing.assert_array_equal(count_prefix(weights, count), expected)
        patch.setattr(blend, "_csrc", None)
        np.testing.assert_array_equal(count_prefix(weights, count), expected)


def test_counts_far_out_are_found_without_going_there():
    weights = list(whole_weights([Fraction(1, number) for number in range(1, 200)]))
    place = 10**15
    counts_K = count_prefix(weights, place)
    assert counts_K.sum() == place
    total = sum(weights)
    assert all(
        abs(count * total - place * weight) < total for count, weight in zip(counts_K.tolist(), weights, strict=True)
    )
    following = np.bincount(interleave(weights, counts_K, 5000), minlength=len(weights))
    np.testing.assert_array_equal(count_prefix(weights, place + 5000), counts_K + following)


@pytest.mark.parametrize("number", [1, 2, 3, 10, 100, 1000])
@pytest.mark.parametrize("unequal", [False, True])
def test_any_number_of_equal_and_unequal_sources_keep_their_shares(number, unequal):
    # 0.999 for the first, 0.001 for all others together
    shares = [Fraction(999 * (number - 1) if unequal and at == 0 else 1) for at in range(number)]
    weights = list(whole_weights(shares)) if number > 1 else [1]
    order = _order(weights, 20_000)  # several of the blocks that the compiled order is made in
    np.testing.assert_array_equal(order, interleave_twin(weights, _start(weights), 20_000))
    total, steps = sum(weights), np.arange(1, 20_001)
    for source, weight in enumerate(weights):
        assert abs(np.cumsum(order == source) * total - steps * weight).max() < total


@pytest.mark.parametrize("periods", [1, 1 << 9, (MAX_PLACE >> 50) - 1])
def test_places_far_out_are_exact(periods):
    weights = [MAX_TOTAL - 10**6 - 3, 10**6, 2, 1]
    assert sum(weights) == MAX_TOTAL
    near = count_steps_twin(weights, _start(weights), 1000)
    far = [had + periods * weight for had, weight in zip(near.tolist(), weights, strict=True)]
    expected = interleave_twin(weights, near.tolist(), 3000)
    np.testing.assert_array_equal(interleave_twin(weights, far, 3000), expected)
    np.testing.assert_array_equal(interleave(weights, far, 3000), expected)
    arrays = np.array(weights, np.int64), np.array(far, np.int64), 3000  # whose products overflow 64 bits
    np.testing.assert_array_equal(interleave_twin(*arrays), expected)
    np.testing.assert_array_equal(interleave(*arrays), expected)
    assert count_prefix(weights, 1000 + periods * MAX_TOTAL).tolist() == far


@given(order=st.lists(st.integers(0, 5), max_size=40))
def test_windows_are_ranked_within_their_source(order):
    assert rank_windows(np.array(order, np.uint16)).tolist() == [order[:at].count(one) for at, one in enumerate(order)]


def test_hand_counted_orders():
    for order in (interleave, interleave_twin):
        assert order([3, 1], [0, 0], 4).tolist() == [0, 0, 0, 1]  # deadlines 2, 3, 4 and 4: the first wins the tie
        assert order([1, 3], [0, 0], 4).tolist() == [1, 1, 0, 1]
        assert order([2, 2], [0, 0], 4).tolist() == [0, 1, 0, 1]
        assert order([0, 2], [0, 0], 3).tolist() == [1, 1, 1]
        assert order([1, 3], [0, 2], 5).tolist() == [0, 1, 1, 1, 0]
    assert interleave([], [], 0).tolist() == count_prefix([], 0).tolist() == []


def test_counts_of_a_run_as_weights_give_the_order_of_that_run():
    # Finished sources leave the field in an order of exactly these counts; a period of the stream is the same.
    counts = [13, 7, 1, 0, 29]
    jobs = sorted(
        (-(-j * 50 // count), source, (j - 1) * 50 // count)
        for source, count in enumerate(counts)
        for j in range(1, count + 1)
    )
    expected = []
    for step in range(50):
        job = next(job for job in jobs if job[2] <= step)
        jobs.remove(job)
        expected.append(job[1])
    assert _order(counts, 50).tolist() == expected


def test_every_window_meets_its_release_and_deadline():
    weights = [13, 7, 1, 29]
    total, order = sum(weights), _order(weights, 150)
    for source, weight in enumerate(weights):
        for j, step in enumerate(np.flatnonzero(order == source)):
            assert j * total // weight <= step < -(-(j + 1) * total // weight)


# ---------------------------------------------------------------- weights


@settings(max_examples=100, deadline=None)
@given(shares=st.lists(st.fractions(0, 1, max_denominator=30).filter(bool), min_size=1, max_size=8))
def test_shares_of_a_common_denominator_become_exact_weights(shares):
    weights = whole_weights(shares)
    if math.lcm(*(share.denominator for share in shares)) * sum(shares) < MAX_TOTAL:
        assert [Fraction(weight, sum(weights)) for weight in weights] == [share / sum(shares) for share in shares]
        assert math.gcd(*weights) == 1
    assert sum(weights) <= MAX_TOTAL
    assert whole_weights([5 * share for share in shares]) == weights


def test_hand_counted_weights():
    assert whole_weights([Fraction("0.9"), Fraction("0.1")]) == (9, 1)
    assert whole_weights([Fraction(1, 2), Fraction(1, 3), Fraction(1, 6)]) == (3, 2, 1)
    assert whole_weights([Fraction(7)]) == (1,)
    assert whole_weights([Fraction(MAX_TOTAL - 1), Fraction(1)]) == (MAX_TOTAL - 1, 1)


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(st.integers(1, 1 << 80), min_size=2, max_size=30), tiny=st.integers(0, 3))
def test_other_shares_are_rounded_to_within_one_part_of_the_total(parts, tiny):
    shares = [Fraction(part) for part in [*parts, (1 << 81) + 1]] + [Fraction(1, 1 << 40)] * tiny
    weights = whole_weights(shares)
    whole = sum(shares)
    if math.lcm(*((share / whole).denominator for share in shares)) > MAX_TOTAL:
        assert sum(weights) == MAX_TOTAL
        for share, weight in zip(shares[:-1] if tiny else shares, weights, strict=False):
            assert abs(share / whole * MAX_TOTAL - weight) < 1 + weights.count(1)
    assert min(weights) >= 1
    _check_prefixes(_order(list(weights), 200), list(weights))


def test_a_share_too_small_for_a_weight_gets_the_least_one():
    weights = whole_weights([Fraction(1, 3), Fraction(1, 1 << 70), Fraction(2, 3)])
    assert weights == (MAX_TOTAL // 3, 1, MAX_TOTAL - MAX_TOTAL // 3 - 1)


# ---------------------------------------------------------------- refusals


def test_missing_extension_is_logged_once_and_gives_the_same_order(monkeypatch, caplog):
    expected = _order([5, 3], 8).tolist()
    monkeypatch.setattr(blend, "_csrc", None)
    blend._warn_twin.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert _order([5, 3], 8).tolist() == _order([5, 3], 8).tolist() == expected
    assert [record.message for record in caplog.records] == [
        "megatron_adapt._csrc is not built; the blend is ordered by slower Python"
    ]


@pytest.mark.parametrize(
    ("weights", "placed", "count", "message"),
    [
        ([4, -1], [0, 0], 1, "-1 as weight; give a number of at least 0"),
        ([4, 1], [0, -2], 1, "-2 as number of windows placed; give a number"),
        ([4, 1], [0, 0], -3, "-3 as number of windows; give a number"),
        ([1] * 65537, [0] * 65537, 1, "65537 sources; merge some, at most 65536"),
        ([4, 1], [0], 1, "windows placed of 1 sources for 2 weights; give one each"),
        ([MAX_TOTAL, 1], [0, 0], 1, f"weights sum to {MAX_TOTAL + 1}; make them with whole_weights"),
        ([1], [MAX_PLACE], 1, f"place {MAX_PLACE + 1} lies beyond {MAX_PLACE}; order fewer windows"),
        ([0, 0], [0, 0], 1, "1 windows of no source; give one a weight above 0"),
        ([3, 1], [0, 2], 4, "0 windows of source 0 at place 2, a window or more from its share 3/4"),
        ([3, 1], [1, 3], 4, "1 windows of source 0 at place 4, a window or more from its share 3/4; continue the"),
    ],
)
def test_impossible_orders_are_refused(weights, placed, count, message):
    with pytest.raises(ConfigError, match=message):
        interleave(weights, placed, count)


def test_impossible_prefixes_are_refused():
    with pytest.raises(ConfigError, match="-3 as number of windows; give a number of at least 0"):
        count_prefix([1, 2], -3)


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ([], "no shares; name at least one source"),
        ([Fraction(1), Fraction(0)], "a share of 0 is not positive; leave the source out"),
        ([Fraction(1), Fraction(-1, 2)], "a share of -1/2 is not positive"),
        ([Fraction(1)] * 65537, "65537 sources; merge some"),
    ],
)
def test_impossible_shares_are_refused(shares, message):
    with pytest.raises(ConfigError, match=message):
        whole_weights(shares)
