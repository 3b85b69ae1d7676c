"""Training on the real engine: layouts, exact resume, what learns, and what is refused.

Cheapest first within a topic; every spawn starts the engine anew (about 8 s) and checks several claims.
"""

import json
import shutil

import numpy as np
import pytest
import torch

from megatron_adapt.checkpoint.dist import DistReader
from megatron_adapt.checkpoint.root import find_checkpoint
from megatron_adapt.data.plan import read_plan
from megatron_adapt.errors import CheckpointError, ConfigError, EngineError
from megatron_adapt.logs import read_metrics
from tests.helpers.runs import NUM_STEPS, TOKENS, copy_run, get_curve, make_run, train_stage
from tests.helpers.spawn import run_ranks

LAYOUTS = {
    "tp2": (2, ["--train.tensor-model-parallel-size", "2"]),
    "pp2": (2, ["--train.pipeline-model-parallel-size", "2"]),
    "tp2-pp2": (4, ["--train.tensor-model-parallel-size", "2", "--train.pipeline-model-parallel-size", "2"]),
    "tp2-sp": (2, ["--train.tensor-model-parallel-size", "2", "--train.sequence-parallel"]),
    "dp2": (2, []),
    "dp2-without-distributed-optimizer": (2, ["--train.no-use-distributed-optimizer"]),
}


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["untied", "tied"])
def reference(request, tmp_path_factory):
    """A run on one rank: its recipe and its metrics."""
    folder = tmp_path_factory.mktemp("reference")
    recipe = make_run(folder, tie_word_embeddings=request.param)
    rows = train_stage(recipe, "first")
    return recipe, rows


def test_reference_learns_and_logs_every_step(reference):
    _, rows = reference
    losses = get_curve(rows)
    assert len(losses) == NUM_STEPS
    assert losses[-1] < 0.9 * losses[0]
    assert rows[0]["step"] == 0
    assert [row["step"] for row in rows if "valid_bits_per_byte" in row] == [0, 3, 6]
    first, last = rows[0]["valid_bits_per_byte"], rows[-1]["valid_bits_per_byte"]
    assert last["xx"] < first["xx"]
    assert last["en"] < first["en"]


def test_tokens_of_each_language_are_those_of_the_blend(reference):
    _, rows = reference
    assert rows[-1]["tokens"] == {"en": NUM_STEPS * 3 * 16, "xx": NUM_STEPS * 9 * 16}


# What each of them computes is proven in test_layout_matrix.py; here the whole stage runs in it.
@pytest.mark.parametrize(
    "layout", [name if name == "tp2-sp" else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS]
)
def test_losses_do_not_depend_on_the_layout(reference, layout, tmp_path):
    recipe, expected = reference
    world_size, flags = LAYOUTS[layout]
    copied = copy_run(recipe, tmp_path / "run")
    rows = run_ranks(train_stage, world_size, copied, "first", *flags)[0]
    assert get_curve(rows) == pytest.approx(get_curve(expected), rel=1e-5)
    # A norm that misses a shard clips by another factor; the first losses would not show it.
    norms = [row["grad_norm"] for row in expected if "grad_norm" in row]
    assert [row["grad_norm"] for row in rows if "grad_norm" in row] == pytest.approx(norms, rel=1e-4)
    for row, other in zip(rows, expected, strict=True):
        for name in ("valid_bits_per_byte", "bits_per_byte"):
            assert row.get(name, {}) == pytest.approx(other.get(name, {}), rel=1e-5)


RESUMES = {
    "fp32": (1, []),
    "bf16": (1, ["--train.bf16"]),
    "bf16-tp2-sp": (2, ["--train.bf16", *LAYOUTS["tp2-sp"][1]]),
    "fp32-pp2": (2, LAYOUTS["pp2"][1]),
}
QUICK = ("fp32",)


