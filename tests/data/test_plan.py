import logging
from pathlib import Path

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_adapt.config import StageSettings, TrainSettings
from megatron_adapt.data.plan import describe_plan, describe_stages, make_plan, plan_stages, read_plan, write_plan
from megatron_adapt.errors import ConfigError, DataError
from megatron_adapt.recipe import Recipe
from tests.data.token_files import count_up, make_tokens

_SIZES = {"seq_length": 10, "global_batch_size": 4, "seed": 1}
_AVAILABLE = {"ja": 501, "en": 1001}


@settings(max_examples=150, deadline=None)
@given(
    shares=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=12),
    tokens=st.integers(1, 10**13),
    batch=st.integers(1, 5000),
    seq_length=st.integers(1, 8192),
)
def test_windows_add_up_to_whole_steps_and_stay_within_one_of_their_share(shares, tokens, batch, seq_length):
    named = {f"s{at}": share for at, share in enumerate(shares)}
    plan = make_plan(named, tokens, dict.fromkeys(named, 10**9), seq_length=seq_length, global_batch_size=batch, seed=1)
    total = -(-tokens // (batch * seq_length)) * batch
    assert plan.num_windows == total == plan.num_steps * batch
    assert (plan.num_steps - 1) * batch * seq_length < tokens <= plan.num_steps * batch * seq_length
    for share, count in zip(shares, plan.windows, strict=True):
        assert abs(count - total * share / sum(shares)) < 1 + 1e-9 * total


def test_shares_are_the_decimals_the_user_wrote():
    available = dict.fromkeys("abc", 10**9)
    plan = make_plan({"a": 0.1, "b": 0.2, "c": 0.7}, 10**6, available, seq_length=1, global_batch_size=10, seed=1)
    assert plan.windows == (100_000, 200_000, 700_000)
    scaled = make_plan({"a": 1, "b": 2, "c": 7}, 10**6, available, seq_length=1, global_batch_size=10, seed=1)
    assert scaled == plan


def test_hand_counted_plan():
    plan = make_plan({"ja": 0.9, "en": 0.1}, 321, _AVAILABLE, **_SIZES)
    assert plan.num_steps == 9  # 321 tokens are 8.025 steps of 40
    assert plan.windows == (32, 4)  # 32.4 and 3.6: the larger remainder gets the last window
    assert plan.available == (50, 100)
    assert plan.epochs == (0.64, 0.04)


def test_equal_remainders_fall_to_the_source_named_first():
    plan = make_plan({"ja": 1, "en": 1}, 30, _AVAILABLE, seq_length=10, global_batch_size=3, seed=1)
    assert plan.windows == (2, 1)


def test_table_shows_every_source_and_the_sum():
    assert describe_plan(make_plan({"ja": 0.9, "en": 0.1}, 1000, _AVAILABLE, **_SIZES)).splitlines()[:-1] == [
        "source  windows  tokens     share  available  epochs",
        "ja           90     900  90.0000%        500   1.800",
        "en           10     100  10.0000%      1,000   0.100",
        "all         100   1,000",
    ]


def test_plan_survives_a_file(tmp_path):
    plan = make_plan({"ja": 0.9, "en": 0.1}, 1000, _AVAILABLE, **_SIZES)
    write_plan(tmp_path / "plan.json", plan)
    assert read_plan(tmp_path / "plan.json") == plan


def test_plan_hash_follows_what_decides_the_order():
    plan = make_plan({"ja": 0.9, "en": 0.1}, 1000, _AVAILABLE, **_SIZES)
    same = make_plan({"ja": 9, "en": 1}, 999, _AVAILABLE, **_SIZES)
    assert same.plan_hash == plan.plan_hash
    for shares, available, sizes in (
        ({"ja": 0.8, "en": 0.2}, _AVAILABLE, _SIZES),
        ({"ja": 0.9, "en": 0.1}, {"ja": 511, "en": 1001}, _SIZES),
        ({"ja": 0.9, "en": 0.1}, _AVAILABLE, _SIZES | {"seed": 2}),
    ):
        assert make_plan(shares, 1000, available, **sizes).plan_hash != plan.plan_hash


def test_edited_plan_is_refused(tmp_path):
    path = tmp_path / "plan.json"
    write_plan(path, make_plan({"ja": 0.9, "en": 0.1}, 1000, _AVAILABLE, **_SIZES))
    stored = orjson.loads(path.read_bytes())
    path.write_bytes(orjson.dumps(stored | {"windows": [80, 20]}))
    with pytest.raises(DataError, match=r"plan\.json: the plan was changed after it was written"):
        read_plan(path)
    path.write_bytes(b"{}")
    with pytest.raises(DataError, match=r"plan\.json: no blend plan; it needs sources, windows"):
        read_plan(path)


@pytest.mark.parametrize(
    ("shares", "available", "error", "message"),
    [
        ({}, _AVAILABLE, ConfigError, "blend: no sources; name at least one"),
        ({"ja": 0.0}, _AVAILABLE, ConfigError, r"blend\.ja: share 0\.0 is not positive; leave the source out"),
        ({"ja": float("nan")}, _AVAILABLE, ConfigError, r"blend\.ja: share nan is not positive"),
        ({"jp": 1.0}, _AVAILABLE, ConfigError, r"blend\.jp: unknown source \(known: ja, en\); correct the name"),
        ({"ja": 1.0}, {"ja": 0}, DataError, r"blend\.ja: the source holds no tokens"),
        ({"ja": 1.0}, {"ja": 10}, DataError, r"blend\.ja: 10 tokens are less than one window of 10 \+ 1"),
    ],
)
def test_impossible_plan_is_refused(shares, available, error, message):
    with pytest.raises(error, match=message):
        make_plan(shares, 1000, available, **_SIZES)


@pytest.mark.parametrize("change", [{"seq_length": 0}, {"global_batch_size": 0}])
def test_impossible_sizes_are_refused(change):
    with pytest.raises(ConfigError, match=f"blend: {next(iter(change))} 0 is below 1"):
        make_plan({"ja": 1}, 1000, _AVAILABLE, **(_SIZES | change))
    with pytest.raises(ConfigError, match="blend: tokens 0 is below 1"):
        make_plan({"ja": 1}, 0, _AVAILABLE, **_SIZES)


def test_share_of_less_than_a_window_is_reported(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("megatron_adapt"), "propagate", True)
    plan = make_plan({"ja": 0.999, "en": 0.001}, 40, _AVAILABLE, **_SIZES)
    assert plan.windows == (4, 0)
    assert "blend.en: its share of 4 windows is less than one, it is never read" in caplog.text


def _recipe(work_dir: Path, **train) -> Recipe:
    stages = (
        StageSettings(name="rows", tokens=100, blend={"ja": 1.0}),
        StageSettings(name="whole", tokens=1000, blend={"ja": 0.9, "en": 0.1}),
    )
    settings = TrainSettings(stages=train.get("stages", stages), seq_length=10, global_batch_size=4)
    return Recipe(
        work_dir=work_dir, old_languages=("en",), new_languages=("ja",), corpus={"en": ("e",), "ja": ("j",)},
        base_model=Path("base"), train=settings,
    )  # fmt: skip


def test_every_stage_of_a_recipe_is_planned_from_its_tokens(tmp_path):
    make_tokens(tmp_path / "tokens" / "ja-train", count_up(0, 501))
    make_tokens(tmp_path / "tokens" / "en-train", count_up(0, 900))
    plans = plan_stages(_recipe(tmp_path))
    assert {name: plan.windows for name, plan in plans.items()} == {"rows": (12,), "whole": (90, 10)}
    assert plans["whole"].available == (50, 89)
    text = describe_stages(_recipe(tmp_path))
    assert text.startswith("stage rows\nsource")
    assert "\n\nstage whole\nsource" in text


def test_recipe_without_tokens_or_stages_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"ja-train\.idx: no such file"):
        plan_stages(_recipe(tmp_path))
    with pytest.raises(ConfigError, match=r"train\.stages: the recipe has none"):
        plan_stages(_recipe(tmp_path, stages=()))
