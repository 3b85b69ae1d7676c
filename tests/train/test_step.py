"""One step: which targets bear loss, where attention starts anew, and that neither depends on the layout."""

import numpy as np
import pytest
import torch
from megatron.core import parallel_state
from torch.nn.functional import cross_entropy

from megatron_adapt.checkpoint.root import find_checkpoint, read_description
from megatron_adapt.checkpoint.weights import load_weights
from megatron_adapt.config import Layout, StageSettings, TrainSettings
from megatron_adapt.engine.llama import build_model
from megatron_adapt.engine.parallel import make_groups, start_engine
from megatron_adapt.train.documents import mask_eod
from megatron_adapt.train.optimizer import build_trainer
from megatron_adapt.train.step import _take_data_parallel_part, measure_bits_per_byte, train_step
from tests.helpers.runs import make_run
from tests.helpers.spawn import run_ranks

EOD, T, NUM_STEPS = 1, 16, 2
STAGE = StageSettings(name="one", tokens=1, blend={"en": 1.0}, lr=1e-2, lr_warmup_fraction=0.0)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Megatron checkpoint of a tiny model."""
    folder = tmp_path_factory.mktemp("weights")
    make_run(folder)
    return find_checkpoint(folder / "run" / "megatron")


def make_windows():
    """Windows [4, T + 1] with documents of any length, a document of EOD alone among them."""
    draw = np.random.default_rng(0)
    windows = draw.integers(2, 300, (4, T + 1))
    windows[draw.random(windows.shape) < 0.2] = EOD
    windows[0, 4:6] = EOD
    return windows


def make_trainer(weights, layout):
    description = read_description(weights)
    model = build_model(
        description.shape, padded_vocab_size=description.padded_vocab_size, layout=layout, seq_length=T, bf16=False
    )
    trainer = build_trainer([model], TrainSettings(bf16=False, clip_grad=1e6), STAGE, NUM_STEPS)
    load_weights(trainer.bare_models, weights)
    trainer.optimizer.reload_model_params()
    return trainer


def run_steps(weights, *, layout=Layout(), micro_batch_size=2, reset_at=EOD):  # noqa: B008
    """Return the bits per byte before the first step, and loss and gradient norm of every step; needs an engine."""
    windows, trainer = make_windows(), make_trainer(weights, layout)
    # Three windows fill no whole pass, so one is padding.
    valid = measure_bits_per_byte(trainer.models, windows[:3], torch.ones(384), micro_batch_size, reset_at=reset_at)
    reports = [
        train_step(trainer, windows, micro_batch_size, loss_mask=mask_eod(windows, EOD), reset_at=reset_at)
        for _ in range(NUM_STEPS)
    ]
    return [valid, *(number for report in reports for number in (report.loss, report.grad_norm))]


def sum_by_hand(model, windows, loss_mask):
    """Sum the losses of unmasked targets, every document in a forward pass of its own."""
    total = torch.zeros(())
    for window, mask in zip(windows, loss_mask, strict=True):
        inputs, targets = torch.tensor(window[:-1]), torch.tensor(window[1:])
        ends = [place + 1 for place in range(T - 1) if window[place] == EOD]
        for start, stop in zip([0, *ends], [*ends, T], strict=True):
            positions = torch.arange(stop - start)[None]
            logits = model(inputs[None, start:stop], positions, None)[0, :, :300]
            losses = cross_entropy(logits, targets[start:stop], reduction="none")
            total = total + losses[torch.tensor(mask[start:stop])].sum()
    return total


def test_step_is_the_mean_over_unmasked_targets_of_documents_apart(weights):
    windows = make_windows()
    loss_mask = mask_eod(windows, EOD)
    loss_mask[1] = False  # a window that bears no loss at all, as a mask of another origin may ask for
    with start_engine(Layout(), seed=1):
        trainer = make_trainer(weights, Layout())
        mean = sum_by_hand(trainer.bare_models[0], windows, loss_mask) / loss_mask.sum()
        gradients = torch.autograd.grad(mean, list(trainer.bare_models[0].parameters()))
        report = train_step(trainer, windows, 1, loss_mask=loss_mask, reset_at=EOD)
    assert report.loss == pytest.approx(mean.item(), rel=1e-5)
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
    assert report.grad_norm == pytest.approx(norm, rel=1e-5)


def test_step_without_settings_counts_every_target_and_attends_to_the_whole_window(weights):
    windows = make_windows()
    with start_engine(Layout(), seed=1):
        trainer = make_trainer(weights, Layout())
        logits = trainer.bare_models[0](torch.tensor(windows[:, :-1]), torch.arange(T).expand(4, T), None)[..., :300]
        expected = cross_entropy(logits.flatten(0, 1), torch.tensor(windows[:, 1:]).flatten()).item()
        report = train_step(trainer, windows, 2)
    assert report.loss == pytest.approx(expected, rel=1e-5)


LAYOUTS = (
    Layout(tensor_model_parallel_size=2),
    Layout(tensor_model_parallel_size=2, sequence_parallel=True),
    Layout(pipeline_model_parallel_size=2),
    Layout(),
)


def _run_layouts(weights):
    """Go through the layouts in one process group; a second one in the same process would hang."""
    found = []
    with start_engine(LAYOUTS[0], seed=1):
        for layout in LAYOUTS:
            parallel_state.destroy_model_parallel()
            make_groups(layout)
            found.append(run_steps(weights, layout=layout))
    return found


def test_documents_and_masks_give_the_same_numbers_under_every_layout(weights):
    with start_engine(Layout(), seed=1):
        alone = run_steps(weights)
        by_window = run_steps(weights, micro_batch_size=1)
        spanning = run_steps(weights, reset_at=None)
    assert by_window == pytest.approx(alone, rel=1e-5)
    # Bits per byte and loss before any learning: attention that spans documents is something else.
    assert spanning[0] != pytest.approx(alone[0], rel=1e-3)
    assert spanning[1] != pytest.approx(alone[1], rel=1e-3)
    for found in run_ranks(_run_layouts, 2, weights):
        for layout, numbers in zip(LAYOUTS, found, strict=True):
            assert numbers == pytest.approx(alone, rel=1e-5), layout


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_take_the_same_global_batch_apart_in_the_same_order(size, monkeypatch):
    """The m-th micro-batches of all ranks, by rank, are the next windows of the batch, whatever the number of ranks."""
    windows = np.arange(16 * 3).reshape(16, 3)
    parts = []
    for rank in range(size):
        monkeypatch.setattr(parallel_state, "get_data_parallel_world_size", lambda: size)
        monkeypatch.setattr(parallel_state, "get_data_parallel_rank", lambda rank=rank: rank)
        parts.append(_take_data_parallel_part(windows, 2))
    assert {part.shape for part in parts} == {(16 // size // 2, 2, 3)}
    together = np.concatenate([part[turn] for turn in range(16 // size // 2) for part in parts])
    np.testing.assert_array_equal(together, windows)
