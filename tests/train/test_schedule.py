"""Learning rates of every style, step by step, and what the settings refuse."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest

from megatron_adapt.config import StageSettings
from megatron_adapt.errors import ConfigError
from megatron_adapt.train.schedule import build_schedule, describe_change, describe_schedule, read_rates

STAGE = {"name": "s", "tokens": 1, "blend": {"xx": 1.0}, "lr": 1.0, "min_lr": 0.01, "lr_warmup_fraction": 0.1}
NUM_STEPS = 100


def list_rates(**settings):
    """Return the learning rate of each of 100 steps."""
    stage = StageSettings(**{**STAGE, **settings})
    group = {"max_lr": stage.lr, "min_lr": stage.min_lr, "wd_mult": 1.0}
    optimizer = SimpleNamespace(param_groups=[group])
    schedule = build_schedule(optimizer, stage, NUM_STEPS, 0.1)
    rates = []
    for _ in range(NUM_STEPS):
        schedule.step(1)
        rates.append(group["lr"])
    assert group["weight_decay"] == 0.1
    return rates


def test_every_style_warms_up_from_zero_in_a_straight_line():
    for style in ("cosine", "linear", "constant", "WSD", "infinite"):
        extra = {"constant": {"min_lr": 0.0}, "infinite": {"lr_constant": 0.3}}.get(style, {})
        assert list_rates(lr_decay_style=style, **extra)[:10] == pytest.approx([step / 10 for step in range(1, 11)])


def test_cosine_and_linear_end_at_the_last_step_and_constant_stays():
    cosine, linear = list_rates(), list_rates(lr_decay_style="linear")
    assert cosine[-1] == linear[-1] == pytest.approx(0.01)
    assert cosine[54] == pytest.approx(0.01 + 0.99 / 2)
    assert linear[54] == pytest.approx(0.01 + 0.99 / 2)
    assert cosine[30] > linear[30]
    assert set(list_rates(lr_decay_style="constant", min_lr=0.0)[9:]) == {1.0}


@pytest.mark.parametrize(
    ("style", "half"),
    [("linear", 0.5), ("cosine", 0.5), ("exponential", math.sqrt(2) - 1), ("minus_sqrt", 1 - math.sqrt(0.5))],
)
def test_wsd_is_constant_and_falls_over_its_last_share(style, half):
    rates = list_rates(lr_decay_style="WSD", lr_wsd_decay_fraction=0.2, lr_wsd_decay_style=style)
    assert set(rates[9:80]) == {1.0}
    assert rates[89] == pytest.approx(0.01 + 0.99 * half)
    assert rates[-1] == pytest.approx(0.01)


def test_infinite_cools_down_keeps_a_constant_and_anneals_exponentially():
    rates = list_rates(
        lr_decay_style="infinite", lr_constant=0.25, lr_cooldown_fraction=0.3, lr_wsd_decay_fraction=0.2, min_lr=0.0025
    )
    assert rates[24] == pytest.approx(0.25 + 0.75 / 2)  # half of the cool-down, a cosine
    assert rates[39:80] == pytest.approx([0.25] * 41)
    assert rates[89] == pytest.approx(0.25 * 0.01**0.5)
    assert rates[-1] == pytest.approx(0.0025)
    assert all(a >= b for a, b in pairwise(rates[9:]))


@pytest.mark.parametrize("style", ["cosine", "linear", "WSD", "infinite"])
def test_a_group_of_half_the_peak_and_end_learns_with_half_the_rate_at_every_step(style):
    extra = {"lr_constant": 0.3} if style == "infinite" else {}
    stage = StageSettings(**STAGE, lr_decay_style=style, decoupled_lr=0.5, decoupled_min_lr=0.005, **extra)
    body = {"max_lr": stage.lr, "min_lr": stage.min_lr, "default_config": True}
    vocabulary = {"max_lr": stage.decoupled_lr, "min_lr": stage.decoupled_last_lr, "is_decoupled_lr": True}
    optimizer = SimpleNamespace(param_groups=[body, vocabulary])
    schedule = build_schedule(optimizer, stage, NUM_STEPS, 0.1)
    rates = []
    for _ in range(NUM_STEPS):
        schedule.step(1)
        rates.append(read_rates(optimizer))
    assert [half for _, half in rates] == pytest.approx([rate / 2 for rate, _ in rates])
    assert [rate for rate, _ in rates] == list_rates(lr_decay_style=style, **extra)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"lr_wsd_decay_style": "cosine"},
            "lr_wsd_decay_style cosine has no effect with lr_decay_style cosine; leave it",
        ),
        ({"lr_decay_style": "constant"}, "min_lr 0.01 has no effect with lr_decay_style constant"),
        ({"lr_decay_style": "WSD", "lr_constant": 0.5}, "lr_constant 0.5 has no effect .*, or use infinite"),
        ({"lr_decay_style": "infinite"}, "lr 1.0, lr_constant 0.0 and min_lr 0.01 must fall and be > 0"),
        ({"lr_decay_style": "WSD", "lr_wsd_decay_fraction": 1.5}, "lr_wsd_decay_fraction 1.5 is not between 0 and 1"),
        (
            {"lr_decay_style": "infinite", "lr_constant": 0.5, "lr_cooldown_fraction": 0.9},
            r"lr_warmup_fraction \+ lr_wsd_decay_fraction \+ lr_cooldown_fraction is 1.1; use at most 1 in all",
        ),
    ],
)
def test_schedules_that_cannot_be_or_settings_without_effect_are_refused(settings, message):
    with pytest.raises(ConfigError, match=f"train.stages s: {message}"):
        StageSettings(**{**STAGE, **settings})


def describe(steps=50, rate=0.25, **settings):
    optimizer = SimpleNamespace(param_groups=[{"lr": rate, "max_lr": 1.0, "min_lr": 0.01, "wd_mult": 1.0}])
    schedule = build_schedule(optimizer, StageSettings(**{**STAGE, **settings}), steps, 0.1)
    return {**describe_schedule(schedule), "learning_rate": rate}


def test_a_changed_schedule_is_told_by_what_changed_and_an_unchanged_one_is_not():
    assert describe_change(describe(), describe()) == ""
    infinite = {"lr_decay_style": "infinite", "lr_constant": 0.3}
    before, now = describe(**infinite), describe(rate=0.4, **{**infinite, "lr_constant": 0.4})
    assert describe_change(before, now) == "learning rate: 0.25 at the save, now 0.4 (lr_constant 0.3, now 0.4)"
    # A later end is a change even where the rate of this step is the same.
    wsd = describe(lr_decay_style="WSD", lr_wsd_decay_fraction=0.2)
    said = "learning rate: 0.25 at the save, now 0.25 (wsd_decay_steps 10, now 5)"
    assert describe_change(wsd, describe(lr_decay_style="WSD")) == said
