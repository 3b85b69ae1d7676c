"""Shares, limits and rounding, over random languages with random sources."""

import typing
from fractions import Fraction
from itertools import combinations
from math import floor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_adapt.config import StageSettings
from megatron_adapt.config.names import get_language
from megatron_adapt.data.shares import (
    SHORTFALLS,
    WITHIN,
    apportion,
    cap_budget,
    fail_short,
    fill_up,
    find_limits,
    nest_shares,
    redistribute,
    round_nested,
)
from megatron_adapt.errors import ConfigError

_STEP = 4


@st.composite
def draw_shares(draw):
    """Shares of 1 to 4 languages with 1 to 4 sources each; they sum to one."""
    parts = {}
    for at in range(draw(st.integers(1, 4))):
        for number in range(draw(st.integers(1, 4))):
            parts[f"l{at}/s{number}"] = Fraction(draw(st.integers(1, 1000)))
    total = sum(parts.values())
    return {source: part / total for source, part in parts.items()}


@st.composite
def draw_limited(draw):
    """Shares, and limits on some sources and languages."""
    shares = draw(draw_shares())
    available = {source: draw(st.integers(1, 300)) for source in shares}
    first = {source: draw(st.integers(0, 100)) for source in shares}
    names = [*shares, *{get_language(source): None for source in shares}]
    limited = draw(st.lists(st.sampled_from(names), unique=True))
    max_epochs = {name: draw(st.integers(1, 400)) / 100 for name in limited}
    return shares, available, first, max_epochs, find_limits(max_epochs, available, first)


def sum_languages(parts):
    sums = {}
    for source, part in parts.items():
        sums[get_language(source)] = sums.get(get_language(source), 0) + part
    return sums


def assert_close(windows, shares, total):
    """Every source is less than a window from its share of ``total``."""
    assert sum(windows.values()) == total
    for source, share in shares.items():
        assert abs(windows[source] - share * total) < 1


def assert_languages_close(windows, shares, total):
    for language, share in sum_languages(shares).items():
        assert abs(sum_languages(windows)[language] - share * total) < 1


def assert_within(windows, limits):
    for limit in limits:
        assert sum(windows[source] for source in limit.members) <= limit.windows


# ---------------------------------------------------------------- rounding


@settings(max_examples=200, deadline=None)
@given(shares=draw_shares(), total=st.integers(0, 10**12))
def test_sources_and_languages_are_rounded_to_within_a_window_of_their_share(shares, total):
    windows = round_nested({source: share * total for source, share in shares.items()}, total)
    assert_close(windows, shares, total)
    assert_languages_close(windows, shares, total)


@settings(max_examples=100, deadline=None)
@given(shares=draw_shares(), total=st.integers(0, 10**5), more=st.integers(0, 1000))
def test_apportioned_windows_are_close_to_their_share_and_grow_with_the_total(shares, total, more):
    windows, longer = apportion(shares, total), apportion(shares, total + more)
    assert_close(windows, shares, total)
    assert all(longer[source] >= count for source, count in windows.items())


def test_sources_of_a_language_need_not_stand_together():
    third = Fraction(1, 3)
    windows = round_nested({"ja/a": third * 10, "en": third * 10, "ja/b": third * 10}, 10)
    assert windows == {"ja/a": 4, "ja/b": 3, "en": 3}


# ---------------------------------------------------------------- nested shares


def make_stage(**changes):
    return StageSettings(**{"name": "s", "tokens": 1, "blend": {"ja": 0.9, "en": 0.1}, **changes})


def test_methods_are_those_of_the_settings():
    hints = typing.get_type_hints(StageSettings)
    assert tuple(WITHIN) == typing.get_args(hints["within"])
    assert tuple(SHORTFALLS) == typing.get_args(hints["shortfall"])


