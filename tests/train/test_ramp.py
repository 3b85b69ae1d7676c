"""A stage whose batch grows: what it reads, its learning rate, resume, layouts, and a plan of it."""

import pytest

from megatron_adapt.errors import CheckpointError, ConfigError
from megatron_adapt.files import read_json
from tests.helpers.runs import copy_run, get_curve, make_run, train_stage
from tests.helpers.spawn import run_ranks
from tests.train.test_loop import LAYOUTS

RAMP = ["--train.stages.0.rampup-batch-size", "4", "4", "24"]
SIZES = [4, 4, 4, 8, 8, 12, 12, 12, 8]


@pytest.fixture(scope="module")
def ramped(tmp_path_factory):
    """A run on one rank with a ramp of two increments, and its metrics."""
    recipe = make_run(tmp_path_factory.mktemp("ramp"))
    return recipe, train_stage(recipe, "first", *RAMP)


def test_the_batch_grows_and_the_budget_stays(ramped):
    recipe, rows = ramped
    assert [row["global_batch_size"] for row in rows[1:]] == SIZES
    read = [sum(row["tokens"].values()) // 16 for row in rows[1:]]
    assert read == [sum(SIZES[: at + 1]) for at in range(9)]
    record = read_json(recipe.parent / "run" / "checkpoints" / "first" / "stage.json")
    assert record["counts"] == {"steps": 9, "tokens": {"en": 18 * 16, "xx": 54 * 16}}


def test_the_learning_rate_follows_the_windows(ramped):
    _, rows = ramped
    # A warm-up over 0.3 of 72 windows ends with window 22.
    assert [row["learning_rate"] for row in rows[1:5]] == pytest.approx([1e-2 * read / 22 for read in (4, 8, 12, 20)])
    assert rows[-1]["learning_rate"] == pytest.approx(1e-3)


@pytest.mark.slow
def test_a_ramp_resumes_exactly_and_in_another_layout(ramped, tmp_path):
    recipe, expected = ramped
    same, other = copy_run(recipe, tmp_path / "same"), copy_run(recipe, tmp_path / "other")
    for stop in ("2", "3", "0"):
        rows = train_stage(same, "first", *RAMP, "--train.stop-after-steps", stop)
    for name in ("loss", "grad_norm", "learning_rate", "valid_bits_per_byte", "tokens", "global_batch_size"):
        assert [row.get(name) for row in rows] == [row.get(name) for row in expected], name
    dp2 = run_ranks(train_stage, 2, other, "first", *RAMP)[0]
    assert get_curve(dp2) == pytest.approx(get_curve(expected), rel=1e-5)


@pytest.mark.slow
def test_a_ramp_gives_the_same_losses_in_a_pipeline(ramped, tmp_path):
    recipe, expected = ramped
    rows = run_ranks(train_stage, 2, copy_run(recipe, tmp_path / "pp2"), "first", *RAMP, *LAYOUTS["pp2"][1])[0]
    assert get_curve(rows) == pytest.approx(get_curve(expected), rel=1e-5)


def test_a_ramp_may_not_change_under_a_running_stage_but_its_length_may(ramped, tmp_path):
    recipe = copy_run(ramped[0], tmp_path / "run")
    train_stage(recipe, "first", *RAMP, "--train.stop-after-steps", "4")
    with pytest.raises(CheckpointError, match=r"saved with rampup_batch_size \[4, 4, 24\], now it is \[\]; restore"):
        train_stage(recipe, "first")
    longer = ["--train.stages.0.tokens", str(84 * 16), "--train.continue-blend"]
    rows = train_stage(recipe, "first", *RAMP, *longer)
    assert [row["global_batch_size"] for row in rows[1:]] == [4, 4, 4, 8, 8, 12, 12, 12, 12, 8]
    assert rows[-1]["tokens"] == {"en": 21 * 16, "xx": 63 * 16}


def test_batches_that_the_ranks_cannot_share_are_refused_before_training(tmp_path):
    recipe = make_run(tmp_path)
    with pytest.raises(ConfigError, match="first: rampup_batch_size: a batch of 3 windows is not a multiple of the 2"):
        train_stage(recipe, "first", "--train.stages.0.rampup-batch-size", "3", "3", "24")
