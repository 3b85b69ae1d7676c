"""A process that stands still is ended with its stacks; one that moves, validates or saves is not."""

import subprocess
import sys
from datetime import timedelta

import torch.distributed as dist

from megatron_adapt.engine import parallel
from megatron_adapt.engine.parallel import Layout, start_engine
from megatron_adapt.train.watchdog import EXIT_CODE, Watchdog

LIMIT = 2.0  # seconds
RUN = f"""
import time
import torch
from megatron_adapt.train.watchdog import Watchdog

def stand_still():
    time.sleep(60)

def move(beat):
    for _ in range(10):
        beat()
        time.sleep({LIMIT / 8})

model = torch.nn.Identity()
with Watchdog({LIMIT / 60}) as watchdog:
    watchdog.follow(model)
    move(lambda: watchdog.beat("step 1"))
    print("stepped", flush=True)
    move(lambda: model(torch.zeros(1)))
    print("validated", flush=True)
    with watchdog.pause("the save after step 1"):
        time.sleep({1.5 * LIMIT})
    print("saved", flush=True)
    watchdog.beat("step 2")
    stand_still()
"""


def test_a_rank_that_stands_still_is_ended_with_its_stacks():
    done = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == EXIT_CODE
    assert done.stdout.split() == ["stepped", "validated", "saved"]
    assert "in stand_still" in done.stderr
    assert "error: rank 0: step 2: nothing moved for 0.0333333 minutes; the stacks above say where" in done.stderr


def test_a_watchdog_is_gone_when_closed_and_absent_when_off():
    with Watchdog(60) as watchdog:
        assert watchdog._thread.is_alive()
    assert not watchdog._thread.is_alive()
    with Watchdog(0) as watchdog:
        watchdog.beat("step 1")
        assert not watchdog._thread.is_alive()


def test_ranks_wait_for_others_longer_than_a_rank_may_stand_still(monkeypatch):
    given = []
    monkeypatch.setattr(parallel, "_init_process_group", given.append)
    monkeypatch.setattr(parallel, "_leave", lambda *, is_failing: None)
    monkeypatch.setattr(parallel, "model_parallel_cuda_manual_seed", lambda *args, **kwargs: None)
    monkeypatch.setattr(
        parallel.parallel_state,
        "initialize_model_parallel",
        lambda *sizes, distributed_timeout_minutes, **others: given.append(
            timedelta(minutes=distributed_timeout_minutes)
        ),
    )
    for minutes in (0, 10, 60):
        with start_engine(Layout(), 1, minutes):
            pass
    assert given == [timedelta(minutes=most) for most in (10, 10, 15, 15, 65, 65)]
    assert not dist.is_initialized()
