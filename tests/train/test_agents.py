"""Two hosts on one machine: two torchrun agents that meet over loopback, one of them killed and started again."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_adapt.logs import read_metrics
from tests.helpers.runs import copy_run, get_curve, make_run, train_stage
from tests.helpers.spawn import host_store, run_ranks

TOOL = Path(__file__).parents[2] / "tools" / "pretrain.py"
STEPS = 40
FLAGS = [
    "--train.stages.0.tokens", str(STEPS * 12 * 16), "--train.save-interval", "4", "--train.eval-interval", "1000",
    "--train.keep-last", "2", "--train.async-save",
]  # fmt: skip
# A dead agent is missed after 3 heartbeats, a second apart; only then can another take its place.
RENDEZVOUS = "keep_alive_interval=1,keep_alive_max_attempt=3,join_timeout=300"


def start_agent(recipe, port, log):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "3",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "run",
        "--local-addr", "127.0.0.1", "--rdzv-conf", f"{RENDEZVOUS},is_host=0",
        str(TOOL), "--recipe", str(recipe), "--stage", "first", *FLAGS,
    ]  # fmt: skip
    # Without it an agent of torch 2.13 keeps the address of the first round, where another host was rank 0.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with log.open("wb") as output:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)


def kill_tree(agent):
    """Kill an agent and all it started with -9, the agent first: nothing can be cleaned up."""
    with_children = [psutil.Process(agent.pid), *psutil.Process(agent.pid).children(recursive=True)]
    for process in with_children:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    agent.wait()


def wait_for_step(path, step, agents):
    deadline = time.monotonic() + 400
    while not path.is_file() or max((row["step"] for row in read_metrics(path)), default=0) < step:
        assert time.monotonic() < deadline, f"{path}: no step {step}"
        assert [agent.poll() for agent in agents] == [None, None], "an agent ended early"
        time.sleep(0.01)


@pytest.mark.slow
def test_a_host_that_dies_and_comes_back_costs_no_loss(tmp_path):
    straight = make_run(tmp_path / "straight")
    recipe = copy_run(straight, tmp_path / "run")
    expected = run_ranks(train_stage, 2, straight, "first", *FLAGS)[0]
    root = recipe.parent / "run" / "checkpoints" / "first"
    store = host_store()
    logs = [tmp_path / f"{name}.log" for name in ("first", "second", "again")]
    agents = [start_agent(recipe, store.port, log) for log in logs[:2]]
    try:
        wait_for_step(root / "metrics.jsonl", 10, agents)
        kill_tree(agents[1])
        assert not (root / "stage.json").exists()
        agents[1] = start_agent(recipe, store.port, logs[2])
        codes = [agent.wait(timeout=400) for agent in agents]
    finally:
        for agent in agents:
            if agent.poll() is None:
                kill_tree(agent)
    assert codes == [0, 0], [log.read_text()[-3000:] for log in logs]
    rows = read_metrics(root / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    assert get_curve(rows) == get_curve(expected)
    assert (root / "stage.json").is_file()
