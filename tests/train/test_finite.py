"""A step whose loss or gradient is not finite moves nothing on any rank, whichever rank saw it."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_adapt.checkpoint.root import find_checkpoint, read_description
from megatron_adapt.checkpoint.weights import load_weights
from megatron_adapt.config import Layout, StageSettings, TrainSettings
from megatron_adapt.engine.llama import build_model
from megatron_adapt.engine.parallel import make_groups, start_engine
from megatron_adapt.train import step
from megatron_adapt.train.optimizer import build_trainer
from megatron_adapt.train.step import train_step
from tests.helpers.runs import make_run
from tests.helpers.spawn import run_ranks

STAGE = StageSettings(name="one", tokens=1, blend={"en": 1.0}, lr=1e-2, lr_warmup_fraction=0.0)
WINDOWS = np.random.default_rng(0).integers(2, 300, (8, 17))
LAYOUTS = {
    "tp2": Layout(tensor_model_parallel_size=2),
    "tp2-sp": Layout(tensor_model_parallel_size=2, sequence_parallel=True),
    "pp2": Layout(pipeline_model_parallel_size=2),
    "dp2": Layout(),
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Megatron checkpoint of a tiny model."""
    folder = tmp_path_factory.mktemp("weights")
    make_run(folder)
    return find_checkpoint(folder / "run" / "megatron")


def make_trainer(weights, layout, **settings):
    description, train = read_description(weights), TrainSettings(**settings)
    model = build_model(
        description.shape,
        padded_vocab_size=description.padded_vocab_size,
        layout=layout,
        seq_length=16,
        bf16=train.bf16,
    )
    trainer = build_trainer([model], train, STAGE, 9)
    load_weights(trainer.bare_models, weights)
    trainer.optimizer.reload_model_params()
    return trainer


class Poison:
    """Stands in for rows that are held: makes all gradients of one rank what they should not be."""

    def __init__(self, trainer, value):
        self.trainer, self.value = trainer, value

    def zero_gradient(self):
        for parameter in self.trainer.bare_models[0].parameters():
            parameter.main_grad.view(-1)[-1] = self.value


def spoil_loss(trainer, micro_batch):
    """Make the loss of a micro-batch of this rank NaN; return what mends it."""
    calls = iter(range(99))
    return trainer.models[0].register_forward_hook(
        lambda module, args, output: output * math.nan if next(calls) == micro_batch else None
    )


def read_state(trainer):
    """Copy weights, masters, moments and Adam's count of steps."""
    found = [parameter.detach().clone() for parameter in trainer.bare_models[0].parameters()]
    for part in trainer.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            found.append(torch.tensor(group["step"]))
            for parameter in group["params"]:
                moments = part.optimizer.state[parameter]
                found += [tensor.detach().clone() for tensor in (parameter, moments["exp_avg"], moments["exp_avg_sq"])]
    return found


def is_same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def leave_out_steps(trainer, rank):
    """Do a good step, one with a NaN loss and two with bad gradients on ``rank`` alone, a good one."""
    first = train_step(trainer, WINDOWS, 2)
    before = read_state(trainer)
    hook = spoil_loss(trainer, 1) if dist.get_rank() == rank else None
    by_loss = train_step(trainer, WINDOWS, 2)
    if hook is not None:
        hook.remove()
    found = []
    for value in (math.inf, math.nan):
        poisoned = replace(trainer, frozen_rows=(Poison(trainer, value),)) if dist.get_rank() == rank else trainer
        found.append(train_step(poisoned, WINDOWS, 2))
    skipped = [report.is_skipped for report in (first, by_loss, *found)]
    untouched = is_same(read_state(trainer), before)
    last = train_step(trainer, WINDOWS, 2)
    rates = [report.learning_rate for report in (first, by_loss, *found, last)]
    return {
        "skipped": skipped,
        "untouched": untouched,
        "windows": (by_loss.non_finite, found[0].non_finite),
        "norms": [report.grad_norm for report in found],
        "learns again": not last.is_skipped and last.loss < first.loss and not is_same(read_state(trainer), before),
        "schedule": rates == sorted(set(rates), reverse=True),
    }


def _leave_out_steps(weights, cases):
    found = {}
    with start_engine(Layout(), 1, step_timeout_in_mins=20):
        for name, layout, settings in cases:
            parallel_state.destroy_model_parallel()
            make_groups(layout)
            found[name] = leave_out_steps(make_trainer(weights, layout, **settings), dist.get_world_size() - 1)
    return found


def check_reports(found, windows):
    assert found["skipped"] == [False, True, True, True]
    assert found["untouched"]
    assert found["learns again"]
    assert found["schedule"]
    # The gradients of the last two steps were spoilt, not their losses.
    assert found["windows"] == (windows, ())


CASES = [
    (f"{name}{' bf16' if bf16 else ''}{'' if distributed else ' plain'}", layout, settings)
    for name, layout in LAYOUTS.items()
    for bf16 in (False, True)
    for distributed in (False, True)
    for settings in [{"bf16": bf16, "use_distributed_optimizer": distributed}]
]


QUICK = ("tp2-sp bf16", "pp2", "dp2 plain", "dp2 bf16")


def check_ranks(weights, cases):
    for found in run_ranks(_leave_out_steps, 2, weights, cases):
        for name, reports in found.items():
            # Two micro-batches a rank, in turn, or four.
            check_reports(reports, (6, 7) if name.startswith("dp2") else (2, 3))


def test_what_one_rank_sees_leaves_every_rank_as_it_was(weights):
    check_ranks(weights, [case for case in CASES if case[0] in QUICK])


@pytest.mark.slow
def test_what_one_rank_sees_leaves_every_rank_as_it_was_in_every_layout(weights):
    check_ranks(weights, [case for case in CASES if case[0] not in QUICK])


def step_as_the_engine(optimizer, loss):
    _, norm, _ = optimizer.step()
    return norm, False


def test_a_finite_step_is_the_engines_own_with_one_norm(weights, monkeypatch):
    with start_engine(Layout(), 1):
        ours, engines = (make_trainer(weights, Layout(), bf16=True) for _ in range(2))
        (part,) = ours.optimizer.chained_optimizers
        measure, taken = part.get_grad_norm, []
        part.get_grad_norm = lambda: taken.append(measure()) or taken[-1]
        reports = [train_step(ours, WINDOWS, 2) for _ in range(2)]
        monkeypatch.setattr(step, "step_if_finite", step_as_the_engine)
        assert [train_step(engines, WINDOWS, 2) for _ in range(2)] == reports
        assert is_same(read_state(ours), read_state(engines))
    assert [report.grad_norm for report in reports] == taken


def test_a_left_out_step_on_one_rank_reports_loss_and_norm(weights):
    found = _leave_out_steps(weights, [("one", Layout(), {"bf16": False})])["one"]
    check_reports(found, (2, 3))
    assert found["norms"][0] == math.inf
    assert math.isnan(found["norms"][1])
