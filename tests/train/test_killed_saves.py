"""``kill -9`` during a save, at random moments: never a broken checkpoint, and the losses of an undisturbed run."""

import pytest

from tests.helpers.killed_saves import kill_saves
from tests.helpers.runs import NUM_STEPS, make_run

CASES = {
    # Both ranks die at once, as with the machine.
    "sync-2-ranks": (2, []),
    # The rank dies alone: its writers live on and write into what the next launch must not use.
    "async-1-rank": (1, ["--train.async-save"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_kill_during_a_save_loses_no_finished_checkpoint_and_changes_no_loss(case, tmp_path):
    num_ranks, flags = CASES[case]
    found = kill_saves(make_run(tmp_path), num_ranks, 10, 8, *flags)
    assert found["num_moments"] > 100
    assert found["steps"] == [NUM_STEPS - 1, NUM_STEPS]
    assert len(set(found["named"])) > 2, "all kills fell into the same save"
