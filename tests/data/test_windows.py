import os
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_adapt.data import windows
from megatron_adapt.data.windows import EpochOrder, _draw_epoch, count_windows, locate_windows, permute

_T = 4


def _keys(seed: int) -> tuple[int, ...]:
    return _draw_epoch("data", 0, seed)[0]


def _order(num_windows: int, *, tail: int = 0, seed: int = 5, fingerprint: str = "data") -> EpochOrder:
    return EpochOrder(num_tokens=num_windows * _T + 1 + tail, seq_length=_T, fingerprint=fingerprint, seed=seed)


@settings(max_examples=150, deadline=None)
@given(size=st.one_of(st.integers(1, 70), st.integers(1, 5000)), seed=st.integers())
def test_permutation_is_a_bijection(size, seed):
    found = permute(np.arange(size), size, _keys(seed))
    assert np.array_equal(np.sort(found), np.arange(size))


@pytest.mark.parametrize("size", [(1 << 40) + 7, 1 << 62])
def test_huge_permutations_stay_inside_and_do_not_repeat(size):
    found = permute(np.arange(size - 10_000, size), size, _keys(1))
    assert found.min() >= 0
    assert found.max() < size
    assert len(np.unique(found)) == 10_000


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 200), epochs=st.integers(1, 4), seed=st.integers(0, 9), tail=st.integers(0, _T - 1))
def test_every_epoch_reads_each_window_once(size, epochs, seed, tail):
    epochs_N, windows_N, _ = _order(size, tail=tail, seed=seed).windows_of(np.arange(size * epochs))
    for epoch in range(epochs):
        assert sorted(windows_N[epochs_N == epoch]) == list(range(size))
    assert epochs_N.tolist() == [ordinal // size for ordinal in range(size * epochs)]


@settings(max_examples=60, deadline=None)
@given(num_tokens=st.integers(8, 400), seq_length=st.integers(1, 7), seed=st.integers(0, 9))
def test_every_token_is_a_target_once_an_epoch_but_for_the_tail_before_the_first_cut(num_tokens, seq_length, seed):
    order = EpochOrder(num_tokens=num_tokens, seq_length=seq_length, fingerprint="data", seed=seed)
    size = order.num_windows
    epochs_N, _, starts_N = order.windows_of(np.arange(3 * size))
    for epoch in range(3):
        targets = (starts_N[epochs_N == epoch][:, None] + np.arange(1, seq_length + 1)) % num_tokens
        tail = num_tokens - size * seq_length
        assert 1 <= tail <= seq_length
        dropped = {(order.first_token(epoch) - back) % num_tokens for back in range(tail)}
        assert sorted(targets.ravel().tolist()) == sorted(set(range(num_tokens)) - dropped)
        reads = (starts_N[epochs_N == epoch][:, None] + np.arange(seq_length + 1)) % num_tokens
        assert len(np.unique(reads)) == size * seq_length + 1  # a window never runs into the first cut again


def test_first_epoch_is_cut_from_the_first_token_and_every_other_elsewhere():
    order = _order(100_000)
    cuts = [order.first_token(epoch) for epoch in range(50)]
    assert cuts[0] == 0
    assert len(set(cuts)) == 50
    assert len({cut % _T for cut in cuts}) == _T  # not by whole windows only
    counts = np.bincount([_order(2).first_token(epoch) for epoch in range(1, 2001)], minlength=9)
    assert abs(counts - 2000 / 9).max() < 6 * (2000 / 9) ** 0.5
    assert [_order(100_000, seed=6).first_token(epoch) for epoch in range(50)] != cuts
    assert [_order(100_000, fingerprint="more").first_token(epoch) for epoch in range(50)] != cuts


def test_ordinals_in_any_grouping_give_the_same_windows():
    order = _order(37, tail=2)
    whole = order.windows_of(np.arange(150))
    shuffled = np.random.default_rng(0).permutation(150)
    for found, expected in zip(order.windows_of(shuffled), whole, strict=True):
        np.testing.assert_array_equal(found, expected[shuffled])
    for world_size in (1, 2, 4):  # each rank asks for its own windows
        for rank in range(world_size):
            mine = order.windows_of(np.arange(rank, 150, world_size))
            np.testing.assert_array_equal(mine.starts_N, whole.starts_N[rank::world_size])


def test_data_epoch_and_seed_each_change_the_order():
    first = _order(1000).windows_of(np.arange(1000)).windows_N
    others = [
        _order(1000).windows_of(np.arange(1000, 2000)).windows_N,
        _order(1000, seed=6).windows_of(np.arange(1000)).windows_N,
        _order(1000, fingerprint="more").windows_of(np.arange(1000)).windows_N,
    ]
    for other in others:
        assert (other == first).sum() < 10  # a random permutation keeps one place on average
    assert (np.diff(first) == 1).sum() < 10  # neighbours are torn apart


def test_order_is_the_same_on_every_machine():
    order = _order(10, seed=1)
    assert order.windows_of(np.arange(10)).windows_N.tolist() == [6, 5, 8, 3, 4, 2, 9, 0, 7, 1]
    assert [order.first_token(epoch) for epoch in range(5)] == [0, 2, 40, 20, 1]


@pytest.mark.parametrize("size", [2, 3, 10, 50])
def test_every_window_is_as_likely_in_every_place(size):
    trials = 2000
    counts = np.zeros((size, size))
    for seed in range(trials):
        counts[np.arange(size), permute(np.arange(size), size, _keys(seed))] += 1
    expected = trials / size
    assert abs(counts - expected).max() < 6 * expected**0.5


def test_all_orders_of_three_windows_occur():
    orders = Counter(tuple(permute(np.arange(3), 3, _keys(seed)).tolist()) for seed in range(600))
    assert len(orders) == 6
    assert min(orders.values()) > 60


def _need_extension() -> None:
    if os.environ.get("MEGATRON_ADAPT_REQUIRE_CSRC") != "1":
        pytest.importorskip("megatron_adapt._csrc")
    assert windows._csrc is not None


@settings(max_examples=100, deadline=None)
@given(data=st.data(), num_sources=st.integers(1, 4), seed=st.integers(0, 1 << 62))
def test_compiled_windows_equal_the_twin_and_those_of_each_source_alone(data, num_sources, seed):
    _need_extension()
    orders = []
    for at in range(num_sources):
        seq_length = data.draw(st.integers(1, 8192))
        num_tokens = data.draw(st.one_of(st.integers(seq_length + 1, 20 * seq_length), st.integers(1 << 20, 1 << 60)))
        orders.append(EpochOrder(num_tokens=num_tokens, seq_length=seq_length, fingerprint=str(at), seed=seed))
    sources = np.array(data.draw(st.lists(st.integers(0, num_sources - 1), max_size=20)), np.int64)
    ordinals = np.array(
        [data.draw(st.integers(0, 3 * orders[source].num_windows)) for source in sources.tolist()], np.int64
    )
    compiled = locate_windows(orders, sources, ordinals)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "_csrc", None)
        for found, expected in zip(compiled, locate_windows(orders, sources, ordinals), strict=True):
            np.testing.assert_array_equal(found, expected)
    for source, order in enumerate(orders):
        alone = order.windows_of(ordinals[sources == source])
        np.testing.assert_array_equal(compiled.starts_N[sources == source], alone.starts_N)


def test_a_hundred_thousand_random_windows_equal_the_twin(monkeypatch):
    _need_extension()
    order = EpochOrder(num_tokens=14_000_000_123, seq_length=4096, fingerprint="data", seed=3)
    ordinals = np.random.default_rng(1).integers(0, 7 * order.num_windows, 100_000)
    compiled = order.windows_of(ordinals)
    monkeypatch.setattr(windows, "_csrc", None)
    for found, expected in zip(compiled, order.windows_of(ordinals), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert len(np.unique(compiled.epochs_N)) == 7
    assert 0 <= compiled.starts_N.min() <= compiled.starts_N.max() < order.num_tokens


@pytest.mark.parametrize(("tokens", "size"), [(0, 0), (1, 0), (4, 0), (5, 1), (8, 1), (9, 2), (401, 100)])
def test_windows_are_counted_with_one_token_of_overlap(tokens, size):
    assert count_windows(tokens, 4) == size
