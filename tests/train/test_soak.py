"""Memory does not creep: 2,000 steps of a real stage, with its rows of metrics, validations and saves."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.runs import TOKENS, make_run

ROOT = Path(__file__).parents[2]
NUM_STEPS = 2000
# A process of its own: what other tests leave behind would hide what a run gathers.
RUNNER = """
import json, sys
import psutil
from pathlib import Path
from megatron_adapt.train import loop
from tests.helpers.runs import train_stage

process, resident, step = psutil.Process(), [], loop.train_step

def measured_step(*args, **kwargs):
    resident.append(process.memory_info().rss)
    return step(*args, **kwargs)

loop.train_step = measured_step
train_stage(Path(sys.argv[1]), "first", "--train.save-interval", "250", "--train.eval-interval", "100")
print(json.dumps(resident))
"""


@pytest.mark.slow
def test_memory_of_a_long_run_has_no_slope(tmp_path):
    recipe = make_run(tmp_path)
    recipe.write_text(recipe.read_text().replace(f"tokens = {TOKENS}", f"tokens = {NUM_STEPS * 12 * 16}", 1))
    command = [sys.executable, "-c", RUNNER, str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=1200)
    assert done.returncode == 0, done.stderr
    resident = np.array(json.loads(done.stdout.splitlines()[-1])) / 2**20
    assert len(resident) == NUM_STEPS
    # Means of 100 steps: between two steps memory rises and falls by what a validation or a save takes.
    levels = resident[NUM_STEPS // 2 :].reshape(-1, 100).mean(1)
    slope, error = fit_slope(levels)
    grown = slope * (len(levels) - 1)
    assert grown < 1 or slope < 2 * error, f"grew by {grown:.2f} MiB over the last 1,000 steps, from {levels[0]:.1f}"


def fit_slope(levels):
    """Return the slope of a straight line through the levels, and its standard error."""
    times = np.arange(len(levels)) - (len(levels) - 1) / 2
    slope = float((times * levels).sum() / (times**2).sum())
    rest = levels - levels.mean() - slope * times
    return slope, float(np.sqrt((rest**2).sum() / (len(levels) - 2) / (times**2).sum()))
