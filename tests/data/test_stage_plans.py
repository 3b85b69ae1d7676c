"""Plans of the stages of a recipe, and what becomes of them when the recipe changes."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_adapt.config import BaseSettings
from megatron_adapt.data.dataset import BlendedWindows
from megatron_adapt.data.plan import write_plan
from megatron_adapt.data.stage_plans import carry_over, check_trained, plan_stage, plan_stages
from megatron_adapt.errors import CheckpointError, ConfigError
from megatron_adapt.files import write_json
from megatron_adapt.run_folder import RunFolder
from tests.data.recipes import SEQ_LENGTH, TOKENS, WINDOWS, make_recipe, make_sources, make_stage
from tests.data.token_files import count_up, make_tokens


@pytest.fixture
def work_dir(tmp_path):
    make_sources(tmp_path)
    return tmp_path


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
        ids_NT1, sources_N, _ = BlendedWindows(plan, prefixes).read_windows(0, plan.num_windows)
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
    make_tokens(folder.tokens("ja/wiki", "train"), documents, append_eod=True)
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
    assert plan_stage(recipe, "full").first == (8, 3, 1)
    longer = make_recipe(work_dir, replace(rows, tokens=200), make_stage())
    with pytest.raises(
        CheckpointError,
        match=r"rows/plan\.json: the stage was trained on another .* \(windows of ja/wiki 8, now 12; .*\); restore",
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


# ---------------------------------------------------------------- a plan that changes under a running stage


def read_all(work_dir, plan, first=0):
    prefixes = {source: RunFolder(work_dir).tokens(source, "train") for source in plan.sources}
    return BlendedWindows(plan, prefixes).read_windows(first, plan.num_windows - first)


def test_a_longer_stage_is_carried_over_as_if_it_had_always_been_so_long(work_dir):
    trained = plan_stage(make_recipe(work_dir, make_stage(tokens=400)), "full")
    longer = carry_over(make_recipe(work_dir, make_stage(tokens=1600)), "full", trained, 12)
    assert longer == plan_stage(make_recipe(work_dir, make_stage(tokens=1600)), "full")
    assert (read_all(work_dir, longer)[0][: trained.num_windows] == read_all(work_dir, trained)[0]).all()


def test_another_blend_begins_behind_all_that_was_read(work_dir):
    trained = plan_stage(make_recipe(work_dir, make_stage(tokens=600)), "full")
    recipe = make_recipe(work_dir, make_stage(tokens=900, blend={"ja": 0.5, "en": 0.5}))
    plan = carry_over(recipe, "full", trained, 40)
    assert (plan.begin, plan.num_windows) == (40, 92)
    assert plan.before == plan.first == trained.count_before(40)
    seen = [read_all(work_dir, trained)[0][:40], read_all(work_dir, plan, 40)[0]]
    targets = [set(ids_NT1[:, 1:].ravel().tolist()) for ids_NT1 in seen]
    assert sum(map(len, targets)) == 92 * SEQ_LENGTH  # no token twice: every source is read less than once
    assert not targets[0] & targets[1]
    # The same recipe gives the same plan again, and another change is carried over from there.
    assert plan_stage(recipe, "full", plan) == plan
    again = carry_over(make_recipe(work_dir, make_stage(tokens=1200)), "full", plan, 60)
    assert again.before == plan.count_before(60)
    assert again.begin == 60


def test_a_source_that_is_new_or_unread_may_change_and_one_that_was_read_may_not(work_dir):
    without = make_stage(within="weight", weights={"ja/wiki": 1.0})
    trained = plan_stage(make_recipe(work_dir, without), "full")
    plan = carry_over(make_recipe(work_dir, make_stage(tokens=1200)), "full", trained, 20)
    assert dict(zip(plan.sources, plan.before, strict=True)) == {"ja/wiki": 18, "ja/web": 0, "en": 2}
    with pytest.raises(
        CheckpointError, match=r"full: 2 of the 90 windows of en were read, and the blend has none of it"
    ):
        carry_over(make_recipe(work_dir, make_stage(blend={"ja": 1.0})), "full", trained, 20)
    make_tokens(work_dir / "tokens" / "en-train", count_up(0, 700))
    with pytest.raises(CheckpointError, match=r"of en were read, and the blend has 69 of it now; keep the source, and"):
        carry_over(make_recipe(work_dir, make_stage()), "full", trained, 20)


def test_a_stage_that_read_more_than_it_is_asked_for_now_is_refused(work_dir):
    trained = plan_stage(make_recipe(work_dir, make_stage()), "full")
    with pytest.raises(
        ConfigError, match=r"train.stages full: blend: the stage has read 60 windows, tokens asks for 20"
    ):
        carry_over(make_recipe(work_dir, make_stage(tokens=200, blend={"ja": 0.5, "en": 0.5})), "full", trained, 60)


def test_the_next_stage_begins_behind_what_a_changed_one_really_read(work_dir):
    rows = make_stage(name="rows", tokens=100)
    _train_rows(work_dir, make_recipe(work_dir, rows, make_stage()))
    read = plan_stage(make_recipe(work_dir, rows, make_stage()), "full").first
    changed = make_recipe(work_dir, replace(rows, tokens=200), make_stage(), train={"continue_blend": True})
    assert plan_stage(changed, "full").first == read
    # A stage that was itself carried over needs no flag: its plan says so.
    half = make_recipe(work_dir, replace(rows, tokens=200, blend={"ja": 0.5, "en": 0.5}), make_stage())
    carried = carry_over(half, "rows", plan_stage(make_recipe(work_dir, rows), "rows"), 8)
    write_plan(RunFolder(work_dir).plan("rows"), carried)
    assert plan_stage(half, "full").first == carried.count_before(carried.num_windows)
