import logging
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_adapt.data import blend
from megatron_adapt.data.blend import interleave, interleave_twin
from megatron_adapt.errors import ConfigError

_counts = st.one_of(
    st.lists(st.integers(0, 300), min_size=1, max_size=40),
    st.lists(st.sampled_from([1, 2, 3, 5000]), min_size=2, max_size=5),  # extremely unequal
    st.integers(1, 60).map(lambda count: [7] * count),  # all deadlines tie
)


def _check_prefixes(order: np.ndarray, windows: list[int]) -> None:
    total = sum(windows)
    steps = np.arange(1, total + 1)
    for source, count in enumerate(windows):
        lag = np.cumsum(order == source) * total - steps * count  # windows, times total
        assert abs(lag).max(initial=0) < max(total, 1)


@settings(max_examples=150, deadline=None)
@given(windows=_counts)
def test_every_prefix_is_within_one_window_and_totals_are_exact(windows):
    for order in (interleave_twin(windows), interleave(windows)):
        assert np.bincount(order, minlength=len(windows)).tolist() == windows
        _check_prefixes(order, windows)


@settings(max_examples=150, deadline=None)
@given(windows=_counts)
def test_compiled_order_equals_the_twin(windows):
    if os.environ.get("MEGATRON_ADAPT_REQUIRE_CSRC") != "1":
        pytest.importorskip("megatron_adapt._csrc")
    assert blend._csrc is not None
    np.testing.assert_array_equal(blend._csrc.interleave(np.array(windows, np.int64)), interleave_twin(windows))


@pytest.mark.parametrize("windows", [[99_900, 100], [1] + [99] * 999, [1, 99_999], [33_333, 33_334, 33_333]])
def test_long_unequal_blends_keep_their_shares(windows):
    order = interleave(windows)
    assert np.bincount(order).tolist() == windows
    _check_prefixes(order, windows)


def test_hand_counted_orders():
    assert interleave_twin([3, 1]).tolist() == [0, 0, 0, 1]  # deadlines 2, 3, 4 and 4: the first source wins the tie
    assert interleave_twin([1, 3]).tolist() == [1, 1, 0, 1]
    assert interleave_twin([2, 2]).tolist() == [0, 1, 0, 1]
    assert interleave_twin([0, 2]).tolist() == [1, 1]
    assert interleave([]).tolist() == []


def test_every_window_meets_its_release_and_deadline():
    windows = [13, 7, 1, 29]
    total, order = sum(windows), interleave(windows)
    for source, count in enumerate(windows):
        for j, step in enumerate(np.flatnonzero(order == source)):
            assert j * total // count <= step < -(-(j + 1) * total // count)


def test_missing_extension_is_logged_once_and_gives_the_same_order(monkeypatch, caplog):
    expected = interleave([5, 3]).tolist()
    monkeypatch.setattr(blend, "_csrc", None)
    monkeypatch.setattr(logging.getLogger("megatron_adapt"), "propagate", True)
    blend._warn_twin.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert interleave([5, 3]).tolist() == interleave([5, 3]).tolist() == expected
    assert [record.message for record in caplog.records] == [
        "megatron_adapt._csrc is not built; the blend is ordered by slower Python"
    ]


def test_impossible_counts_are_refused():
    with pytest.raises(ConfigError, match="-1 windows of a source; give a number of at least 0"):
        interleave([4, -1])
    with pytest.raises(ConfigError, match="65537 sources; merge some, at most 65536"):
        interleave([1] * 65537)
