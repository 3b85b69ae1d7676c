from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_adapt.data.windows import EpochOrder, _round_keys, count_windows, permute


@settings(max_examples=150, deadline=None)
@given(size=st.one_of(st.integers(1, 70), st.integers(1, 5000)), seed=st.integers())
def test_permutation_is_a_bijection(size, seed):
    found = permute(np.arange(size), size, _round_keys("data", 0, seed))
    assert np.array_equal(np.sort(found), np.arange(size))


@pytest.mark.parametrize("size", [(1 << 40) + 7, 1 << 62])
def test_huge_permutations_stay_inside_and_do_not_repeat(size):
    found = permute(np.arange(size - 10_000, size), size, _round_keys("data", 0, 1))
    assert found.min() >= 0
    assert found.max() < size
    assert len(np.unique(found)) == 10_000


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 200), epochs=st.integers(1, 4), seed=st.integers(0, 9))
def test_every_epoch_reads_each_window_once(size, epochs, seed):
    order = EpochOrder(num_windows=size, fingerprint="data", seed=seed)
    epochs_N, windows_N = order.windows_of(np.arange(size * epochs))
    for epoch in range(epochs):
        assert sorted(windows_N[epochs_N == epoch]) == list(range(size))
    assert epochs_N.tolist() == [ordinal // size for ordinal in range(size * epochs)]


def test_single_and_many_ordinals_agree_in_any_grouping():
    order = EpochOrder(num_windows=37, fingerprint="data", seed=5)
    epochs_N, windows_N = order.windows_of(np.arange(150))
    assert [order.window_of(at) for at in range(150)] == list(zip(epochs_N, windows_N, strict=True))
    shuffled = np.random.default_rng(0).permutation(150)
    np.testing.assert_array_equal(order.windows_of(shuffled)[1], windows_N[shuffled])


def test_data_epoch_and_seed_each_change_the_order():
    base = EpochOrder(num_windows=1000, fingerprint="data", seed=5)
    first = base.windows_of(np.arange(1000))[1]
    others = [
        base.windows_of(np.arange(1000, 2000))[1],
        EpochOrder(num_windows=1000, fingerprint="data", seed=6).windows_of(np.arange(1000))[1],
        EpochOrder(num_windows=1000, fingerprint="more", seed=5).windows_of(np.arange(1000))[1],
    ]
    for other in others:
        assert (other == first).sum() < 10  # a random permutation keeps one place on average
    assert (np.diff(first) == 1).sum() < 10  # neighbours are torn apart


def test_order_is_the_same_on_every_machine():
    order = EpochOrder(num_windows=10, fingerprint="data", seed=1)
    assert order.windows_of(np.arange(10))[1].tolist() == [6, 5, 8, 3, 4, 2, 9, 0, 7, 1]


@pytest.mark.parametrize("size", [2, 3, 10, 50])
def test_every_window_is_as_likely_in_every_place(size):
    trials = 2000
    counts = np.zeros((size, size))
    for seed in range(trials):
        counts[np.arange(size), permute(np.arange(size), size, _round_keys("data", 0, seed))] += 1
    expected = trials / size
    assert abs(counts - expected).max() < 6 * expected**0.5


def test_all_orders_of_three_windows_occur():
    orders = Counter(tuple(permute(np.arange(3), 3, _round_keys("data", 0, seed)).tolist()) for seed in range(600))
    assert len(orders) == 6
    assert min(orders.values()) > 60


@pytest.mark.parametrize(("tokens", "windows"), [(0, 0), (1, 0), (4, 0), (5, 1), (8, 1), (9, 2), (401, 100)])
def test_windows_are_counted_with_one_token_of_overlap(tokens, windows):
    assert count_windows(tokens, 4) == windows
