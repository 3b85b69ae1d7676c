"""z-loss: learned beside the loss and reported nowhere in it, the same under every layout, and part of what decides."""

import importlib.util

import numpy as np
import pytest
import torch
from megatron.core import parallel_state
from torch.nn.functional import cross_entropy

from megatron_adapt.checkpoint.root import find_checkpoint, read_description
from megatron_adapt.checkpoint.weights import load_weights
from megatron_adapt.config import Layout, StageSettings, TrainSettings
from megatron_adapt.engine.llama import build_chunks
from megatron_adapt.engine.parallel import make_groups, start_engine
from megatron_adapt.errors import CheckpointError
from megatron_adapt.run_folder import describe_training, find_change
from megatron_adapt.train.optimizer import build_trainer
from megatron_adapt.train.step import measure_bits_per_byte, train_step
from tests.helpers.runs import copy_run, get_curve, make_run, train_stage
from tests.helpers.spawn import run_ranks

T, VOCAB = 16, 300
STAGE = StageSettings(name="one", tokens=1, blend={"en": 1.0}, lr=1e-2, lr_warmup_fraction=0.0)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """What a run of a tiny model starts from."""
    return make_run(tmp_path_factory.mktemp("z_loss"))


@pytest.fixture(scope="module")
def weights(recipe):
    return find_checkpoint(recipe.parent / "run" / "megatron")


def make_windows():
    return np.random.default_rng(0).integers(2, VOCAB, (4, T + 1))


def make_trainer(weights, layout, z_loss):
    description = read_description(weights)
    chunks = build_chunks(
        description.shape, padded_vocab_size=description.padded_vocab_size, layout=layout, seq_length=T, bf16=False,
        z_loss=z_loss,
    )  # fmt: skip
    trainer = build_trainer(chunks, TrainSettings(bf16=False, clip_grad=1e6), STAGE, 20)
    load_weights(trainer.bare_models, weights)
    trainer.optimizer.reload_model_params()
    return trainer


def run_steps(weights, layout, z_loss, num_steps=2):
    """Return the bits per byte before the first step, and loss and gradient norm of every step; needs an engine."""
    windows, trainer = make_windows(), make_trainer(weights, layout, z_loss)
    valid = measure_bits_per_byte(trainer.models, windows[:3], torch.ones(384), 2)
    reports = [train_step(trainer, windows, 2) for _ in range(num_steps)]
    return [valid, *(number for report in reports for number in (report.loss, report.grad_norm))]


def compute_by_hand(model):
    """Return the mean cross entropy and the mean square of the logarithm of the sum of exponentials."""
    ids = torch.tensor(make_windows())
    logits = model(ids[:, :-1], torch.arange(T).expand(4, T), None)[..., :VOCAB].flatten(0, 1)
    return cross_entropy(logits, ids[:, 1:].flatten()), (logits.logsumexp(1) ** 2).mean()


def test_a_step_learns_from_the_sum_and_reports_the_loss_alone(weights):
    with start_engine(Layout(), seed=1):
        trainer = make_trainer(weights, Layout(), 0.05)
        loss, square = compute_by_hand(trainer.bare_models[0])
        gradients = torch.autograd.grad(loss + 0.05 * square, list(trainer.bare_models[0].parameters()))
        report = train_step(trainer, make_windows(), 2)
        learned = [parameter.main_grad for parameter in trainer.bare_models[0].parameters()]
    assert report.loss == pytest.approx(loss.item(), rel=1e-6)
    for gradient, expected in zip(learned, gradients, strict=True):
        assert (gradient - expected).norm() <= 1e-5 * expected.norm()


def test_some_steps_bring_the_sum_of_exponentials_nearer_to_1(weights):
    squares = {}
    with start_engine(Layout(), seed=1):
        for z_loss in (0.0, 0.1):
            trainer = make_trainer(weights, Layout(), z_loss)
            before = compute_by_hand(trainer.bare_models[0])[1].item()
            for _ in range(10):
                train_step(trainer, make_windows(), 2)
            squares[z_loss] = compute_by_hand(trainer.bare_models[0])[1].item()
    assert squares[0.1] < 0.9 * before < before < squares[0.0]


LAYOUTS = [
    Layout(tensor_model_parallel_size=2),
    Layout(tensor_model_parallel_size=2, sequence_parallel=True),
    Layout(pipeline_model_parallel_size=2),
    Layout(),
]
if importlib.util.find_spec("triton"):
    LAYOUTS.append(Layout(tensor_model_parallel_size=2, kernels="triton"))


def _run_layouts(weights):
    """Go through the layouts in one process group; a second one in the same process would hang."""
    found = []
    with start_engine(Layout(), seed=1):
        for layout in LAYOUTS:
            parallel_state.destroy_model_parallel()
            make_groups(layout)
            found.append(run_steps(weights, layout, 0.05))
    return found


@pytest.mark.slow
def test_every_layout_learns_alike_and_validation_does_not_see_it(weights):
    with start_engine(Layout(), seed=1):
        alone, without = (run_steps(weights, Layout(), z_loss) for z_loss in (0.05, 0.0))
    # Bits per byte and loss before any learning; then what it changes.
    assert alone[:2] == without[:2]
    assert alone[2] != pytest.approx(without[2], rel=1e-3)
    for found in run_ranks(_run_layouts, 2, weights):
        for layout, numbers in zip(LAYOUTS, found, strict=True):
            assert numbers == pytest.approx(alone, rel=1e-5), layout


def test_a_run_resumes_exactly_and_only_with_the_same_weight(recipe, tmp_path):
    straight, broken = (copy_run(recipe, tmp_path / name) for name in ("straight", "broken"))
    flags = ("--train.z-loss", "0.01")
    expected = get_curve(train_stage(straight, "first", *flags))
    assert len(expected) == 6
    train_stage(broken, "first", *flags, "--train.stop-after-steps", "3")
    with pytest.raises(CheckpointError, match=r"saved with z_loss 0\.01, now it is 0\.0; restore the setting"):
        train_stage(broken, "first")
    assert get_curve(train_stage(broken, "first", *flags)) == expected


def test_a_stage_of_before_the_setting_is_one_without_it():
    assert "z_loss" not in describe_training(STAGE, TrainSettings())["train"]
    assert describe_training(STAGE, TrainSettings(z_loss=1e-4))["train"]["z_loss"] == 1e-4
    assert find_change({}, {"z_loss": 0.0}) is None
    assert find_change({}, {"z_loss": 1e-4}) == ("z_loss", 0.0, 1e-4)
