"""The rows of a stage: training loss per source, validation per language, what is forgotten, and who gets them."""

import math
import sys

import numpy as np
import pytest
import torch
from megatron.core import parallel_state

from megatron_adapt.checkpoint.root import find_checkpoint
from megatron_adapt.checkpoint.weights import load_weights
from megatron_adapt.config import DataSettings, Layout, PreprocessData
from megatron_adapt.data.encode import preprocess_data
from megatron_adapt.engine.llama import build_model
from megatron_adapt.engine.parallel import make_groups, start_engine
from megatron_adapt.flags import load_recipe
from megatron_adapt.train.inputs import open_inputs
from megatron_adapt.train.metrics import describe_row, find_base
from megatron_adapt.train.optimizer import build_trainer
from megatron_adapt.train.step import measure_bits_per_byte, train_step
from megatron_adapt.train.tally import BatchSources
from tests.helpers.runs import NUM_STEPS, copy_run, make_run, make_texts, train_stage, write_documents
from tests.helpers.spawn import run_ranks
from tests.train.test_sinks import FakeBoard, FakeWandb

BATCH, T = 12, 16
LAYOUTS = (
    Layout(tensor_model_parallel_size=2),
    Layout(pipeline_model_parallel_size=2),
    Layout(context_parallel_size=2),
    Layout(),
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A run whose new language has two sources."""
    recipe = make_run(tmp_path_factory.mktemp("sources"))
    raw, tokens = recipe.parent / "raw", recipe.parent / "run" / "tokens"
    for part, seed in (("train", 1), ("valid", 2)):
        write_documents(raw / f"other-{part}.jsonl", make_texts("ja jo ju ba so".split(), 60, seed))
        for source, file in (("xx/a", "xx"), ("xx/b", "other")):
            preprocess_data(
                PreprocessData(
                    input=(raw / f"{file}-{part}.jsonl",),
                    tokenizer=recipe.parent / "hf",
                    output_prefix=tokens / f"{source}-{part}",
                    settings=DataSettings(append_eod=True),
                )
            )
    files = f'"xx/a" = ["{raw}/xx.jsonl"]\n"xx/b" = ["{raw}/other.jsonl"]'
    recipe.write_text(recipe.read_text().replace(f'xx = ["{raw}/xx.jsonl"]', files))
    return recipe


@pytest.fixture(scope="module")
def trained(sources, tmp_path_factory):
    """Rows of both stages."""
    recipe = copy_run(sources, tmp_path_factory.mktemp("trained") / "run")
    return recipe, [train_stage(recipe, stage) for stage in ("first", "second")]


def open_first(recipe):
    return open_inputs(*load_recipe(["--recipe", str(recipe), "--stage", "first"], stage=True))


def make_trainer(inputs, layout):
    description = inputs.description
    model = build_model(
        description.shape, padded_vocab_size=description.padded_vocab_size, layout=layout, seq_length=T, bf16=False
    )
    trainer = build_trainer([model], inputs.settings, inputs.place.settings, NUM_STEPS)
    load_weights(trainer.bare_models, find_checkpoint(inputs.initial.parent))
    trainer.optimizer.reload_model_params()
    return trainer


def sum_first_step(recipe):
    """Return the sums per source of the first step in every layout that two ranks can have; needs two ranks."""
    inputs, found = open_first(recipe), []
    windows, sources_B, loss_mask = inputs.blend.read_windows(0, BATCH)
    with start_engine(LAYOUTS[0], seed=1):
        for layout in LAYOUTS:
            parallel_state.destroy_model_parallel()
            make_groups(layout)
            batch = BatchSources(
                sources_B=sources_B, num_sources=3, token_bytes_V=torch.from_numpy(inputs.token_bytes_V)
            )
            report = train_step(make_trainer(inputs, layout), windows, 2, loss_mask=loss_mask, sources=batch)
            found.append(report.by_source)
    return found


def test_training_bits_per_byte_are_those_that_validation_would_find(sources, trained):
    """Of the windows of a source in the first step, before it: two ways through the engine."""
    inputs, (_, rows) = open_first(sources), trained[1][0][:2]
    windows, sources_B, _ = inputs.blend.read_windows(0, BATCH)
    assert inputs.blend.plan.sources == ("en", "xx/a", "xx/b")
    members = {"en": [0], "xx/a": [1], "xx/b": [2], "xx": [1, 2]}
    with start_engine(Layout(), seed=1):
        models, token_bytes_V = make_trainer(inputs, Layout()).models, torch.from_numpy(inputs.token_bytes_V)
        expected = {
            name: measure_bits_per_byte(models, windows[np.isin(sources_B, own)], token_bytes_V, 2)
            for name, own in members.items()
        }
    assert rows["bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    assert len({round(value, 2) for value in expected.values()}) == 4, "sources that are alike prove nothing"


def test_sums_per_source_do_not_depend_on_the_layout(sources, trained):
    first = trained[1][0][1]["bits_per_byte"]
    for found in run_ranks(sum_first_step, 2, sources):
        for sums in found:
            losses, num_bytes = np.reshape(sums, (2, 3))
            bits = dict(zip(("en", "xx/a", "xx/b"), losses / num_bytes / math.log(2), strict=True))
            assert bits == pytest.approx({name: first[name] for name in bits}, rel=1e-5)


def test_a_row_sums_the_steps_since_the_one_before(sources, trained, tmp_path):
    inputs = open_first(sources)
    rows = train_stage(copy_run(sources, tmp_path / "run"), "first", "--train.log-interval", "3")
    assert [row["step"] for row in rows] == [0, 3, 6]
    bits, num_bytes = np.zeros(3), np.zeros(3)
    for step, row in enumerate(trained[1][0][1:4]):
        windows, sources_B, _ = inputs.blend.read_windows(step * BATCH, BATCH)
        bytes_B = inputs.token_bytes_V[windows[:, 1:]].sum(1)
        for at, name in enumerate(("en", "xx/a", "xx/b")):
            own = bytes_B[sources_B == at].sum()
            bits[at] += row["bits_per_byte"].get(name, 0) * own
            num_bytes[at] += own
    assert [rows[1]["bits_per_byte"][name] for name in ("en", "xx/a", "xx/b")] == pytest.approx(list(bits / num_bytes))
    assert rows[1]["bits_per_byte"]["xx"] == pytest.approx(bits[1:].sum() / num_bytes[1:].sum())


def test_validation_has_every_source_and_every_language_and_what_is_forgotten(sources, trained):
    inputs, (first, second) = open_first(sources), trained[1]
    num_bytes = {name: inputs.token_bytes_V[windows[:, 1:]].sum() for name, windows in inputs.valid.items()}
    valid = first[0]["valid_bits_per_byte"]
    together = sum(valid[name] * num_bytes[name] for name in ("xx/a", "xx/b"))
    assert valid["xx"] == pytest.approx(together / (num_bytes["xx/a"] + num_bytes["xx/b"]))
    assert "forgetting" not in first[0]
    # Of old languages alone, against the model before any training, in the second stage too.
    for row in (first[-1], second[0], second[-1]):
        assert row["forgetting"] == {"en": row["valid_bits_per_byte"]["en"] - valid["en"]}
    assert second[0]["forgetting"]["en"] == pytest.approx(first[-1]["forgetting"]["en"], rel=1e-5)
    assert not any("forgetting" in row for row in first if "valid_bits_per_byte" not in row)


def test_forgetting_goes_on_after_a_resume_and_needs_the_same_windows(sources, tmp_path, capsys):
    recipe = copy_run(sources, tmp_path / "run")
    stopped = train_stage(recipe, "first", "--train.stop-after-steps", "3")
    other = copy_run(recipe, tmp_path / "other", trained=True)
    rows = train_stage(recipe, "first")
    assert rows[: len(stopped)] == stopped
    change = rows[-1]["valid_bits_per_byte"]["en"] - rows[0]["valid_bits_per_byte"]["en"]
    assert rows[-1]["forgetting"] == {"en": change}
    assert "no forgetting" not in capsys.readouterr().err
    fewer = train_stage(other, "first", "--train.eval-windows", "4")
    assert "forgetting" not in fewer[-1]
    said = "metrics.jsonl: the base was not measured on the validation windows of en; no forgetting"
    assert capsys.readouterr().err.count(said) == 1


def test_a_run_of_before_the_windows_were_hashed_has_no_base(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert find_base(path, {"en": "x"}) == {}
    path.write_text('{"step": 0, "valid_bits_per_byte": {"en": 1.0}}\n')
    assert find_base(path, {"en": "x"}) == {}
    path.write_text('{"step": 0, "valid_bits_per_byte": {"en": 1.0, "de": 2.0}, "valid_windows": {"en": "x"}}\n')
    assert find_base(path, {"en": "x", "de": "y"}) == {"en": 1.0}


def test_the_console_line_says_everything_of_a_row():
    row = {
        "step": 20, "loss": 2.5, "bits_per_byte": {"en": 0.75, "xx/a": 1.0, "xx/b": 2.0, "xx": 1.5},
        "grad_norm": 1.25, "learning_rate": 1e-4, "tokens": {"en": 1}, "tokens_per_second": 12345.6,
        "tflops_per_device": 412.3, "mfu": 0.4167, "data_wait_share": 0.012, "peak_memory_gb": 71.28,
        "eta_seconds": 93784.4, "cost_to_finish": 4168.2,
        "valid_bits_per_byte": {"en": 0.75, "de": 0.5, "xx": 1.5}, "forgetting": {"en": 0.0125, "de": -0.01},
    }  # fmt: skip
    assert describe_row(row, 1000) == (
        "step 20/1000  loss 2.5000  lr 1.00e-04  grad norm 1.25  12,346 tokens/s  412 TFLOP/s  MFU 41.7%  "
        "data wait 1.2%  memory 71.3 GB  1 day, 2:03:04 left  costs 4,168.20 more  "
        "train en 0.7500, xx 1.5000 bits/byte  valid en 0.7500 (+0.0125), de 0.5000 (-0.0100), xx 1.5000 bits/byte"
    )


def test_tensorboard_and_wandb_get_the_rows_of_the_file(sources, tmp_path, monkeypatch):
    board, wandb = FakeBoard(), FakeWandb()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    recipe = copy_run(sources, tmp_path / "run")
    flags = ["--train.tensorboard-dir", str(tmp_path / "board"), "--train.wandb-project", "p"]
    train_stage(recipe, "first", *flags, "--train.stop-after-steps", "3")
    rows = train_stage(recipe, "first", *flags, "--train.device-hour-price", "2")
    logged = [call[1] for call in wandb.calls if call[0] == "log"]
    assert [row["step"] for row in logged] == list(range(NUM_STEPS + 1))
    assert [(row["step"], row.get("loss")) for row in logged] == [(row["step"], row.get("loss")) for row in rows]
    assert logged[-1]["forgetting/en"] == rows[-1]["forgetting"]["en"]
    assert logged[-1]["bits_per_byte/xx/a"] == rows[-1]["bits_per_byte"]["xx/a"]
    assert logged[-1]["cost_to_finish"] == rows[-1]["cost_to_finish"]
    drawn = [call for call in board.calls if call[0] == "mfu"]
    assert drawn == [("mfu", row["mfu"], row["step"]) for row in rows[1:]]
    assert len({call[1]["id"] for call in wandb.calls if call[0] == "init"}) == 1
    assert [call[1]["purge_step"] for call in board.calls if call[0] == "open"] == [0, 4]