@pytest.mark.parametrize(
    "case", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RESUMES]
)
def test_resumed_run_equals_an_undisturbed_one(case, tmp_path):
    world_size, flags = RESUMES[case]
    straight = make_run(tmp_path / "straight")
    resumed = copy_run(straight, tmp_path / "resumed")
    expected = run_ranks(train_stage, world_size, straight, "first", *flags)[0]
    half = run_ranks(train_stage, world_size, resumed, "first", *flags, "--train.stop-after-steps", "3")[0]
    assert half[-1]["step"] == 3
    rows = run_ranks(train_stage, world_size, resumed, "first", *flags)[0]
    for name in ("loss", "bits_per_byte", "grad_norm", "learning_rate", "valid_bits_per_byte", "forgetting", "tokens"):
        assert [row.get(name) for row in rows] == [row.get(name) for row in expected], name


@pytest.mark.slow
def test_state_of_another_layout_continues_within_rounding(reference, tmp_path):
    recipe, expected = reference
    copied = copy_run(recipe, tmp_path / "run")
    run_ranks(train_stage, 2, copied, "first", *LAYOUTS["tp2"][1], "--train.stop-after-steps", "3")
    rows = run_ranks(train_stage, 2, copied, "first", *LAYOUTS["pp2"][1])[0]
    assert get_curve(rows) == pytest.approx(get_curve(expected), rel=1e-6)


def test_embeddings_stage_starts_from_the_stage_before_and_leaves_the_body_alone(reference):
    recipe, first_rows = reference
    rows = train_stage(recipe, "second")
    assert rows[0]["valid_bits_per_byte"] == pytest.approx(first_rows[-1]["valid_bits_per_byte"], rel=1e-6)
    checkpoints = recipe.parent / "run" / "checkpoints"
    before, after = (DistReader(find_checkpoint(checkpoints / stage)) for stage in ("first", "second"))
    changed = {
        name
        for name in before.keys
        if not name.startswith("optimizer") and not torch.equal(before.read(name), after.read(name))
    }
    assert changed in (
        {"embedding.word_embeddings.weight"},
        {"embedding.word_embeddings.weight", "output_layer.weight"},
    )
    assert {name for name in after.keys if name.startswith("optimizer.state.exp_avg.")} == {
        f"optimizer.state.exp_avg.{name}" for name in changed
    }


def test_finished_stage_is_not_trained_again(reference):
    recipe, rows = reference
    record = recipe.parent / "run" / "checkpoints" / "first" / "stage.json"
    written = record.read_bytes()
    assert train_stage(recipe, "first") == rows
    assert record.read_bytes() == written
    with pytest.raises(CheckpointError, match=r"finished, with other settings .*; remove the folder"):
        train_stage(recipe, "first", "--train.stages.0.lr", "5e-3")


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["--train.blend-engine", "megatron"], "blend_engine"),
        (["--train.global-batch-size", "6", "--train.stages.0.tokens", "1152"], "global_batch_size"),
        (["--train.stages.0.trainable", "embeddings"], "trainable"),
        (["--train.bf16"], "bf16"),
        (["--train.exp-avg-dtype", "bf16"], "exp_avg_dtype"),
        (["--train.exp-avg-sq-dtype", "bf16"], "exp_avg_sq_dtype"),
        (["--train.reset-attention-mask"], "reset_attention_mask"),
        (["--train.eod-mask-loss"], "eod_mask_loss"),
        (["--train.no-use-distributed-optimizer"], "use_distributed_optimizer"),
    ],
)
def test_what_decides_the_result_may_not_change_under_a_running_stage(started, flags, name):
    with pytest.raises(CheckpointError, match=rf"saved with {name} \w+, now it is \w+; restore the setting"):
        train_stage(started, "first", *flags)


def test_data_that_changed_under_a_running_stage_are_refused_by_name(started, tmp_path):
    recipe = copy_run(started, tmp_path / "run", trained=True)
    path = recipe.parent / "run" / "tokens" / "xx-train.bin"
    content = bytearray(path.read_bytes())
    content[10:12] = content[12:14]
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"xx-train\.bin: not the data that .*iter_0000003 was trained on"):
        train_stage(recipe, "first")