@settings(max_examples=100, deadline=None)
@given(
    blend=st.lists(st.integers(1, 10**6), min_size=1, max_size=4),
    sizes=st.lists(st.lists(st.integers(1, 10**13), min_size=1, max_size=5), min_size=4, max_size=4),
    within=st.sampled_from(list(WITHIN)),
    temperature=st.floats(1, 1000),
)
def test_shares_of_the_sources_sum_to_that_of_their_language(blend, sizes, within, temperature):
    named = {f"l{at}": float(part) for at, part in enumerate(blend)}
    tokens = {f"{language}/s{at}": n for language, own in zip(named, sizes, strict=False) for at, n in enumerate(own)}
    methods = {
        "size": {},
        "weight": {"weights": dict.fromkeys(tokens, 3.5)},
        "temperature": {"temperature": temperature},
    }
    shares = nest_shares(make_stage(blend=named, within=within, **methods[within]), tokens)
    assert list(shares) == list(tokens)
    assert sum(shares.values()) == 1
    assert sum_languages(shares) == {name: Fraction(part, sum(blend)) for name, part in zip(named, blend, strict=True)}


def test_sources_split_by_size_by_weight_and_by_temperature():
    tokens = {"ja/wiki": 100, "ja/web": 400, "en": 7}
    assert nest_shares(make_stage(), tokens) == {
        "ja/wiki": Fraction(18, 100), "ja/web": Fraction(72, 100), "en": Fraction(1, 10),
    }  # fmt: skip
    weights = {"ja/wiki": 0.7, "ja/web": 0.3}
    assert nest_shares(make_stage(within="weight", weights=weights), tokens) == {
        "ja/wiki": Fraction(63, 100), "ja/web": Fraction(27, 100), "en": Fraction(1, 10),
    }  # fmt: skip
    root = nest_shares(make_stage(within="temperature", temperature=2.0), tokens)  # 10 to 20
    assert {name: float(share) for name, share in root.items()} == pytest.approx(
        {"ja/wiki": 0.3, "ja/web": 0.6, "en": 0.1}
    )
    assert nest_shares(make_stage(within="temperature"), tokens) == nest_shares(make_stage(), tokens)


@given(small=st.integers(1, 10**9), factor=st.integers(2, 10**6), temperature=st.floats(1.1, 50))
def test_a_higher_temperature_leans_to_equal_parts(small, factor, temperature):
    tokens = {"ja/wiki": small, "ja/web": small * factor}
    size, warm, hot = (
        nest_shares(make_stage(blend={"ja": 1.0}, within="temperature", temperature=value), tokens)["ja/wiki"]
        for value in (1.0, temperature, 2 * temperature)
    )
    assert size < warm < hot < Fraction(1, 2)


# ---------------------------------------------------------------- limits


def test_limits_count_what_was_read_before():
    available, first = {"ja/wiki": 50, "ja/web": 30, "en": 100}, {"ja/wiki": 20, "ja/web": 90, "en": 0}
    limits = find_limits({"ja": 2, "ja/web": 2.5, "en": 0.29}, available, first)
    assert [(limit.name, limit.members, limit.windows) for limit in limits] == [
        ("ja", ("ja/wiki", "ja/web"), 50), ("ja/web", ("ja/web",), 0), ("en", ("en",), 29),
    ]  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(case=draw_limited(), total=st.integers(1, 400))
def test_fail_asks_for_the_shares_or_refuses(case, total):
    shares, *_, limits = case
    windows = apportion(shares, total)
    if all(sum(windows[source] for source in limit.members) <= limit.windows for limit in limits):
        assert fail_short(shares, limits, total, 1) == windows
    else:
        with pytest.raises(ConfigError, match=r"the stage asks for .* windows where max_epochs leaves .*; lower tok"):
            fail_short(shares, limits, total, 1)


