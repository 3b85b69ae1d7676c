"""Plans of training stages: what they print, what they find where a layout does not fit, and what they refuse."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_adapt.checkpoint.root import Description, write_description, write_latest
from megatron_adapt.config import BaseSettings, PlanRun, StageSettings
from megatron_adapt.errors import ConfigError
from megatron_adapt.flags import load_recipe_with
from megatron_adapt.recipe import read_recipe
from megatron_adapt.train.costs import count_gradient_traffic, count_pipeline_traffic
from megatron_adapt.train.layouts import count_least, find_layout, list_layouts
from megatron_adapt.train.memory import measure_stages
from megatron_adapt.train.plan_run import find_shape, list_stages, plan_run, plan_stage
from tests.helpers.runs import make_run, train_stage
from tests.helpers.tiny import write_byte_tokenizer
from tests.train.test_memory import SHAPE, make_job, split

ROOT = Path(__file__).parents[2]
CONFIG = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
RECIPE = """
work_dir = "{folder}/run"
base_model = "{folder}/base"
old_languages = ["en"]
new_languages = ["ja"]
[corpus]
en = []
ja = []
[tokenizer]
size = "extend25"
[checkpoint]
vocab_pad_multiple = 128
[train]
seq_length = 128
micro_batch_size = 2
global_batch_size = 32
save_interval = 30
[[train.stages]]
name = "rows"
tokens = 400_000
blend = {{ ja = 0.9, en = 0.1 }}
trainable = "embeddings"
[[train.stages]]
name = "full"
tokens = 409_601
blend = {{ ja = 0.9, en = 0.1 }}
"""


@pytest.fixture
def recipe_file(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(CONFIG))
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.format(folder=tmp_path))
    return path


def plan(path, *flags):
    return plan_run(*load_recipe_with(PlanRun, ["--recipe", str(path), *flags]))


# ---------------------------------------------------------------- what is planned


def test_a_plan_names_all_stages_and_their_figures(recipe_file, tmp_path, capsys):
    output = tmp_path / "plan.json"
    plan(recipe_file, "--world-size", "8", "--train.tensor-model-parallel-size", "2", "--json", str(output))
    printed = capsys.readouterr().out
    assert "stage rows: learns embeddings, 8 ranks = TP 2 x PP 1 x DP 4" in printed
    assert "vocabulary 1,250, padded to 1,280" in printed
    assert "fits: " in printed
    rows, full = json.loads(output.read_text())["stages"]
    assert full["tokens_per_step"] == 4096
    assert (rows["steps"], full["steps"]) == (98, 101)  # the last step is whole
    assert (rows["num_saves"], full["num_saves"]) == (4, 4)
    assert full["micro_batches"] == 4
    assert full["parameters"] == replace(SHAPE, vocab_size=1280).num_parameters
    assert full["checkpoint_bytes"] == full["parameters"] * 14
    assert rows["learning"] == 2 * 1280 * 64
    assert rows["checkpoint_bytes"] == rows["parameters"] * 2 + rows["learning"] * 12
    assert full["flops_per_step"] > rows["flops_per_step"]
    peak = 8 * 989.5e12 * 0.4 * 86400
    assert full["days"] == pytest.approx(101 * full["flops_per_step"] / peak)
    assert full["fitting"] is None


def test_patterns_are_planned_and_a_name_that_nothing_has_is_refused(recipe_file, tmp_path):
    text, output = recipe_file.read_text(), tmp_path / "plan.json"
    recipe_file.write_text(text.replace('"embeddings"', '["embedding.*", "decoder.layers.3.mlp.*"]'))
    plan(recipe_file, "--world-size", "1", "--json", str(output), "--stage", "rows")
    (rows,) = json.loads(output.read_text())["stages"]
    assert rows["trainable"] == "embedding.*, decoder.layers.3.mlp.*"
    assert rows["learning"] == (1280 + 3 * CONFIG["intermediate_size"]) * 64
    recipe_file.write_text(text.replace('"embeddings"', '"decoder.layers.4.*"'))
    with pytest.raises(ConfigError, match=r"stages rows: trainable 'decoder\.layers\.4\.\*' matches no parameter"):
        plan(recipe_file, "--world-size", "1")


def test_a_growing_batch_takes_more_steps_and_as_many_operations(recipe_file, tmp_path):
    flags = ["--world-size", "1", "--stage", "rows", "--json", str(tmp_path / "plan.json")]
    planned = []
    for ramp in ([], ["--train.stages.0.rampup-batch-size", "8", "8", "48"]):
        plan(recipe_file, *flags, *ramp)
        planned += json.loads((tmp_path / "plan.json").read_text())["stages"]
    whole, ramped = planned
    # 8, 8, 16 and 24 of the 98 * 32 windows, then 96 times 32 and once 8.
    assert (whole["steps"], ramped["steps"]) == (98, 101)
    assert ramped["days"] == whole["days"]


def test_added_blocks_are_planned_once_they_are_there(recipe_file, tmp_path):
    recipe_file.write_text(recipe_file.read_text().replace('"embeddings"', '"expanded_blocks"'))
    message = r'trainable = "expanded_blocks": .*megatron, which says how many there are, is not there yet; make it'
    with pytest.raises(ConfigError, match=message):
        plan(recipe_file, "--world-size", "1", "--stage", "rows")
    expanded = tmp_path / "run" / "megatron" / "release"
    expanded.mkdir(parents=True)
    (expanded / ".metadata").touch()
    write_latest(expanded.parent, None)
    description = Description(
        shape=replace(SHAPE, num_layers=6), true_vocab_size=1250, padded_vocab_size=1280, tokenizer_fingerprint=None,
        step=0, dtype="bfloat16", new_blocks=(2, 5),
    )  # fmt: skip
    write_description(expanded, description)
    plan(recipe_file, "--world-size", "1", "--stage", "rows", "--json", str(tmp_path / "plan.json"))
    (rows,) = json.loads((tmp_path / "plan.json").read_text())["stages"]
    assert rows["parameters"] == replace(SHAPE, num_layers=6, vocab_size=1280).num_parameters
    body = replace(SHAPE, vocab_size=0).num_parameters - SHAPE.hidden_size
    assert rows["learning"] == 2 * body // SHAPE.num_layers


@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_checkpoint_is_as_large_as_planned(dtype, distributed, tmp_path):
    """A model of which the records of its files are a small part."""
    types = ["--train.exp-avg-dtype", dtype] + ([] if distributed else ["--train.no-use-distributed-optimizer"])
    recipe_file = make_run(tmp_path, hidden_size=256, intermediate_size=768, num_hidden_layers=4)
    train_stage(recipe_file, "first", "--train.stop-after-steps", "1", *types)
    (saved,) = (tmp_path / "run" / "checkpoints" / "first").glob("iter_*")
    num_bytes = sum(file.stat().st_size for file in saved.glob("*.distcp"))
    recipe = read_recipe(recipe_file)
    train = replace(recipe.train, exp_avg_dtype=dtype, use_distributed_optimizer=distributed)
    recipe = replace(recipe, checkpoint=replace(recipe.checkpoint, vocab_pad_multiple=128), train=train)
    write_byte_tokenizer(tmp_path / "run" / "tokenizer")
    costs, _ = plan_stage(recipe, PlanRun(world_size=1), recipe.train.stages[0], find_shape(recipe, None))
    assert costs.checkpoint_bytes == pytest.approx(num_bytes, rel=0.02)


def test_the_vocabulary_is_that_of_the_tokenizer_once_it_is_made(recipe_file, tmp_path):
    recipe = read_recipe(recipe_file)
    assert find_shape(recipe, None).vocab_size == 1250
    write_byte_tokenizer(tmp_path / "run" / "tokenizer", 333)
    assert find_shape(recipe, None).vocab_size == 333


@pytest.mark.parametrize(
    ("settings", "vocab_size"),
    [
        ({"size": "100"}, 1100),
        ({"size": "extend25", "size_multiple": 512}, 1536),
        ({"method": "replace", "size": "777"}, 777),
        ({"method": "optimize", "size": "500"}, 1000),
    ],
)
def test_the_vocabulary_is_planned_by_the_recipe_before(recipe_file, settings, vocab_size):
    recipe = read_recipe(recipe_file)
    recipe = replace(recipe, tokenizer=replace(recipe.tokenizer, **{"size": "extend25", **settings}))
    assert find_shape(recipe, None).vocab_size == vocab_size


def test_the_stage_of_a_base_made_from_scratch_has_the_vocabulary_of_the_base(recipe_file):
    recipe = read_recipe(recipe_file)
    stage = StageSettings(name="base", tokens=1, blend={"en": 1.0})
    recipe = replace(recipe, base_model=None, base=BaseSettings(vocab_size=1000), base_train=stage)
    assert [stage.name for stage in list_stages(recipe, "base")] == ["base"]
    costs, _ = plan_stage(recipe, PlanRun(world_size=1), stage, find_shape(recipe, None))
    assert costs.vocab_size == 1000


def test_traffic_by_hand():
    job = make_job(world_size=8, **split(1, 4))
    # 24 micro-batches a rank; a stage between two others sends [2, 128, 64] in bf16 both ways.
    assert count_pipeline_traffic(job) == 24 * 2 * 2 * 128 * 64 * 2
    assert count_pipeline_traffic(make_job(world_size=8, **split(1, 2))) == 12 * 2 * 128 * 64 * 2
    assert count_pipeline_traffic(make_job(world_size=8)) == 0
    # Two copies: half of the fp32 gradients, half of the bf16 weights; without the optimizer's cut twice the former.
    assert count_gradient_traffic(job, 4000) == (2000 + 1000, 0)
    assert (
        count_gradient_traffic(make_job(world_size=8, use_distributed_optimizer=False, **split(1, 4)), 4000)[0] == 4000
    )
    tied = make_job(replace(SHAPE, tied=True), world_size=8, **split(2, 2))
    assert count_gradient_traffic(tied, 0)[1] == 4 * 1024 * 64 // 2


# ---------------------------------------------------------------- layouts


def test_layouts_divide_the_model_and_the_ranks_and_begin_with_the_cheapest():
    found = [
        (job.train.tensor_model_parallel_size, job.train.pipeline_model_parallel_size)
        for job in list_layouts(make_job(world_size=8))
    ]
    assert found == [(1, 1), (2, 1), (1, 2), (2, 2), (1, 4), (2, 4)]


def test_what_does_not_fit_names_a_layout_that_does(recipe_file, tmp_path, capsys):
    job = make_job(world_size=8)
    whole = max(stage.total for stage in measure_stages(job))
    found = find_layout(job, 0.7 * whole)
    assert found is not None
    other, stages = found
    assert max(stage.total for stage in stages) <= 0.7 * whole
    assert other.train.model_parallel_size > 1
    assert find_layout(job, 1000) is None
    limit = [0.7 * whole / 1e9, 1e-6]
    plan(recipe_file, "--stage", "full", "--world-size", "8", "--device-memory", f"{limit[0]:.6f}")
    printed = capsys.readouterr().out
    assert "does not fit: a rank of pipeline stage 0 takes" in printed
    named = printed[printed.index("--train.tensor") :].split("\n")[0].split()
    plan(recipe_file, "--stage", "full", "--world-size", "8", "--device-memory", f"{limit[0]:.6f}", *named)
    assert "\n  fits: " in capsys.readouterr().out
    plan(recipe_file, "--stage", "full", "--world-size", "8", "--device-memory", f"{limit[1]:.6f}")
    assert "and no layout of 8 ranks does; lower micro_batch_size or seq_length" in capsys.readouterr().out


def test_what_is_passed_over_could_not_fit():
    for trainable in ("all", "embeddings"):
        for job in list_layouts(make_job(world_size=8, trainable=trainable)):
            assert count_least(job) <= max(stage.total for stage in measure_stages(job))


@pytest.mark.slow
def test_70b_on_256_ranks_is_planned_in_little_memory(tmp_path):
    folder = ROOT / "examples" / "llama2_70b_japanese"
    command = [sys.executable, "tools/plan_run.py", "--recipe", folder / "recipe.toml", "--world-size", "256"]
    output = tmp_path / "output"
    with output.open("wb") as file:
        planning = subprocess.Popen(
            [*command, "--config", folder / "config.json"], stdout=file, stderr=subprocess.STDOUT, cwd=ROOT
        )
        # Of this child alone: what all children took would be that of any test before.
        _, status, used = os.wait4(planning.pid, 0)
        planning.returncode = os.waitstatus_to_exitcode(status)
    assert planning.returncode == 0, output.read_text()
    assert "TP 8 + SP x PP 8 x DP 4" in output.read_text()
    assert used.ru_maxrss < 4_000_000


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train.tensor-model-parallel-size", "4"], "tensor_model_parallel_size: 4 does not fit the model's 2 k"),
        (["--train.pipeline-model-parallel-size", "3"], "pipeline_model_parallel_size: 3 does not divide 4 layers"),
        (["--train.pipeline-model-parallel-size", "4", "--world-size", "6"], "launch: 6 ranks cannot hold"),
        (["--world-size", "3"], "global_batch_size: 32 is not a multiple of micro_batch_size 2 x 3"),
        (["--stage", "fool"], "--stage: 'fool' is not in the recipe; use rows or full"),
        (["--base-model", "gone"], "base_model: no config.json in gone; add --config FILE"),
        (["--base-model", "None"], "base_model: the recipe names none and has no"),
        (
            ["--tokenizer.method", "transplant", "--tokenizer.donor", "gone", "--tokenizer.adopt",
             "--tokenizer.size", "extend100"],
            "tokenizer.donor: gone is not on this machine",
        ),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(recipe_file, flags, message):
    with pytest.raises(ConfigError, match=message):
        plan(recipe_file, "--world-size", "8", *flags)


def test_a_recipe_without_stages_is_refused(recipe_file):
    recipe = read_recipe(recipe_file)
    with pytest.raises(ConfigError, match=r"train\.stages: empty; add a \[\[train\.stages\]\] table"):
        list(list_stages(replace(recipe, train=replace(recipe.train, stages=())), ""))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"world_size": 0}, "--world-size: 0 is below 1"),
        ({"device_memory": -1.0}, "--device-memory: -1.0 is below 0"),
        ({"device": "cpu"}, "--device-memory: missing; a cpu has no data sheet"),
        ({"mfu": 40.0}, "--mfu: 40.0 is not between 0 and 1"),
        ({"save_speed": 0.0}, "--save-speed: 0.0 is not positive"),
    ],
)
def test_wrong_values_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        PlanRun(**{"world_size": 8, **settings})


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--world-size", "8"], "--recipe: missing; name a recipe"),
        (["--recipe", "RECIPE"], "--world-size"),
        (["--recipe", "RECIPE", "--world-size", "8", "--train.seq-lenght", "1"], "--train.seq-lenght"),
        (["--recipe", "RECIPE", "--world-size", "0"], "--world-size: 0 is below 1"),
    ],
)
def test_a_wrong_flag_of_tool_or_recipe_exits_with_two(recipe_file, argv, message, capsys):
    with pytest.raises(SystemExit) as caught:
        load_recipe_with(PlanRun, [str(recipe_file) if word == "RECIPE" else word for word in argv])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_flags_go_where_they_belong(recipe_file):
    argv = [
        "--recipe",
        str(recipe_file),
        "--world-size",
        "8",
        "--work-dir",
        "x",
        "--mfu=0.3",
        "--train.seq-length",
        "64",
    ]
    recipe, config = load_recipe_with(PlanRun, argv)
    assert (recipe.work_dir, recipe.train.seq_length, recipe.tokenizer.size) == (Path("x"), 64, "extend25")
    assert config == PlanRun(world_size=8, mfu=0.3)
