from collections import Counter
from dataclasses import replace
from fractions import Fraction

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_adapt.config import BaseSettings
from megatron_adapt.data.dataset import BlendedWindows
from megatron_adapt.data.plan import (
    check_trained,
    describe_change,
    make_plan,
    plan_stage,
    plan_stages,
    read_plan,
    write_plan,
)
from megatron_adapt.errors import CheckpointError, DataError
from megatron_adapt.files import write_json
from megatron_adapt.run_folder import RunFolder
from tests.data.recipes import SEQ_LENGTH, TOKENS, WINDOWS, make_recipe, make_sources, make_stage
from tests.data.token_files import count_up, make_tokens

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
        assert abs(count - total * Fraction(share) / sum(map(Fraction, shares))) < 1 + 1e-9 * total


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
    assert plan.first == plan.repeats == (0, 0)
    assert plan.loss_tokens == (320, 40)


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
    with pytest.raises(DataError, match=r"plan\.json: no blend plan; it needs sources, windows"):
        read_plan(path)


# ---------------------------------------------------------------- stages


def test_sources_of_a_language_are_read_by_size_and_of_others_alone(work_dir):
    plan = plan_stage(make_recipe(work_dir, make_stage()), "full")
    assert plan.sources == ("ja/wiki", "ja/web", "en")
    assert plan.available == tuple(WINDOWS.values())
    assert plan.windows == (60, 30, 10)


def test_stage_reads_only_the_sources_it_gives_a_weight(work_dir):
    plan = plan_stage(make_recipe(work_dir, make_stage(within="weight", weights={"ja/web": 1.0})), "full")
    assert dict(zip(plan.sources, plan.windows, strict=True)) == {"ja/web": 90, "en": 10}


def test_stages_continue_each_other_and_others_have_an_order_of_their_own(work_dir):
    stages = (
        make_stage(name="rows", tokens=100, blend={"ja": 1.0}),
        make_stage(name="aside", continue_blend=False),
        make_stage(name="full"),
        make_stage(name="anneal", tokens=200, blend={"en": 1.0}),
    )
    plans = plan_stages(make_recipe(work_dir, *stages, train={"seed": 7}))
    read = {name: (plan.seed, plan.first, plan.windows) for name, plan in plans.items()}
    assert read == {
        "rows": (7, (0, 0), (8, 4)),
        "aside": (9, (0, 0, 0), (60, 30, 10)),
        "full": (7, (8, 4, 0), (60, 30, 10)),
        "anneal": (7, (10,), (20,)),
    }


def test_base_from_scratch_is_no_link_of_the_chain(work_dir):
    make_tokens(work_dir / "base" / "tokens" / "en-train", count_up(0, 300))
    base = make_stage(name="scratch", blend={"en": 1.0})
    recipe = make_recipe(work_dir, make_stage(), base_model=None, base=BaseSettings(), base_train=base)
    plans = plan_stages(recipe)
    assert list(plans) == ["scratch", "full"]
    assert plans["scratch"] == plan_stage(recipe, "scratch")
    assert plans["scratch"].available == (29,)
    assert plans["full"].first == (0, 0, 0)


@st.composite
def _draw_stages(draw):
    stages = []
    for at in range(draw(st.integers(2, 4))):
        parts = draw(st.permutations([("ja", draw(st.integers(1, 20))), ("en", draw(st.integers(1, 20)))]))
        blend = dict(parts[: draw(st.integers(1, 2))])
        stages.append(make_stage(name=f"s{at}", tokens=draw(st.integers(1, 900)), blend=blend))
    return stages


@settings(max_examples=60, deadline=None)
@given(stages=_draw_stages())
def test_stages_begin_each_source_where_those_before_stopped(stages, chain_dir):
    plans = plan_stages(make_recipe(chain_dir, *stages))
    places = {source: [] for source in TOKENS}
    for plan in plans.values():
        for source, first, count in zip(plan.sources, plan.first, plan.windows, strict=True):
            places[source] += range(first, first + count)
    for read in places.values():
        assert read == list(range(len(read)))
    assert {plan.seed for plan in plans.values()} == {1234}


