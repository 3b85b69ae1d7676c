"""Steps left out of a run: counted, written down, resumed exactly, and too many of them; spikes of the loss."""

import math
import random

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_adapt.checkpoint.root import find_checkpoint
from megatron_adapt.data.dataset import BlendedWindows
from megatron_adapt.data.plan import read_plan
from megatron_adapt.data.trace import trace_windows
from megatron_adapt.errors import EngineError
from megatron_adapt.files import read_json, to_plain
from megatron_adapt.run_folder import RunFolder
from megatron_adapt.train import guard, loop
from megatron_adapt.train.guard import LossHistory
from tests.helpers.runs import NUM_STEPS, copy_run, make_run, train_stage

TRAIN_STEP = loop.train_step


def spoil_steps(factors):
    """Return a ``train_step`` whose loss is multiplied at some steps, by number, and the gradient if not finite."""

    def spoil(loss, factor):
        return loss + loss.detach() * (factor - 1) if math.isfinite(factor) else loss * factor

    def train_step(trainer, *args, **kwargs):
        factor = factors.get(trainer.schedule.num_steps + 1, 1.0)
        # The hook comes behind the one of the watchdog, and is gone before a validation.
        hook = trainer.models[-1].register_forward_hook(lambda module, args, output: spoil(output, factor))
        try:
            return TRAIN_STEP(trainer, *args, **kwargs)
        finally:
            hook.remove()

    return train_step


def list_exact(rows):
    names = ("step", "loss", "grad_norm", "learning_rate", "valid_bits_per_byte", "tokens", "skipped_steps")
    return [[row.get(name) for name in names] for row in rows]


@pytest.mark.parametrize(
    "flags", [["--train.no-use-distributed-optimizer"], ["--train.bf16"]], ids=["fp32-plain", "bf16-distributed"]
)
def test_a_run_with_left_out_steps_is_resumed_exactly(flags, tmp_path, monkeypatch):
    """The first launch saves before Adam has made a single step."""
    monkeypatch.setattr(loop, "train_step", spoil_steps({1: math.nan, 5: math.inf}))
    straight = make_run(tmp_path / "straight")
    resumed = copy_run(straight, tmp_path / "resumed")
    expected = train_stage(straight, "first", *flags)
    assert [row["skipped_steps"] for row in expected[1:]] == [1, 1, 1, 1, 2, 2]
    assert [row["loss"] is None for row in expected[1:]] == [True, False, False, False, True, False]
    for steps in (1, 4):
        train_stage(resumed, "first", *flags, "--train.stop-after-steps", str(steps))
    assert list_exact(train_stage(resumed, "first", *flags)) == list_exact(expected)
    for step in (1, 5):
        one, other = (find_record(recipe, "non_finite", step) for recipe in (straight, resumed))
        assert one == other


def find_record(recipe, folder, step):
    return read_json(recipe.parent / "run" / "checkpoints" / "first" / folder / f"step_{step}.json")


def list_records(recipe, folder):
    return sorted(path.name for path in (recipe.parent / "run" / "checkpoints" / "first" / folder).glob("*"))


def find_windows(recipe, step):
    run = RunFolder(recipe.parent / "run")
    plan = read_plan(run.plan("first"))
    blend = BlendedWindows(plan, {source: run.tokens(source, "train") for source in plan.sources})
    return orjson.loads(orjson.dumps(to_plain(trace_windows(blend, 12 * (step - 1), 12))))


def test_too_many_left_out_steps_stop_the_run_without_a_save_and_leave_their_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "train_step", spoil_steps({2: math.nan, 4: math.nan, 5: math.inf, 6: math.nan}))
    recipe = make_run(tmp_path)
    with pytest.raises(
        EngineError,
        match=r"step 5: loss inf, norm of the gradient nan, 2 in a row; the run .*non_finite, lower",
    ):
        train_stage(recipe, "first", "--train.max-skipped-steps", "1")
    root = tmp_path / "run" / "checkpoints" / "first"
    assert find_checkpoint(root).name == "iter_0000003"
    assert list_records(recipe, "non_finite") == ["step_2.json", "step_4.json", "step_5.json"]
    record = find_record(recipe, "non_finite", 5)
    assert (record["step"], record["loss"], record["grad_norm"]) == (5, "inf", "nan")
    assert all(window.pop("is_non_finite") for window in record["windows"])
    assert record["windows"] == find_windows(recipe, 5)
    # A new launch reads the same windows, counts from none, and drops what was written of steps it does again.
    monkeypatch.setattr(loop, "train_step", spoil_steps({4: math.nan}))
    rows = train_stage(recipe, "first", "--train.max-skipped-steps", "1")
    assert [row["skipped_steps"] for row in rows[1:]] == [0, 1, 1, 2, 2, 2]
    assert list_records(recipe, "non_finite") == ["step_2.json", "step_4.json"]


def test_a_spike_is_reported_with_its_documents_and_training_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(guard, "_ENOUGH", 3)
    monkeypatch.setattr(loop, "train_step", spoil_steps({5: 10.0}))
    recipe = make_run(tmp_path)
    rows = train_stage(recipe, "first", "--train.loss-spike-factor", "4")
    assert rows[-1]["step"] == NUM_STEPS
    assert list_records(recipe, "loss_spikes") == ["step_5.json"]
    record = find_record(recipe, "loss_spikes", 5)
    assert record["loss"] == rows[5]["loss"] > record["usual_loss"][1] > record["usual_loss"][0]
    assert record["windows"] == find_windows(recipe, 5)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "usual" in line]
    assert f"step 5: loss {record['loss']:.4f}, usual are" in line
    assert line.endswith("step_5.json")


# ---------------------------------------------------------------- the rule


def find_spikes(losses, factor=6.0):
    history = LossHistory(factor)
    return [at for at, loss in enumerate(losses) if history.find_spike(loss) is not None]


def make_losses(seed, number=200):
    """Losses that fall as those of a run do, with noise."""
    draw = random.Random(seed)
    return [2 + 3 / (1 + at / 20) + draw.gauss(0, 0.05) for at in range(number)]


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), at=st.integers(30, 199), height=st.floats(8, 100))
def test_the_spike_is_found_and_nothing_else(seed, at, height):
    losses = make_losses(seed)
    assert find_spikes(losses) == []
    losses[at] += height
    assert find_spikes(losses) == [at]
    assert find_spikes(losses, factor=0.0) == []
    assert find_spikes([loss * 7 for loss in losses]) == [at]


def test_a_spike_of_many_steps_is_one_report_and_the_next_is_another():
    losses = make_losses(1)
    for at in (*range(100, 110), 150):
        losses[at] += 10
    assert find_spikes(losses) == [100, 150]


def test_losses_that_hardly_differ_have_no_spikes_within_the_least_spread():
    assert find_spikes([2.0] * 50 + [2.1] + [2.0] * 20 + [2.13]) == [71]


def test_the_first_losses_are_no_spikes():
    assert find_spikes([2.0] * 19 + [50.0]) == []
