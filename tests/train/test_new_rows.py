"""``trainable = "new_rows"``: the rows of new tokens learn, and nothing else changes by a bit."""

import json

import numpy as np
import pytest
import torch
from megatron.core import parallel_state
from torch.nn.functional import cross_entropy

from megatron_adapt.checkpoint.dist import DistReader
from megatron_adapt.checkpoint.root import find_checkpoint, read_description
from megatron_adapt.checkpoint.weights import load_weights
from megatron_adapt.config import Layout, StageSettings, TrainSettings
from megatron_adapt.engine.llama import build_model
from megatron_adapt.engine.parallel import make_groups, start_engine
from megatron_adapt.engine.trainable import freeze_rest
from megatron_adapt.errors import CheckpointError, ConfigError
from megatron_adapt.train.optimizer import build_trainer
from megatron_adapt.train.step import train_step
from tests.helpers.runs import copy_run, train_stage
from tests.helpers.spawn import run_ranks
from tests.helpers.weights import make_weights
from tests.train.extended import NEW_IDS, make_extended_run

T, NUM_STEPS, ROWS, PADDED = 16, 3, 300, 312
SCATTERED = np.array([2, 7, 150, 155, 156, 157, 299])
"New ids on both sides of the cut of two tensor-parallel ranks, which lies before row 156."
STAGE = StageSettings(name="one", tokens=1, blend={"en": 1.0}, trainable="new_rows", lr=1e-2, lr_warmup_fraction=0.0)
MATRICES = ("embedding.word_embeddings.weight", "output_layer.weight")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Megatron checkpoints of a tiny model, by whether its head is tied."""
    return make_weights(
        tmp_path_factory.mktemp("weights"), vocab_pad_multiple=PADDED,
        hidden_size=20, num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip


def make_windows():
    windows = np.random.default_rng(0).integers(0, ROWS, (4, T + 1))
    windows[0, :14:2] = SCATTERED  # every new row is an input
    return windows


def make_trainer(weights, layout, train, stage=STAGE):
    description = read_description(weights)
    model = build_model(
        description.shape, padded_vocab_size=PADDED, layout=layout, seq_length=T, bf16=train.bf16
    )  # fmt: skip
    freeze_rest(model, stage.trainable)
    trainer = build_trainer([model], train, stage, NUM_STEPS, SCATTERED)
    load_weights(trainer.bare_models, weights)
    trainer.optimizer.reload_model_params()
    return trainer


def run_steps(weights, layout, train, stage=STAGE):
    """Return losses and norms of some steps, the ids whose rows changed by a bit per matrix, and what else changed."""
    trainer = make_trainer(weights, layout, train, stage)
    before = {name: value.detach().clone() for name, value in trainer.bare_models[0].named_parameters()}
    reports = [train_step(trainer, make_windows(), 2) for _ in range(NUM_STEPS)]
    rows, others = {}, []
    for name, value in trainer.bare_models[0].named_parameters():
        kind = torch.int16 if train.bf16 else torch.int32
        changed = value.detach().view(kind) != before[name].view(kind)
        if name in MATRICES:
            first = parallel_state.get_tensor_model_parallel_rank() * len(value)
            rows[name] = {int(row) + first for row in changed.any(-1).nonzero()}
        elif changed.any():
            others.append(name)
    numbers = [number for report in reports for number in (report.loss, report.grad_norm)]
    return numbers, rows, others, _find_cut(trainer)


def _find_cut(trainer):
    """Return where in a row the distributed optimizer cuts the buffer between two ranks."""
    buffer = trainer.models[0].buffers[0] if trainer.models[0].buffers else None
    return None if buffer is None else buffer.numel // 2 % 20


CASES = {
    "tp2": (Layout(tensor_model_parallel_size=2), {}),
    "tp2-sp": (Layout(tensor_model_parallel_size=2, sequence_parallel=True), {}),
    "pp2": (Layout(pipeline_model_parallel_size=2), {}),
    "dp2": (Layout(), {}),
    "dp2-without-distributed-optimizer": (Layout(), {"use_distributed_optimizer": False}),
    "dp2-bf16": (Layout(), {"bf16": True}),
    "pp2-bf16-without-distributed-optimizer": (
        Layout(pipeline_model_parallel_size=2),
        {"bf16": True, "use_distributed_optimizer": False},
    ),
}


def _run_cases(weights):
    """Go through the layouts in one process group; a second one in the same process would hang."""
    found = {}
    with start_engine(Layout(tensor_model_parallel_size=2), seed=1):
        for name, (layout, settings) in CASES.items():
            # Once a layout: the threads of the groups before live on.
            parallel_state.destroy_model_parallel()
            make_groups(layout)
            for tied, folder in weights.items():
                found[tied, name] = run_steps(folder, layout, TrainSettings(**{"bf16": False, **settings}))
    return found


def test_new_rows_alone_change_under_every_layout_and_the_losses_are_the_same(weights):
    assert TrainSettings().weight_decay == 0.1
    expected = {}
    with start_engine(Layout(), seed=1):
        for tied, folder in weights.items():
            numbers, rows, others, _ = run_steps(folder, Layout(), TrainSettings(bf16=False))
            assert others == []
            assert rows == {matrix: set(SCATTERED.tolist()) for matrix in MATRICES[: 2 - tied]}
            assert numbers[-2] < numbers[0]
            expected[tied] = numbers
        # Without the mask the same steps move old rows and padding.
        everything = StageSettings(**{**vars(STAGE), "trainable": "embeddings"})
        assert len(run_steps(weights[False], Layout(), TrainSettings(bf16=False), everything)[1][MATRICES[0]]) == PADDED
    ranks = run_ranks(_run_cases, 2, weights)
    for tied, name in ranks[0]:
        found = [rank[tied, name] for rank in ranks]
        matrices = {}
        for numbers, rows, others, _ in found:
            assert others == [], name
            assert numbers == pytest.approx(expected[tied], rel=4e-2 if "bf16" in name else 1e-5), name
            for matrix, changed in rows.items():
                matrices.setdefault(matrix, set()).update(changed)
        # The last stage of a pipeline holds a copy of a tied matrix.
        names = MATRICES if not tied or "pp2" in name else MATRICES[:1]
        assert matrices == {matrix: set(SCATTERED.tolist()) for matrix in names}, name
        if name == "dp2":
            assert found[0][3], "the distributed optimizer cuts no row: proves less"


def test_the_norm_that_is_clipped_is_that_of_the_new_rows(weights):
    with start_engine(Layout(), seed=1):
        trainer = make_trainer(weights[False], Layout(), TrainSettings(bf16=False))
        windows, model = torch.tensor(make_windows()), trainer.bare_models[0]
        logits = model(windows[:, :-1], torch.arange(T).expand(4, T), None)[..., :ROWS]
        mean = cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(mean, learning)
        report = train_step(trainer, make_windows(), 2)
    norm = torch.stack([gradient[SCATTERED].norm() for gradient in gradients]).norm().item()
    assert report.grad_norm == pytest.approx(norm, rel=1e-5)
    assert norm < 0.9 * torch.stack([gradient.norm() for gradient in gradients]).norm().item()


# ---------------------------------------------------------------- a stage of a recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that stopped in the middle of a stage of new rows, in bf16."""
    recipe = make_extended_run(tmp_path_factory.mktemp("run"), stage='trainable = "new_rows"')
    train_stage(recipe, "first", "--train.bf16", "--train.stop-after-steps", "3")
    return recipe


