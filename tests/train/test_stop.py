"""A launch that is told to stop saves after the same step on all ranks, and the same call goes on exactly."""

import os
import signal
from functools import partial

import pytest

from megatron_adapt.checkpoint.root import find_checkpoint
from megatron_adapt.train import loop
from megatron_adapt.train.stop import StopRequest
from tests.helpers.runs import copy_run, make_run, train_stage
from tests.helpers.spawn import run_ranks


def raise_at(step, number, rank, done, *args, **kwargs):
    """Do a step; the signal comes while it runs, on one rank."""
    done.append(None)
    if len(done) == step and os.environ.get("RANK", "0") == rank:
        signal.raise_signal(number)
    return TRAIN_STEP(*args, **kwargs)


TRAIN_STEP = loop.train_step


def train_with_signal(recipe, number, rank):
    loop.train_step = partial(raise_at, 2, number, rank, [])
    try:
        rows = train_stage(recipe, "first")
    finally:
        loop.train_step = TRAIN_STEP
    return rows, signal.getsignal(number) == signal.SIG_DFL


def list_exact(rows):
    return [
        [row.get(name) for name in ("step", "loss", "grad_norm", "learning_rate", "valid_bits_per_byte")]
        for row in rows
    ]


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_after_the_step_and_the_same_call_goes_on_exactly(tmp_path):
    straight = make_run(tmp_path / "straight")
    stopped = copy_run(straight, tmp_path / "stopped")
    expected = run_ranks(train_stage, 2, straight, "first")[0]
    found = run_ranks(train_with_signal, 2, stopped, signal.SIGUSR1, "1")
    assert [rows[-1]["step"] for rows, _ in found] == [2, 2]
    assert all(is_given_back for _, is_given_back in found)
    root = tmp_path / "stopped" / "run" / "checkpoints" / "first"
    assert find_checkpoint(root).name == "iter_0000002"
    assert not (root / "stage.json").exists()
    rows = run_ranks(train_stage, 2, stopped, "first")[0]
    assert list_exact(rows) == list_exact(expected)
    assert (root / "stage.json").is_file()


def test_sigterm_and_the_time_limit_stop_a_run_too(tmp_path):
    recipe = make_run(tmp_path)
    rows, _ = train_with_signal(recipe, signal.SIGTERM, "0")
    assert rows[-1]["step"] == 2
    assert train_stage(recipe, "first", "--train.exit-duration-in-mins", "1e-9")[-1]["step"] == 3
    assert train_stage(recipe, "first", "--train.exit-duration-in-mins", "60")[-1]["step"] == 6


def fail_while_open(before):
    with StopRequest(0):
        assert signal.getsignal(signal.SIGTERM) != before
        raise KeyError


def test_signals_are_given_back_after_an_error():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyError):
        fail_while_open(before)
    assert signal.getsignal(signal.SIGTERM) == before
