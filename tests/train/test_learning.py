"""What learns by name, added blocks alone, and vocabulary matrices with a learning rate of their own."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch

from megatron_adapt.checkpoint.dist import DistReader
from megatron_adapt.checkpoint.reshape import expand_blocks
from megatron_adapt.checkpoint.root import find_checkpoint, read_description
from megatron_adapt.config import ExpandBlocks, StageSettings
from megatron_adapt.engine.llama import build_model
from megatron_adapt.engine.parallel import Layout, start_engine
from megatron_adapt.engine.trainable import freeze_rest, name_parameters
from megatron_adapt.errors import CheckpointError, ConfigError
from megatron_adapt.train.learning import check_learning
from tests.helpers.runs import copy_run, get_curve, make_run, train_stage
from tests.helpers.shapes import SMALL_SHAPE
from tests.helpers.spawn import run_ranks
from tests.helpers.tensors import convert_to_hf
from tests.train.test_loop import LAYOUTS

SAME = ("loss", "grad_norm", "learning_rate", "decoupled_learning_rate", "valid_bits_per_byte")
HALF = ["--train.stop-after-steps", "3"]
VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


def make_expanded_run(folder, trainable, *, tied=False):
    """A run whose checkpoint has six layers, of which 2 and 5 are added."""
    recipe = make_run(folder, num_hidden_layers=4, tie_word_embeddings=tied)
    root = folder / "run" / "megatron"
    expand_blocks(ExpandBlocks(source=root, output=folder / "wide", blocks=2))
    shutil.rmtree(root)
    (folder / "wide").rename(root)
    choose(recipe, trainable)
    return recipe


def choose(recipe, trainable):
    """Train what is named in the first stage, and everything in the second."""
    text = recipe.read_text().replace('trainable = "all"', f"trainable = {trainable}")
    recipe.write_text(text.replace('trainable = "embeddings"', 'trainable = "all"'))


def train_on(world_size, *args):
    return train_stage(*args) if world_size == 1 else run_ranks(train_stage, world_size, *args)[0]


def read_stage(recipe, stage):
    return DistReader(find_checkpoint(recipe.parent / "run" / "checkpoints" / stage))


def list_changed(recipe):
    """Return what the first stage changed: keys, with the layer for those of stacked layers."""
    before, after = DistReader(find_checkpoint(recipe.parent / "run" / "megatron")), read_stage(recipe, "first")
    changed = set()
    for key in before.keys:
        old, new = before.read(key), after.read(key)
        if key.startswith("decoder.layers."):
            rest = key.removeprefix("decoder.layers.")
            changed |= {f"decoder.layers.{at}.{rest}" for at in range(len(old)) if not torch.equal(old[at], new[at])}
        elif not torch.equal(old, new):
            changed.add(key)
    return changed


def list_moments(recipe):
    prefix = "optimizer.state.exp_avg."
    keys = read_stage(recipe, "first").keys
    return {key.removeprefix(prefix) for key in keys if key.startswith(prefix)}


def assert_same(rows, expected):
    for name in SAME:
        assert [row.get(name) for row in rows] == [row.get(name) for row in expected], name


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["untied", "tied"])
def expanded(request, tmp_path_factory):
    """A run on one rank that trained added blocks alone, and its metrics."""
    recipe = make_expanded_run(tmp_path_factory.mktemp("run"), '"expanded_blocks"', tied=request.param)
    return recipe, train_stage(recipe, "first")


def test_added_blocks_alone_learn_and_alone_have_moments(expanded):
    recipe, rows = expanded
    assert rows[-1]["loss"] < rows[1]["loss"]
    changed = list_changed(recipe)
    assert {key.split(".")[2] for key in changed} == {"2", "5"}
    assert len(changed) == 12
    assert list_moments(recipe) == changed


def test_the_next_stage_and_other_programs_read_their_weights(expanded, tmp_path):
    recipe, rows = expanded
    convert_to_hf(recipe.parent / "run" / "checkpoints" / "first", tmp_path / "hf", verify=True)
    following = train_stage(recipe, "second")
    assert following[0]["valid_bits_per_byte"] == pytest.approx(rows[-1]["valid_bits_per_byte"], rel=1e-6)
    assert "optimizer.state.exp_avg.decoder.layers.mlp.linear_fc1.weight" in read_stage(recipe, "second").keys


@pytest.mark.slow
def test_added_blocks_learn_alike_in_every_layout_and_resume_in_another(expanded, tmp_path):
    recipe, expected = expanded
    copied = copy_run(recipe, tmp_path / "run")
    run_ranks(train_stage, 2, copied, "first", *LAYOUTS["tp2-sp"][1], *HALF)
    rows = run_ranks(train_stage, 2, copied, "first", *LAYOUTS["pp2"][1])[0]
    assert get_curve(rows) == pytest.approx(get_curve(expected), rel=1e-5)
    norms = [row["grad_norm"] for row in expected if "grad_norm" in row]
    assert [row["grad_norm"] for row in rows if "grad_norm" in row] == pytest.approx(norms, rel=1e-4)


PATTERNS = '["decoder.layers.5.mlp.*", "decoder.layers.3.input_layernorm.*"]'
RESUMES = {
    "one-rank": (1, '"expanded_blocks"', []),
    "one-rank-bf16-patterns": (1, PATTERNS, ["--train.bf16"]),
    # The first stage of the pipeline owns nothing that learns; the engine saves what it says of the groups.
    "pp2-patterns": (2, PATTERNS, LAYOUTS["pp2"][1]),
    "pp2-patterns-without-distributed-optimizer": (
        2,
        PATTERNS,
        [*LAYOUTS["pp2"][1], "--train.no-use-distributed-optimizer"],
    ),
    "dp2-bf16-without-distributed-optimizer": (
        2,
        '"expanded_blocks"',
        ["--train.bf16", "--train.no-use-distributed-optimizer"],
    ),
    "tp2-bf16": (2, '"expanded_blocks"', [*LAYOUTS["tp2"][1], "--train.bf16"]),
}
QUICK = ("one-rank",)


@pytest.mark.parametrize(
    "case", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RESUMES]
)
def test_a_resumed_run_of_some_layers_equals_an_undisturbed_one(case, tmp_path):
    world_size, trainable, flags = RESUMES[case]
    straight = make_expanded_run(tmp_path / "straight", trainable)
    resumed = copy_run(straight, tmp_path / "resumed")
    expected = train_on(world_size, straight, "first", *flags)
    train_on(world_size, resumed, "first", *flags, *HALF)
    assert_same(train_on(world_size, resumed, "first", *flags), expected)
    if trainable == PATTERNS and "--train.bf16" not in flags:
        norm = "decoder.layers.3.self_attention.linear_qkv.layer_norm_weight"
        matrices = {f"decoder.layers.5.mlp.{name}.weight" for name in ("linear_fc1", "linear_fc2")}
        assert list_changed(resumed) == {norm, *matrices}


def test_blocks_that_nobody_added_are_refused(tmp_path):
    recipe = make_run(tmp_path)
    choose(recipe, '"expanded_blocks"')
    message = r'stages first: trainable = "expanded_blocks": .* has none; add some with tools/reshape_checkpoint.py exp'
    with pytest.raises(ConfigError, match=message):
        train_stage(recipe, "first")


STAGE = {"name": "s", "tokens": 1, "blend": {"xx": 1.0}, "lr": 1.0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"trainable": ("decoder.layers.*.mpl.*",)},
            r"'decoder.layers.\*.mpl.\*' matches no parameter of the model, whose layers are 0 to 1; use .*\*\.mlp\.",
        ),
        ({"trainable": ("embedding.*", "decoder.layers.2.*")}, r"'decoder.layers.2.\*' matches no parameter"),
        ({"trainable": "embeddings", "decoupled_lr": 0.1}, "decoupled_lr 0.1 .*: nothing else learns; set lr alone"),
        ({"trainable": ("embedding.*",), "decoupled_lr": 0.1}, "decoupled_lr 0.1 .*: nothing else learns; set lr"),
        ({"trainable": ("*.mlp.*",), "decoupled_lr": 0.1}, "decoupled_lr 0.1 .*: neither learns; leave it out"),
    ],
)
def test_choices_that_do_not_fit_the_model_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        check_learning(StageSettings(**{**STAGE, **settings}), SMALL_SHAPE, ())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trainable": ()}, "trainable is empty; name what learns"),
        (
            {"trainable": ("embeddings",)},
            "trainable 'embeddings' is neither .*, alone, nor a pattern of param",
        ),
        ({"decoupled_min_lr": 0.1}, "decoupled_min_lr 0.1 has no effect without decoupled_lr; add it"),
        ({"decoupled_lr": 0.1, "min_lr": 0.2}, "decoupled_lr 0.1 and its lowest rate 0.2 must fall"),
        (
            {"decoupled_lr": 0.1, "decoupled_min_lr": 0.01, "lr_decay_style": "constant"},
            "decoupled_min_lr 0.01 has no effect with lr_decay_style constant",
        ),
        (
            {"decoupled_lr": 0.1, "min_lr": 0.05, "lr_decay_style": "infinite", "lr_constant": 0.5},
            "decoupled_lr 0.1 stays at 0.05, in the proportion .* above its lowest rate 0.05",
        ),
    ],
)
def test_settings_without_sense_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        StageSettings(**{**STAGE, **settings})


def _list_names(shape):
    """Return the names of the parameters of this rank that learn, where layers of the upper half are chosen."""
    layout = Layout(pipeline_model_parallel_size=2)
    with start_engine(layout, seed=1):
        model = build_model(shape, padded_vocab_size=128, layout=layout, seq_length=8, bf16=False)
        learning = freeze_rest(model, ("decoder.layers.1.mlp.*", "embedding.*"))
        named = [(name, parameter) for name, parameter in name_parameters(model) if parameter.requires_grad]
        assert learning == sum(parameter.numel() for _, parameter in named)
        return [name for name, _ in named]


def test_a_pipeline_stage_knows_its_layers_and_its_copy_of_a_tied_embedding_by_their_names_in_the_model():
    first, last = run_ranks(_list_names, 2, replace(SMALL_SHAPE, tied=True))
    assert first == [VOCABULARY[0]]
    assert sorted(last) == [*(f"decoder.layers.1.mlp.linear_fc{at}.weight" for at in (1, 2)), VOCABULARY[0]]


def test_recomputed_layers_above_a_frozen_embedding_learn():
    with start_engine(Layout(), seed=1):
        model = build_model(SMALL_SHAPE, padded_vocab_size=128, layout=Layout(), seq_length=8, bf16=False)
        model.config.recompute_granularity, model.config.recompute_method = "full", "uniform"
        model.config.recompute_num_layers = 1
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
        freeze_rest(model, "expanded_blocks", new_blocks=(0,))
        ids_BT = torch.arange(8)[None]
        model(ids_BT, ids_BT, None, labels=ids_BT).sum().backward()
        with_gradient = {name for name, parameter in name_parameters(model) if parameter.grad is not None}
    assert with_gradient == {name for name in with_gradient if name.startswith("decoder.layers.0.")} != set()


DECOUPLED = ["--train.stages.0.decoupled-lr", "4e-3", "--train.stages.0.decoupled-min-lr", "1e-3"]


@pytest.fixture(scope="module")
def decoupled(tmp_path_factory):
    """A run on one rank with a learning rate of the vocabulary matrices, and its metrics."""
    recipe = make_run(tmp_path_factory.mktemp("decoupled"))
    return recipe, train_stage(recipe, "first", *DECOUPLED)


def test_both_learning_rates_follow_the_schedule(decoupled):
    _, rows = decoupled
    shares = [0.5, 1.0, *(0.5 * (1 + math.cos(math.pi * step / 4)) for step in (1, 2, 3, 4))]

    def list_rates(peak, last):
        return [peak / 2, *(last + (peak - last) * share for share in shares[1:])]

    assert [row["learning_rate"] for row in rows[1:]] == pytest.approx(list_rates(1e-2, 1e-3))
    assert [row["decoupled_learning_rate"] for row in rows[1:]] == pytest.approx(list_rates(4e-3, 1e-3))


def test_the_vocabulary_learns_with_its_own_rate_and_the_body_with_the_other(tmp_path):
    recipe = make_run(tmp_path)
    rates = ["--train.stages.0.lr", "1e-12", "--train.stages.0.min-lr", "0", "--train.weight-decay", "0"]
    train_stage(recipe, "first", *rates, *DECOUPLED, "--train.stop-after-steps", "2")
    before, after = DistReader(find_checkpoint(tmp_path / "run" / "megatron")), read_stage(recipe, "first")
    moved = {key: (after.read(key) - before.read(key)).abs().max().item() for key in before.keys}
    # Adam's first steps have about the length of the learning rate: 2e-3 and 4e-3 here.
    assert {key for key, distance in moved.items() if distance > 1e-3} == set(VOCABULARY)
    assert max(distance for key, distance in moved.items() if key not in VOCABULARY) < 1e-6


@pytest.mark.slow
def test_decoupled_rates_resume_exactly_and_in_other_layouts(decoupled, tmp_path):
    recipe, expected = decoupled
    same, other = copy_run(recipe, tmp_path / "same"), copy_run(recipe, tmp_path / "other")
    train_stage(same, "first", *DECOUPLED, *HALF)
    assert_same(train_stage(same, "first", *DECOUPLED), expected)
    run_ranks(train_stage, 2, other, "first", *LAYOUTS["pp2"][1], *DECOUPLED, *HALF)
    rows = run_ranks(train_stage, 2, other, "first", *LAYOUTS["tp2"][1], *DECOUPLED)[0]
    assert get_curve(rows) == pytest.approx(get_curve(expected), rel=1e-5)
    assert [row.get("decoupled_learning_rate") for row in rows] == pytest.approx(
        [row.get("decoupled_learning_rate") for row in expected]
    )


def test_a_decoupled_rate_may_change_under_a_running_stage_but_not_come_or_go(tmp_path):
    recipe = make_run(tmp_path)
    train_stage(recipe, "first", *DECOUPLED, *HALF)
    with pytest.raises(CheckpointError, match="saved with decoupled_lr True, now it is False; restore the setting"):
        train_stage(recipe, "first")
    changed = ["--train.stages.0.decoupled-lr", "8e-3", "--train.stages.0.decoupled-min-lr", "2e-3"]
    rows = train_stage(recipe, "first", *changed)
    assert rows[4]["decoupled_learning_rate"] == pytest.approx(2e-3 + 6e-3 * 0.5)
    assert rows[4]["learning_rate"] == pytest.approx(1e-3 + 9e-3 * 0.5)


def test_a_run_of_before_decoupled_rates_is_continued(tmp_path):
    recipe = make_run(tmp_path)
    train_stage(recipe, "first", *HALF)
    path = find_checkpoint(tmp_path / "run" / "checkpoints" / "first") / "training.json"
    saved = json.loads(path.read_text())
    del saved["decoupled_lr"]
    path.write_text(json.dumps(saved))
    path.with_name("files.json").unlink()  # nor did it say what its files are
    with pytest.raises(CheckpointError, match="saved with decoupled_lr False, now it is True; restore the setting"):
        train_stage(recipe, "first", *DECOUPLED)
    assert train_stage(recipe, "first")[-1]["step"] == 6


def test_read_description_keeps_added_blocks_over_stages(expanded):
    recipe, _ = expanded
    assert read_description(read_stage(recipe, "first").folder).new_blocks == (2, 5)
