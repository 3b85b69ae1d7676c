"""Every layout gives the same losses and resumes exactly, whatever learns, with a tied head and without.

The first proof takes every layout with one choice of what learns, tied heads among them; the others take all choices,
over 20 steps, and resume with an untied head.
"""

from dataclasses import replace
from itertools import cycle, product
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core import parallel_state

from megatron_adapt.checkpoint.root import read_description
from megatron_adapt.checkpoint.weights import load_weights
from megatron_adapt.config import StageSettings, TrainSettings
from megatron_adapt.data.plan import BlendPosition, make_plan
from megatron_adapt.engine.llama import build_chunks
from megatron_adapt.engine.parallel import make_groups, start_engine
from megatron_adapt.engine.trainable import freeze_rest
from megatron_adapt.train.optimizer import build_trainer
from megatron_adapt.train.state import load_state, save_state
from megatron_adapt.train.step import measure_bits_per_byte, train_step
from tests.helpers.spawn import run_ranks
from tests.helpers.weights import make_weights

T, ROWS, PADDED = 16, 300, 312
NEW_IDS = np.array([2, 7, 150, 155, 156, 157, 299])
"On both sides of the cut of two tensor-parallel ranks, which lies before row 156."
TRAINABLE = ("all", "embeddings", "new_rows")
CHOICES = list(product(TRAINABLE, (False, True)))
UNTIED = [(trainable, False) for trainable in TRAINABLE]
LR = 3e-3
"At 1e-2 rounding grows: micro-batches of 1 and 2 on one rank then differ by 1e-4 after 20 steps, here by 1e-6."
PLAN = make_plan({"en": 1.0}, 64, {"en": 999}, seq_length=T, global_batch_size=8, seed=1)

TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 3000}
LAYOUTS = {
    "tp2": TP2,
    "pp2": PP2,
    "tp2-sp": {**TP2, "sequence_parallel": True},
    "pp2-vpp2": {**PP2, "virtual_pipeline_model_parallel_size": 2},
    "cp2": {"context_parallel_size": 2},
    "dp2-overlap": OVERLAP,
    "pp2-uneven": {**PP2, "num_layers_in_first_pipeline_stage": 1},
    "tp2-recompute-full": {**TP2, "recompute_granularity": "full", "recompute_num_layers": 2},
    "pp2-recompute-mlp": {**PP2, "recompute_granularity": "selective", "recompute_modules": ("mlp", "core_attn")},
}
LAYOUTS_OF_FOUR = {
    "tp2-pp2": {**TP2, **PP2},
    "pp2-vpp2-dp2-overlap": {**PP2, **OVERLAP, "virtual_pipeline_model_parallel_size": 2},
    "tp2-cp2-sp": {**TP2, "context_parallel_size": 2, "sequence_parallel": True},
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Megatron checkpoints of a model of four layers, by whether its head is tied."""
    return make_weights(
        tmp_path_factory.mktemp("weights"), vocab_pad_multiple=PADDED, num_hidden_layers=4, initializer_range=0.05
    )  # fmt: skip


def make_windows(step):
    """Windows [8, T + 1] of a step, in which every new id is read; two batches take turns and are learned by heart."""
    windows = np.random.default_rng(step % 2).integers(0, ROWS, (8, T + 1))
    windows[0, : 2 * len(NEW_IDS) : 2] = NEW_IDS
    return windows


def make_trainer(iteration, train, trainable, num_steps):
    description = read_description(iteration)
    chunks = build_chunks(
        description.shape, padded_vocab_size=PADDED, layout=train, seq_length=T, bf16=train.bf16
    )  # fmt: skip
    for chunk in chunks:
        freeze_rest(chunk, trainable)
    stage = StageSettings(name="one", tokens=1, blend={"en": 1.0}, trainable=trainable, lr=LR)
    trainer = build_trainer(chunks, train, stage, num_steps, NEW_IDS)
    load_weights(trainer.bare_models, iteration)
    trainer.optimizer.reload_model_params()
    return trainer


def run_steps(trainer, first, stop):
    """Return loss and gradient norm of every step after ``first``, and bits per byte of some windows at the end."""
    numbers = []
    for step in range(first + 1, stop + 1):
        report = train_step(trainer, make_windows(step), 2)
        numbers += [report.loss, report.grad_norm]
    with trainer.hold_weights():
        # Three windows fill no whole pass of any layout.
        return [*numbers, measure_bits_per_byte(trainer.models, make_windows(99)[:3], torch.ones(PADDED), 2)]


def list_changes(trainer, before):
    """Name the parameters of this rank that changed where they must not: old rows, or a frozen body."""
    changed = []
    for at, model in enumerate(trainer.bare_models):
        for name, value in model.named_parameters():
            differs = value.detach() != before[at][name]
            if "word_embeddings" in name or "output_layer" in name:
                local = NEW_IDS - parallel_state.get_tensor_model_parallel_rank() * len(value)
                differs[local[(local >= 0) & (local < len(value))]] = False
            changed += [name] if differs.any() else []
    return changed


def check_resume(iteration, train, trainable, folder):
    """Save in the middle, go on, and go on anew from what was saved; return both sequences of numbers."""
    description = replace(read_description(iteration), step=2, dtype="bfloat16" if train.bf16 else "float32")
    trainer = make_trainer(iteration, train, trainable, num_steps=4)
    run_steps(trainer, 0, 2)
    with trainer.hold_weights():
        save_state(folder, trainer, description, {}, BlendPosition(PLAN, (16,), {"en": "data"}))
    straight = run_steps(trainer, 2, 4)
    resumed = make_trainer(iteration, train, trainable, num_steps=4)
    assert load_state(folder, resumed, {}) == 2
    return straight, run_steps(resumed, 2, 4)


def run_layouts(weights, layouts, choices, num_steps, folder, resumed):
    """Go through layouts in one process group; return numbers, forbidden changes and both halves of a resume.

    ``resumed`` are the choices for which a run is saved and resumed.
    """
    found = {}
    with start_engine(TrainSettings(**next(iter(layouts.values()))), seed=1):
        for (name, settings), choices_of_layout in choices(layouts):
            train = TrainSettings(bf16=False, **settings)
            # Once a layout: the threads of the groups before live on.
            parallel_state.destroy_model_parallel()
            make_groups(train)
            for trainable, tied in choices_of_layout:
                trainer = make_trainer(weights[tied], train, trainable, num_steps)
                before = [
                    {key: value.detach().clone() for key, value in model.named_parameters()}
                    for model in trainer.bare_models
                ]
                numbers = run_steps(trainer, 0, num_steps)
                changes = list_changes(trainer, before) if trainable == "new_rows" else []
                root = Path(folder) / f"{name}-{trainable}-{tied}"
                in_bf16, resume = replace(train, bf16=trainable == "all"), ([], [])
                if (trainable, tied) in resumed:
                    resume = check_resume(weights[tied], in_bf16, trainable, root)
                found[name, trainable, tied] = numbers, changes, resume
    return found


def take_turns(layouts):
    """Give every layout one choice of what learns."""
    return zip(layouts.items(), ([choice] for choice in cycle(CHOICES)), strict=False)


def take_all(layouts):
    """Give every layout every choice of what learns."""
    return [(layout, CHOICES) for layout in layouts.items()]


def check_layouts(weights, layouts, world_size, choices, num_steps, folder, resumed):
    with start_engine(TrainSettings(), seed=1):
        expected = {
            (trainable, tied): run_steps(
                make_trainer(weights[tied], TrainSettings(bf16=False), trainable, num_steps), 0, num_steps
            )
            for trainable, tied in CHOICES
        }
    ranks = run_ranks(run_layouts, world_size, weights, layouts, choices, num_steps, folder, resumed)
    seen = set()
    for found in ranks:
        for (name, trainable, tied), (numbers, changes, (straight, again)) in found.items():
            case = f"{name}, {trainable}, {'tied' if tied else 'untied'}"
            assert numbers[0::2] == pytest.approx(expected[trainable, tied][0::2], rel=1e-5), case
            # Gradients differ more than losses once the weights do: only those of the first step have the same ones.
            assert numbers[1] == pytest.approx(expected[trainable, tied][1], rel=1e-5), case
            assert numbers[3::2] == pytest.approx(expected[trainable, tied][3::2], rel=1e-3), case
            assert changes == [], case
            assert again == straight, case
            seen.add(name)
    assert seen == set(layouts)
    for numbers in expected.values():
        assert numbers[4] < numbers[0], "nothing is learned: proves less"


@pytest.mark.slow
def test_every_layout_of_two_ranks_gives_the_same_losses_and_resumes_exactly(weights, tmp_path):
    check_layouts(weights, LAYOUTS, 2, take_turns, 4, tmp_path, CHOICES)


def continue_elsewhere(iteration, folder):
    """Save under a virtual pipeline; return what comes after under it, and under other layouts that load it."""
    description, found = replace(read_description(iteration), step=2, dtype="float32"), {}
    with start_engine(TrainSettings(**LAYOUTS["pp2-vpp2"]), seed=1):
        for name in ("pp2-vpp2", "tp2-sp", "cp2", "dp2-overlap", "pp2-uneven"):
            train = TrainSettings(bf16=False, **LAYOUTS[name])
            parallel_state.destroy_model_parallel()
            make_groups(train)
            trainer = make_trainer(iteration, train, "all", num_steps=4)
            if not found:
                run_steps(trainer, 0, 2)
                save_state(folder, trainer, description, {}, BlendPosition(PLAN, (16,), {"en": "data"}))
            else:
                assert load_state(folder, trainer, {}) == 2
            found[name] = run_steps(trainer, 2, 4)
    return found


def test_what_a_virtual_pipeline_saved_goes_on_in_every_other_layout(weights, tmp_path):
    found = run_ranks(continue_elsewhere, 2, weights[False], tmp_path)[0]
    straight = found.pop("pp2-vpp2")
    for name, resumed in found.items():
        assert resumed[0::2] == pytest.approx(straight[0::2], rel=1e-6), name


@pytest.mark.slow
def test_every_layout_gives_the_same_losses_and_resumes_exactly_whatever_learns(weights, tmp_path):
    check_layouts(weights, LAYOUTS, 2, take_all, 20, tmp_path, UNTIED)


@pytest.mark.slow
def test_every_layout_of_four_ranks_gives_the_same_losses_and_resumes_exactly_whatever_learns(weights, tmp_path):
    check_layouts(weights, LAYOUTS_OF_FOUR, 4, take_all, 20, tmp_path, UNTIED)