OTHER_BLEND = ["--train.stages.0.blend.en", "0.5", "--train.stages.0.blend.xx", "0.5"]


def test_another_plan_is_refused_by_what_changed(started):
    message = r"iter_0000003: the stage was trained on another plan than .* \(.* of xx .*\); restore them, or add --"
    with pytest.raises(CheckpointError, match=message):
        train_stage(started, "first", *OTHER_BLEND)
    changed = ["--train.seq-length", "8"]
    with pytest.raises(CheckpointError, match=r"\(seq_length 16, now 8\); restore them, or add --train.continue-blend"):
        train_stage(started, "first", *changed)


def test_a_checkpoint_says_where_it_stands_in_every_source(started):
    folder = find_checkpoint(started.parent / "run" / "checkpoints" / "first")
    stored = json.loads((folder / "training.json").read_text())
    assert {name: cursor["read"] for name, cursor in stored["cursors"].items()} == {"en": 9, "xx": 27}
    plan = read_plan(folder / "plan.json")
    for at, cursor in enumerate(stored["cursors"].values()):
        assert cursor["epoch"] * plan.available[at] + cursor["window"] == cursor["read"]


def test_a_changed_blend_goes_on_behind_what_was_read_if_told_so(started, tmp_path):
    """The rest of the stage reads by the new shares, and a third launch needs no second permission."""
    recipe = copy_run(started, tmp_path / "run", trained=True)
    again = [*OTHER_BLEND, "--train.stop-after-steps", "1"]
    rows = train_stage(recipe, "first", *again, "--train.continue-blend")
    assert rows[-1]["step"] == 4
    assert rows[-1]["tokens"] == {"en": (9 + 6) * 16, "xx": (27 + 6) * 16}
    folder = find_checkpoint(recipe.parent / "run" / "checkpoints" / "first")
    plan = read_plan(folder / "plan.json")
    assert (plan.begin, plan.before) == (36, (9, 27))
    rows = train_stage(recipe, "first", *OTHER_BLEND)
    assert [row["step"] for row in rows] == list(range(NUM_STEPS + 1))
    assert rows[-1]["tokens"] == {"en": (9 + 18) * 16, "xx": (27 + 18) * 16}


def test_a_longer_stage_reads_on_as_if_it_had_always_been_so_long(started, tmp_path):
    recipe = copy_run(started, tmp_path / "run", trained=True)
    longer = ["--train.stages.0.tokens", str(2 * TOKENS), "--train.continue-blend"]
    rows = train_stage(recipe, "first", *longer, "--train.stop-after-steps", "2")
    assert rows[-1]["step"] == 5
    assert read_plan(recipe.parent / "run" / "checkpoints" / "first" / "plan.json").before == (0, 0)
    assert rows[-1]["tokens"] == {"en": 15 * 16, "xx": 45 * 16}