@settings(max_examples=40, deadline=None)
@given(stages=_draw_stages())
def test_stages_that_continue_each_other_read_no_window_twice_before_all_are_read(stages, chain_dir):
    plans = plan_stages(make_recipe(chain_dir, *stages))
    counts = {source: Counter() for source in TOKENS}
    for plan in plans.values():
        prefixes = {source: RunFolder(chain_dir).tokens(source, "train") for source in plan.sources}
        ids_NT1, sources_N = BlendedWindows(plan, prefixes).read_windows(0, plan.num_windows)
        for at, source in enumerate(plan.sources):
            counts[source].update(ids_NT1[sources_N == at, 1:].ravel().tolist())
    for source, counted in counts.items():
        read = sum(dict(zip(plan.sources, plan.windows, strict=True)).get(source, 0) for plan in plans.values())
        if read <= WINDOWS[source]:
            assert max(counted.values(), default=0) <= 1
            assert len(counted) == read * SEQ_LENGTH
        assert sum(counted.values()) == read * SEQ_LENGTH


@pytest.fixture(scope="module")
def chain_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chain")
    make_sources(folder)
    return folder


def test_plan_knows_how_many_ends_of_documents_the_loss_leaves_out(tmp_path):
    documents = [[*range(1, 10), 0]] * 50  # nine tokens and the end of the document, id 0
    folder = RunFolder(tmp_path)
    make_tokens(folder.tokens("ja/wiki", "train"), documents)
    make_tokens(folder.tokens("ja/web", "train"), count_up(1, 500))  # no ends
    recipe = make_recipe(tmp_path, make_stage(blend={"ja": 1.0}, tokens=1960), train={"eod_mask_loss": True})
    plan = plan_stage(recipe, "full")
    assert plan.windows == (98, 98)
    assert plan.loss_tokens == (980 - 98, 980)
    assert plan_stage(replace(recipe, train=replace(recipe.train, eod_mask_loss=False)), "full").loss_tokens == (
        980,
        980,
    )


# ---------------------------------------------------------------- a recipe that changed after a stage was trained


def _train_rows(work_dir, recipe):
    """Leave what a finished stage leaves: its plan."""
    write_plan(RunFolder(work_dir).plan("rows"), plan_stage(recipe, "rows"))


def test_stage_is_not_continued_from_windows_it_did_not_read(work_dir):
    rows = make_stage(name="rows", tokens=100)
    recipe = make_recipe(work_dir, rows, make_stage())
    _train_rows(work_dir, recipe)
    assert plan_stage(recipe, "full").first == (7, 4, 1)
    longer = make_recipe(work_dir, replace(rows, tokens=200), make_stage())
    with pytest.raises(
        CheckpointError,
        match=r"rows/plan\.json: the stage was trained on another .* \(windows of ja/wiki 7, now 12; .*\); restore",
    ):
        plan_stage(longer, "full")
    alone = make_recipe(work_dir, replace(rows, tokens=200), make_stage(continue_blend=False))
    assert plan_stage(alone, "full").first == (0, 0, 0)


def test_finished_stage_of_another_plan_is_not_taken_for_the_one_asked_for(work_dir):
    recipe = make_recipe(work_dir, make_stage(name="rows"))
    _train_rows(work_dir, recipe)
    check_trained(recipe, "rows")
    make_tokens(work_dir / "tokens" / "en-train", count_up(0, 700))
    with pytest.raises(CheckpointError, match=r"\(available of en 90, now 69\); restore them, or remove .*rows to tr"):
        check_trained(recipe, "rows")


def test_stage_that_left_no_plan_is_no_obstacle(work_dir):
    recipe = make_recipe(work_dir, make_stage(name="rows"), make_stage())
    check_trained(recipe, "rows")
    write_json(RunFolder(work_dir).plan("other"), {})
    assert plan_stage(recipe, "full").first == (60, 30, 10)
