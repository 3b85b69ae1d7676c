"""Prompts bear no loss, wherever a window cuts them; everything else does."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_adapt.data.dataset import BlendedWindows
from megatron_adapt.data.index import read_tokens
from megatron_adapt.data.megatron_blend import MegatronWindows
from megatron_adapt.data.plan import make_plan
from megatron_adapt.data.prompts import join_prompts, mask_prompts, prompts_path, read_prompts
from megatron_adapt.data.record import data_fingerprint
from megatron_adapt.data.stage_plans import plan_stage
from megatron_adapt.errors import ConfigError, DataError
from megatron_adapt.run_folder import RunFolder
from tests.data.recipes import make_recipe, make_stage
from tests.data.token_files import count_up, make_tokens

_SIZES = {"seq_length": 10, "global_batch_size": 5, "seed": 3}


def write_prompts(prefix, prompts):
    np.array(prompts, "<i4").tofile(prompts_path(prefix))
    return prefix


@settings(max_examples=200, deadline=None)
@given(
    documents=st.lists(st.tuples(st.integers(1, 12), st.integers(0, 12)), min_size=1, max_size=20),
    seq_length=st.integers(1, 9),
    data=st.data(),
)
def test_a_target_bears_loss_unless_it_is_in_a_prompt(documents, seq_length, data):
    lengths = np.array([length for length, _ in documents])
    prompts = np.minimum([prompt for _, prompt in documents], lengths)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    total = int(starts[-1])
    seq_length = min(seq_length, total)
    is_prompt = np.concatenate([np.arange(n) < prompt for n, prompt in zip(lengths, prompts, strict=True)])
    windows = data.draw(st.lists(st.integers(0, total - 1), max_size=5))
    mask = mask_prompts(starts, prompts.astype(np.int32), np.array(windows, np.int64), seq_length)
    expected = [[not is_prompt[(start + 1 + at) % total] for at in range(seq_length)] for start in windows]
    assert mask.tolist() == expected


@pytest.fixture
def prefixes(tmp_path):
    """Documents of 7 tokens; the first 3 of every second one of ja are a prompt."""
    ja = write_prompts(make_tokens(tmp_path / "ja", count_up(0, 210)), [3 * (at % 2) for at in range(30)])
    return {"ja": ja, "en": make_tokens(tmp_path / "en", count_up(500, 210))}


def make_blend(prefixes, engine=BlendedWindows, *more):
    plan = make_plan({"ja": 0.5, "en": 0.5}, 1000, {"ja": 210, "en": 210}, **_SIZES)
    return engine(plan, prefixes, *more)


def test_every_window_of_a_run_knows_its_prompts(prefixes):
    batch = make_blend(prefixes).read_windows(0, 100)
    targets_NT = batch.ids_NT1[:, 1:]
    is_prompt_NT = (targets_NT < 500) & (targets_NT // 7 % 2 == 1) & (targets_NT % 7 < 3)
    np.testing.assert_array_equal(batch.loss_NT, ~is_prompt_NT)
    assert 0 < is_prompt_NT.sum() < is_prompt_NT.size / 4


def test_tokens_without_prompts_all_bear_loss(prefixes):
    prompts_path(prefixes["ja"]).unlink()
    assert make_blend(prefixes).read_windows(0, 100).loss_NT.all()
    assert read_prompts(prefixes["ja"], 30) is None


def test_other_prompts_are_other_data(prefixes):
    before = data_fingerprint(prefixes["ja"])
    write_prompts(prefixes["ja"], [1] * 30)
    assert data_fingerprint(prefixes["ja"]) != before


def test_prompts_of_other_documents_are_refused(prefixes):
    write_prompts(prefixes["ja"], [1] * 29)
    with pytest.raises(DataError, match=r"ja\.prompts: 29 prompts for 30 documents; the files do not belong together"):
        make_blend(prefixes)


def test_megatron_core_cannot_leave_prompts_out_and_says_so(prefixes, tmp_path):
    with pytest.raises(ConfigError, match="megatron trains on prompts too, and ja has some; use adapt"):
        make_blend(prefixes, MegatronWindows, tmp_path)


@pytest.mark.parametrize(("eod_mask_loss", "masked"), [(False, 30), (True, 30 + 20)])
def test_the_plan_counts_the_targets_that_bear_loss(eod_mask_loss, masked, tmp_path):
    documents = [[*range(1, 10), 0]] * 30  # nine tokens and the end of the document
    prefix = make_tokens(
        RunFolder(tmp_path).tokens("en", "train"), [np.array(ids) for ids in documents], append_eod=True
    )
    write_prompts(prefix, [3 * (at % 3 == 0) for at in range(30)])
    recipe = make_recipe(tmp_path, make_stage(blend={"en": 1.0}, tokens=290), train={"eod_mask_loss": eod_mask_loss})
    plan = plan_stage(recipe, "full")
    assert plan.windows == (32,)
    assert plan.loss_tokens == (320 - round(320 * masked / 300),)


def test_prompts_are_joined_with_their_documents(prefixes, tmp_path):
    files = [read_tokens(prefixes[name]) for name in ("en", "ja")]
    join_prompts(files, tmp_path / "both")
    joined = np.fromfile(prompts_path(tmp_path / "both"), "<i4")
    assert joined.tolist() == [0] * 30 + [0, 3] * 15
    join_prompts(files[:1], tmp_path / "both")
    assert not prompts_path(tmp_path / "both").exists()
