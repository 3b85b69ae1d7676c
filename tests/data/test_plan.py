from dataclasses import replace
from fractions import Fraction

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_adapt.data.plan import BlendPosition, describe_change, make_plan, read_plan, write_plan
from megatron_adapt.errors import ConfigError, DataError
from tests.data.recipes import make_sources

_SIZES = {"seq_length": 10, "global_batch_size": 4, "seed": 1}
_AVAILABLE = {"ja": 501, "en": 1001}


@pytest.fixture
def work_dir(tmp_path):
    make_sources(tmp_path)
    return tmp_path


# ---------------------------------------------------------------- windows from shares


@settings(max_examples=150, deadline=None)
@given(
    shares=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=12),
    windows=st.integers(1, 20_000),
    batch=st.integers(1, 5000),
    seq_length=st.integers(1, 8192),
)
def test_windows_add_up_to_whole_steps_and_stay_within_one_of_their_share(shares, windows, batch, seq_length):
    tokens = windows * seq_length - seq_length // 2
    named = {f"s{at}": share for at, share in enumerate(shares)}
    plan = make_plan(named, tokens, dict.fromkeys(named, 10**9), seq_length=seq_length, global_batch_size=batch, seed=1)
    total = -(-tokens // (batch * seq_length)) * batch
    assert plan.num_windows == total == plan.num_steps * batch
    assert (plan.num_steps - 1) * batch * seq_length < tokens <= plan.num_steps * batch * seq_length
    for share, count in zip(shares, plan.windows, strict=True):
        # Shares are rounded to parts of 2**-50.
        assert abs(count - total * Fraction(share) / sum(map(Fraction, shares))) < 1 + 1e-9


def test_shares_are_the_decimals_the_user_wrote():
    available = dict.fromkeys("abc", 10**9)
    plan = make_plan({"a": 0.1, "b": 0.2, "c": 0.7}, 10**6, available, seq_length=1, global_batch_size=10, seed=1)
    assert plan.windows == (100_000, 200_000, 700_000)
    scaled = make_plan({"a": 1, "b": 2, "c": 7}, 10**6, available, seq_length=1, global_batch_size=10, seed=1)
    assert scaled == plan


def test_hand_counted_plan():
    plan = make_plan({"ja": 0.9, "en": 0.1}, 321, _AVAILABLE, **_SIZES)
    assert plan.num_steps == 9  # 321 tokens are 8.025 steps of 40
    assert plan.weights == (9, 1)
    assert plan.windows == (33, 3)  # 32.4 and 3.6: the fourth of en is due by the 40th place and comes then
    assert plan.available == (50, 100)
    assert plan.epochs == (0.66, 0.03)
    assert plan.first == plan.repeats == (0, 0)
    assert plan.loss_tokens == (330, 30)


def test_equal_remainders_fall_to_the_source_named_first():
    plan = make_plan({"ja": 1, "en": 1}, 30, _AVAILABLE, seq_length=10, global_batch_size=3, seed=1)
    assert plan.windows == (2, 1)


@pytest.mark.parametrize(
    ("first", "repeats"), [(0, 40), (20, 60), (49, 89), (50, 90), (51, 90), (1000, 90)], ids=lambda value: str(value)
)
def test_repeats_are_windows_read_before_in_any_stage(first, repeats):
    plan = make_plan({"ja": 1}, 900, _AVAILABLE, **(_SIZES | {"global_batch_size": 1}), first={"ja": first})
    read_once = set(range(50)) - set(range(first))
    assert plan.windows == (90,)
    assert plan.repeats == (repeats,) == (90 - len(read_once),)


@pytest.mark.parametrize(
    ("shortfall", "windows", "asked"),
    [("redistribute", (50, 50), (90, 10)), ("cap", (47, 5), (90, 10))],
)
def test_shortfall_changes_the_windows_and_not_what_was_asked(shortfall, windows, asked):
    plan = make_plan(
        {"ja": 0.9, "en": 0.1}, 1000, _AVAILABLE, **_SIZES, max_epochs={"ja": 1}, shortfall=shortfall
    )  # fmt: skip
    assert plan.windows == windows
    assert plan.asked == asked


def test_ends_of_documents_are_taken_from_the_tokens_that_bear_loss():
    plan = make_plan({"ja": 0.9, "en": 0.1}, 1000, _AVAILABLE, **_SIZES, masked={"ja": Fraction(1, 7)})
    assert plan.loss_tokens == (900 - 129, 100)


def test_a_longer_stage_begins_with_the_same_windows():
    short, long = (make_plan({"ja": 0.9, "en": 0.1}, tokens, _AVAILABLE, **_SIZES) for tokens in (450, 1800))
    assert long.reads_as(short)
    assert long.count_before(short.num_windows) == short.windows
    assert long.plan_hash != short.plan_hash
    assert not replace(long, weights=(8, 2)).reads_as(short)


def test_limits_that_change_the_windows_change_the_weights():
    plan = make_plan({"ja": 0.9, "en": 0.1}, 1000, _AVAILABLE, **_SIZES, max_epochs={"ja": 1}, shortfall="redistribute")
    assert plan.weights == plan.windows == (50, 50)


def test_what_a_stage_read_itself_counts_towards_its_length():
    changes = {"first": {"ja": 12, "en": 3}, "before": {"ja": 7, "en": 1}}
    plan = make_plan({"ja": 0.5, "en": 0.5}, 400, _AVAILABLE, **_SIZES, **changes)
    assert (plan.begin, plan.num_windows, plan.windows) == (8, 40, (16, 16))
    assert plan.count_before(8) == (7, 1)
    assert plan.count_before(40) == (23, 17)
    assert plan.epochs == (23 / 50, 17 / 100)
    with pytest.raises(ConfigError, match="blend: the stage has read 8 windows, tokens asks for 8; raise it"):
        make_plan({"ja": 0.5, "en": 0.5}, 80, _AVAILABLE, **_SIZES, **changes)


def test_a_position_names_epoch_and_window_of_each_source():
    plan = make_plan({"ja": 0.9, "en": 0.1}, 1000, _AVAILABLE, **_SIZES, first={"ja": 20})
    assert BlendPosition(plan, (90, 10), {"ja": "a", "en": "b"}).describe() == {
        "ja": {"epoch": 2, "window": 10, "read": 90, "data": "a"},
        "en": {"epoch": 0, "window": 10, "read": 10, "data": "b"},
    }


# ---------------------------------------------------------------- files


def _plan(**changes):
    return replace(make_plan({"ja": 0.9, "en": 0.1}, 1000, _AVAILABLE, **_SIZES), **changes)


def test_plan_survives_a_file_that_also_says_what_follows_from_it(tmp_path):
    plan = _plan(first=(20, 0))
    write_plan(tmp_path / "plan.json", plan)
    assert read_plan(tmp_path / "plan.json") == plan
    stored = orjson.loads((tmp_path / "plan.json").read_bytes())
    assert stored["epochs"] == [1.8, 0.1]
    assert stored["repeats"] == [60, 0]
    assert stored["loss_tokens"] == [900, 100]
    assert stored["num_steps"] == 25


def test_plan_hash_follows_what_decides_the_order():
    plan = _plan()
    same = make_plan({"ja": 9, "en": 1}, 999, _AVAILABLE, **_SIZES)
    assert same.plan_hash == plan.plan_hash
    assert _plan(asked=(99, 1), loss_tokens=(1, 1)).plan_hash == plan.plan_hash


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"windows": (80, 20)}, "windows of ja 90, now 80; windows of en 10, now 20"),
        ({"available": (51, 100)}, "available of ja 50, now 51"),
        ({"first": (0, 3)}, "first of en 0, now 3"),
        ({"before": (2, 1)}, "before of ja 0, now 2; before of en 0, now 1"),
        ({"weights": (8, 2)}, "the shares"),
        ({"seed": 2}, "seed 1, now 2"),
        ({"seq_length": 20}, "seq_length 10, now 20"),
        ({"sources": ("ja", "fr")}, "sources ja, en, now ja, fr"),
    ],
)
def test_change_of_a_plan_is_named_and_changes_the_hash(change, text):
    changed = _plan(**change)
    assert changed.plan_hash != _plan().plan_hash
    assert describe_change(_plan(), changed) == text


def test_edited_plan_is_refused(tmp_path):
    path = tmp_path / "plan.json"
    write_plan(path, _plan())
    stored = orjson.loads(path.read_bytes())
    path.write_bytes(orjson.dumps(stored | {"windows": [80, 20]}))
    with pytest.raises(DataError, match=r"plan\.json: the plan was changed after it was written"):
        read_plan(path)
    path.write_bytes(b"{}")
    with pytest.raises(DataError, match=r"plan\.json: no blend plan; it needs sources, weights"):
        read_plan(path)