@settings(max_examples=400, deadline=None)
@given(case=draw_limited(), total=st.integers(1, 400))
def test_redistribute_keeps_the_budget_and_the_limits(case, total):
    shares, _, _, max_epochs, limits = case
    ceilings = {limit.name: limit.windows for limit in limits}
    room = {language: ceilings.get(language, 10**9) for language in sum_languages(shares)}
    inside = sum_languages({source: ceilings.get(source, 10**9) for source in shares})
    if sum(min(room[language], inside[language]) for language in room) < total:
        with pytest.raises(ConfigError, match=r"max_epochs leaves .* windows of all sources for a stage of"):
            redistribute(shares, limits, total, 1)
        return
    windows = redistribute(shares, limits, total, 1)
    assert sum(windows.values()) == total
    assert_within(windows, limits)
    if windows == apportion(shares, total):
        return
    limited = {get_language(name) for name in max_epochs}
    free = {language: share for language, share in sum_languages(shares).items() if language not in limited}
    assert_in_proportion(sum_languages(windows), free)
    for language in sum_languages(shares):
        own = {name: share for name, share in shares.items() if get_language(name) == language}
        assert_in_proportion(windows, {name: share for name, share in own.items() if name not in max_epochs})
    assert all(sum_languages(windows)[language] > share * total - 1 for language, share in free.items())


@settings(max_examples=200, deadline=None)
@given(
    drawn=st.lists(st.tuples(st.integers(1, 100), st.integers(0, 100)), min_size=1, max_size=6),
    used=st.fractions(0, 1, max_denominator=50),
)
def test_filling_up_raises_all_to_one_level_or_their_ceiling(drawn, used):
    shares = {f"s{at}": Fraction(share) for at, (share, _) in enumerate(drawn)}
    ceilings = {f"s{at}": ceiling for at, (_, ceiling) in enumerate(drawn)}
    total = used * sum(ceilings.values())
    parts = fill_up(shares, ceilings, total)
    level = max(parts[name] / shares[name] for name in shares)
    assert sum(parts.values()) == total
    assert parts == {name: min(share * level, Fraction(ceilings[name])) for name, share in shares.items()}


def assert_in_proportion(windows, shares):
    """Whole numbers, each less than one from the same multiple of its share."""
    for (one, share), (other, second) in combinations(shares.items(), 2):
        assert abs(windows[one] * second - windows[other] * share) < share + second


def test_redistribute_turns_to_the_other_sources_of_the_language_first():
    shares = {"ja/wiki": Fraction(45, 100), "ja/web": Fraction(45, 100), "en": Fraction(7, 100), "fr": Fraction(3, 100)}
    available = {"ja/wiki": 10, "ja/web": 100, "en": 1000, "fr": 1000}
    none = dict.fromkeys(available, 0)
    own = redistribute(shares, find_limits({"ja/wiki": 2}, available, none), 100, 1)
    assert own == {"ja/wiki": 20, "ja/web": 70, "en": 7, "fr": 3}
    others = redistribute(shares, find_limits({"ja/wiki": 2, "ja": 0.5}, available, none), 100, 1)
    # Half of 110 windows is all that Japanese may give of 90; the others share 45 as 7 to 3.
    assert others == {"ja/wiki": 20, "ja/web": 35, "en": 32, "fr": 13}


@settings(max_examples=300, deadline=None)
@given(case=draw_limited(), steps=st.integers(1, 100))
def test_cap_keeps_the_ratio_and_as_much_of_the_budget_as_fits(case, steps):
    shares, *_, limits = case
    asked = steps * _STEP
    fitting = [
        floor(limit.windows / sum(shares[source] for source in limit.members)) // _STEP * _STEP for limit in limits
    ]
    expected = min([asked, *fitting])
    # Sources of a language that are each rounded up may break its limit by less than a window each.
    while expected and any(limit.count(apportion(shares, expected)) > limit.windows for limit in limits):
        expected -= _STEP
    if expected == 0:
        with pytest.raises(ConfigError, match=r"windows, too few for one step of 4 at its share; raise max_epochs or"):
            cap_budget(shares, limits, asked, _STEP)
        return
    windows = cap_budget(shares, limits, asked, _STEP)
    assert windows == apportion(shares, expected)
    assert_within(windows, limits)


@pytest.mark.parametrize("method", SHORTFALLS)
@settings(max_examples=50, deadline=None)
@given(shares=draw_shares(), steps=st.integers(1, 10**4))
def test_without_limits_all_methods_agree(method, shares, steps):
    total = steps * _STEP
    plain = apportion(shares, total)
    assert SHORTFALLS[method](shares, (), total, _STEP) == plain