def test_stage_resumes_exactly_and_its_checkpoint_holds_the_old_rows_masters_and_no_moments(run, tmp_path):
    straight, resumed = (
        copy_run(run, tmp_path / "straight", trained=True),
        copy_run(run, tmp_path / "resumed", trained=True),
    )
    root = straight.parent / "run"
    (root / "checkpoints").rename(root / "put_aside")
    # A checkpoint of before a setting existed says nothing of it.
    for path in (resumed.parent / "run" / "checkpoints").rglob("training.json"):
        training = json.loads(path.read_text())
        path.write_text(json.dumps({key: value for key, value in training.items() if key != "objective"}))
        path.with_name("files.json").unlink()
    expected, rows = (train_stage(recipe, "first", "--train.bf16") for recipe in (straight, resumed))
    for name in ("loss", "grad_norm", "valid_bits_per_byte", "tokens"):
        assert [row.get(name) for row in rows] == [row.get(name) for row in expected], name
    assert rows[-1]["valid_bits_per_byte"]["xx"] < rows[0]["valid_bits_per_byte"]["xx"]
    before, after = (DistReader(find_checkpoint(root / name)) for name in ("megatron", "checkpoints/first"))
    occurring = NEW_IDS[1:]  # the first is a part of the others and of no text
    new = torch.zeros(384, dtype=torch.bool)
    new[NEW_IDS] = True
    for key in before.keys:
        stored, trained = before.read(key), after.read(key)
        if key not in MATRICES:
            assert torch.equal(trained, stored.bfloat16()), key
            continue
        assert torch.equal(trained[~new], stored[~new].bfloat16()), key
        assert (trained[occurring] != stored[occurring].bfloat16()).any(-1).all(), key
        master = after.read(f"optimizer.state.param.{key}")
        assert master.dtype == torch.float32
        assert torch.equal(master[~new], stored[~new].bfloat16().float()), key
        for moment in ("exp_avg", "exp_avg_sq"):
            state = after.read(f"optimizer.state.{moment}.{key}")
            assert not state[~new].any(), key
            assert state[occurring].any(-1).all(), key


