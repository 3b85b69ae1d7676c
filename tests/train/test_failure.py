"""Under torchrun, a rank that fails ends the job with its own traceback, and a restarted job goes on by itself."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_adapt.checkpoint.root import find_checkpoint
from megatron_adapt.engine import parallel
from megatron_adapt.errors import EngineError
from megatron_adapt.files import read_json
from megatron_adapt.logs import read_metrics
from megatron_adapt.train import failure
from megatron_adapt.train.failure import record_failure
from tests.helpers.runs import NUM_STEPS, copy_run, make_run

BROKEN = Path(__file__).with_name("broken_run.py")


def launch(recipe, fault, *flags, mark="", restarts=0):
    """Run the first stage on two ranks with a fault; return the exit code, standard error and the seconds."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", str(restarts)]
    stage = ["--recipe", str(recipe), "--stage", "first", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, *torchrun, str(BROKEN), fault, mark, *stage],
        capture_output=True, text=True, timeout=400, check=False, env=environment,
    )  # fmt: skip
    return done.returncode, done.stderr, time.monotonic() - start


def read_rows(recipe):
    rows = read_metrics(recipe.parent / "run" / "checkpoints" / "first" / "metrics.jsonl")
    names = ("step", "loss", "grad_norm", "learning_rate", "valid_bits_per_byte", "tokens")
    return [[row.get(name) for name in names] for row in rows]


def find_cause(stderr):
    """Return what torchrun says of the root cause."""
    return stderr[stderr.index("Root Cause (first observed failure)") :]


@pytest.mark.slow
def test_a_rank_that_raises_ends_the_job_with_its_traceback_first(tmp_path):
    recipe = make_run(tmp_path)
    code, stderr, seconds = launch(recipe, "raise")
    assert code == 1
    assert seconds < 60 + 60  # the minute, and what a start may take
    cause = find_cause(stderr)
    assert "rank      : 1" in cause
    assert "in break_here" in cause
    assert "ZeroDivisionError: the fault of this test" in cause
    assert "(on rank 1)" in cause
    assert stderr.index("ZeroDivisionError") < stderr.index("Root Cause")
    # On a busy machine the process may take longer to end than the others wait before they speak.
    assert "Connection closed" not in stderr[: stderr.index("ZeroDivisionError")]


@pytest.mark.slow
def test_a_rank_that_was_killed_is_named_as_the_cause(tmp_path):
    recipe = make_run(tmp_path)
    code, stderr, seconds = launch(recipe, "kill")
    assert code != 0
    assert seconds < 60 + 60
    cause = find_cause(stderr)
    assert "rank      : 1" in cause
    assert "Signal 9 (SIGKILL)" in cause


@pytest.mark.slow
def test_a_rank_that_stands_still_shows_its_stack_and_ends_the_job(tmp_path):
    recipe = make_run(tmp_path)
    code, stderr, _ = launch(recipe, "stall", "--train.step-timeout-in-mins", "0.5")
    assert code != 0
    assert "in break_here" in stderr
    assert "rank 1: step 5: nothing moved for 0.5 minutes" in stderr
    # The rank that waits for it stands still as long.
    assert "step 5: nothing moved for 0.5 minutes" in find_cause(stderr)


@pytest.mark.slow
def test_a_restarted_job_goes_on_from_its_last_checkpoint_exactly(tmp_path):
    straight = make_run(tmp_path / "straight")
    killed = copy_run(straight, tmp_path / "killed")
    mark = str(tmp_path / "was_killed")
    code, stderr, _ = launch(straight, "none", mark=str(straight))
    assert code == 0, stderr
    code, stderr, _ = launch(killed, "kill", mark=mark, restarts=1)
    assert code == 0, stderr
    assert Path(mark).exists()
    assert "continuing after step 3" in stderr
    assert read_rows(killed) == read_rows(straight)
    root = killed.parent / "run" / "checkpoints" / "first"
    assert find_checkpoint(root).name == f"iter_{NUM_STEPS:07}"
    assert (root / "stage.json").is_file()


OWN = (ZeroDivisionError("by gloo"), EngineError("gloo: the error of a user"), RuntimeError("out of memory"))
OF_A_PEER = (
    dist.DistBackendError("NCCL error"),
    RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer"),
)


@pytest.mark.parametrize(
    ("error", "waits"), [*((error, False) for error in OWN), *((error, True) for error in OF_A_PEER)]
)
def test_an_error_is_written_down_with_its_rank_and_one_of_a_peer_later(error, waits, tmp_path, monkeypatch):
    slept, file = [], tmp_path / "error.json"
    monkeypatch.setattr(failure.time, "sleep", slept.append)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "any")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(type(error)), record_failure():
        raise error
    assert len(slept) == waits
    callstack = read_json(file)["message"]["extraInfo"]["py_callstack"]
    assert callstack.rstrip().endswith(f"{error}\n(on rank 3)")


@pytest.mark.parametrize(("restarts", "fresh", "warns"), [("0", "0", False), ("1", "0", True), ("1", "1", False)])
def test_restarts_without_a_fresh_store_are_warned_of(restarts, fresh, warns, monkeypatch, caplog):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", fresh)
    parallel._check_restarts()
    assert ("a restart fails to connect without TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in caplog.text) == warns
