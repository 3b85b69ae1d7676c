"""What a step was made of, against the windows that training reads."""

import json

import numpy as np
import pytest

from megatron_adapt.config import TraceStep
from megatron_adapt.data.dataset import BlendedWindows
from megatron_adapt.data.index import read_tokens
from megatron_adapt.data.plan import write_plan
from megatron_adapt.data.stage_plans import plan_stage
from megatron_adapt.data.trace import trace_step
from megatron_adapt.errors import ConfigError, DataError
from megatron_adapt.files import to_plain, write_json
from megatron_adapt.run_folder import RunFolder
from tests.data.recipes import make_recipe, make_sources, make_stage
from tests.helpers.tiny import write_byte_tokenizer


@pytest.fixture
def recipe(tmp_path):
    make_sources(tmp_path)
    return make_recipe(tmp_path, make_stage(tokens=4000), train={"seed": 5})


def trace(recipe, step, **changes):
    path = recipe.work_dir / "recipe.json"
    write_json(path, to_plain(recipe))
    return trace_step(TraceStep(**{"recipe": path, "stage": "full", "step": step, **changes}))


@pytest.mark.parametrize("step", [1, 50, 100])
def test_documents_of_a_step_are_those_its_windows_were_cut_from(recipe, step):
    plan = plan_stage(recipe, "full")
    prefixes = {source: RunFolder(recipe.work_dir).tokens(source, "train") for source in plan.sources}
    ids_NT1, sources_N, _ = BlendedWindows(plan, prefixes).read_windows(4 * step - 4, 4)
    traced = trace(recipe, step)
    assert [window.place for window in traced] == list(range(4 * step - 4, 4 * step))
    assert [window.source for window in traced] == [plan.sources[at] for at in sources_N]
    for window, ids in zip(traced, ids_NT1, strict=True):
        file = read_tokens(prefixes[window.source])
        starts = file.starts()
        pieces = [file.tokens_N[starts[part.document] + part.first :][: part.tokens] for part in window.documents]
        assert np.concatenate(pieces).tolist() == ids.tolist()
        assert all(part.first + part.tokens <= 7 for part in window.documents)


def test_steps_of_a_growing_batch_follow_each_other(recipe):
    ramped = make_recipe(recipe.work_dir, make_stage(tokens=4000, rampup_batch_size=(1, 1, 12)), train={"seed": 5})
    places = [[window.place for window in trace(ramped, step)] for step in range(1, 9)]
    assert [len(step) for step in places] == [1, 1, 1, 1, 2, 2, 3, 3]
    assert [place for step in places for place in step] == list(range(14))


def test_the_epochs_of_a_small_source_are_counted(recipe):
    epochs = {window.epoch for step in (1, 60, 100) for window in trace(recipe, step) if window.source == "ja/web"}
    assert epochs == {0, 2, 4}


def test_the_plan_that_was_trained_counts_not_the_one_the_recipe_gives_now(recipe):
    old = make_recipe(recipe.work_dir, make_stage(tokens=4000, blend={"en": 1.0}))
    write_plan(RunFolder(recipe.work_dir).plan("full"), plan_stage(old, "full"))
    assert {window.source for window in trace(recipe, 1)} == {"en"}


def test_windows_are_shown_and_written_with_their_text(recipe, tmp_path, capsys):
    path = tmp_path / "step.json"
    traced = trace(recipe, 2, json=path)
    stored = json.loads(path.read_text())
    assert [window["source"] for window in stored] == [window.source for window in traced]
    assert stored[0]["documents"][0]["tokens"] == traced[0].documents[0].tokens
    shown = capsys.readouterr().out
    assert "step 2" in shown
    assert f"{traced[0].start:,}" in shown


def test_what_cannot_be_traced_is_refused(recipe, tmp_path):
    with pytest.raises(ConfigError, match="--step: 101 is not from 1 to 100, the steps of this plan"):
        trace(recipe, 101)
    with pytest.raises(ConfigError, match="--step: 0 is not from 1 to 100"):
        trace(recipe, 0)
    other = make_recipe(recipe.work_dir, make_stage(), train={"blend_engine": "megatron"})
    with pytest.raises(ConfigError, match=r"trace: the recipe has train.blend_engine = megatron, whose order is not"):
        trace(other, 1)
    with pytest.raises(DataError, match=r"made by tokenizer one, .* name the tokenizer it was made with"):
        trace(recipe, 1, tokenizer=write_byte_tokenizer(tmp_path / "tokenizer"))