def test_other_new_rows_are_refused_under_a_running_stage_and_as_its_successor(run, tmp_path):
    """A moment of a row that is no longer new would move it."""
    recipe = copy_run(run, tmp_path / "run", trained=True)
    for path in (recipe.parent / "run").rglob("added_pieces.json"):
        content = json.loads(path.read_text())
        content["moved"][str(NEW_IDS[0])] = content["pieces"].pop(str(NEW_IDS[0]))[0]
        path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"saved with new_rows \w{16}, now it is \w{16}; restore"):
        train_stage(recipe, "first", "--train.bf16")
    initial = recipe.parent / "run" / "megatron"
    move_checkpoint(recipe.parent / "run" / "checkpoints" / "first", initial)
    recipe.write_text(recipe.read_text().replace('"new_rows"', '"new_rows"\ncarry_optimizer = true'))
    with pytest.raises(
        CheckpointError, match=r"carry_optimizer: .* was trained with new_rows \w{16}, now it is \w{16}"
    ):
        train_stage(recipe, "first", "--train.bf16")


def move_checkpoint(trained, initial):
    """Put the last checkpoint of a stage where its run starts."""
    initial.rename(initial.with_name("put_aside"))
    trained.rename(initial)


def test_a_tokenizer_without_new_tokens_is_refused(run, tmp_path):
    recipe = copy_run(run, tmp_path / "run", trained=True)
    path = recipe.parent / "run" / "megatron" / "hf" / "added_pieces.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "pieces": {}, "moved": {str(new): 5 for new in NEW_IDS}}))
    message = r'stages first: trainable = "new_rows": the tokenizer .*hf has no new tokens \(added_pieces.json\); train'
    with pytest.raises(ConfigError, match=message):
        train_stage(recipe, "first")
    path.unlink()
    message = r'trainable = "new_rows": .*hf has no added_pieces.json, so no token is known to be new; copy it from'
    with pytest.raises(ConfigError, match=message):
        train_stage(recipe, "first")