@pytest.mark.slow
def test_megatron_orders_the_windows_by_itself_and_is_resumed_exactly(tmp_path):
    straight = make_run(tmp_path / "straight")
    resumed = copy_run(straight, tmp_path / "resumed")
    flags = ["--train.blend-engine", "megatron"]
    expected = run_ranks(train_stage, 2, straight, "first", *flags)[0]
    run_ranks(train_stage, 2, resumed, "first", *flags, "--train.stop-after-steps", "3")
    rows = run_ranks(train_stage, 1, resumed, "first", *flags)[0]
    assert get_curve(rows) == pytest.approx(get_curve(expected), rel=1e-5)
    assert rows[-1]["tokens"] == expected[-1]["tokens"]
    assert list((tmp_path / "straight" / "run" / "checkpoints" / "first" / "megatron_index").iterdir())


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A run that stopped in the middle of its first stage."""
    recipe = make_run(tmp_path_factory.mktemp("started"))
    train_stage(recipe, "first", "--train.stop-after-steps", "3")
    return recipe


def test_next_stage_waits_for_the_end_of_the_one_before(started):
    with pytest.raises(CheckpointError, match="first: the stage before is not finished; train it to its end first"):
        train_stage(started, "second")


def test_diverged_run_stops_before_it_is_saved(tmp_path):
    recipe = make_run(tmp_path)
    flags = ["--train.stages.0.lr", "1e38", "--train.clip-grad", "1e38", "--train.max-skipped-steps", "0"]
    with pytest.raises(EngineError, match=r"the run diverged at learning rate .*; look .*, lower the"):
        train_stage(recipe, "first", *flags)
    assert not (tmp_path / "run" / "checkpoints" / "first" / "stage.json").exists()


def test_language_left_out_of_a_blend_is_still_validated(tmp_path):
    recipe = make_run(tmp_path)
    recipe.write_text(recipe.read_text().replace("blend = { en = 0.25, xx = 0.75 }", "blend = { xx = 1.0 }"))
    rows = train_stage(recipe, "first", "--train.stop-after-steps", "1")
    assert set(rows[0]["valid_bits_per_byte"]) == {"en", "xx"}
    assert rows[-1]["tokens"] == {"xx": 12 * 16}


def test_changed_learning_rate_takes_effect_on_resume_and_is_told(tmp_path, capsys):
    recipe = make_run(tmp_path)
    train_stage(recipe, "first", "--train.stop-after-steps", "3")
    train_stage(recipe, "first", "--train.stop-after-steps", "1")
    assert "learning rate:" not in capsys.readouterr().err
    rows = train_stage(recipe, "first", "--train.stages.0.min-lr", "5e-3")
    assert rows[-1]["learning_rate"] == pytest.approx(5e-3)
    said = "learning rate: 0.0055 at the save, now 0.0075 (min_lr 0.001, now 0.005)"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("part", ["train", "valid"])
def test_tokens_of_another_tokenizer_are_refused(part, tmp_path):
    recipe = make_run(tmp_path / "one")
    other = make_run(tmp_path / "two", vocab_size=310)
    for file in (other.parent / "run" / "tokens").glob(f"*-{part}.*"):
        shutil.copy(file, recipe.parent / "run" / "tokens")
    with pytest.raises(CheckpointError, match=rf"-{part}: .* with 310 tokens, but the .* with 300; run tools/"):
        train_stage(recipe, "first")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train.tensor-model-parallel-size", "4"], "4 does not fit the model's 2 key-value heads.*; use 1 or 2"),
        (["--train.pipeline-model-parallel-size", "3"], "3 does not divide 2 layers; use 1 or 2"),
        (["--train.micro-batch-size", "5"], "global_batch_size: 12 is not a multiple of micro_batch_size 5 x 1"),
        (["--train.seq-length", "256"], "256 exceeds the model's 128 positions"),
        (["--train.sequence-parallel"], "no effect at tensor_model_parallel_size 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(reference, flags, message, tmp_path):
    recipe, _ = reference
    copied = copy_run(recipe, tmp_path / "run")
    with pytest.raises(ConfigError, match=message):
        train_stage(copied, "first", *flags)
    assert not (tmp_path / "run" / "run" / "checkpoints").exists()


def test_metrics_of_steps_behind_the_last_checkpoint_are_dropped_on_resume(tmp_path):
    recipe = make_run(tmp_path)
    train_stage(recipe, "first", "--train.stop-after-steps", "3")
    metrics = tmp_path / "run" / "checkpoints" / "first" / "metrics.jsonl"
    with metrics.open("a") as file:
        file.write('{"step": 4, "loss": 1.0}\n{"step": 5, "lo')
    train_stage(recipe, "first")
    assert [row["step"] for row in read_metrics(metrics)] == list(range(NUM_STEPS + 1))
    assert np.isfinite(get_curve(read_metrics(metrics))).all()
