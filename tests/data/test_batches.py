"""Steps of a stage with a growing batch: megatron-core's sizes, every window once, and what is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

from megatron_adapt.config import StageSettings
from megatron_adapt.data.batches import Batches
from megatron_adapt.errors import ConfigError


def cut(num_windows, global_batch_size, *ramp):
    stage = StageSettings(name="s", tokens=1, blend={"xx": 1.0}, rampup_batch_size=ramp)
    return Batches.of(stage, num_windows=num_windows, global_batch_size=global_batch_size)


def test_without_a_ramp_all_steps_are_whole():
    batches = cut(36, 12)
    assert [batches.find(step) for step in (1, 2, 3)] == [(0, 12), (12, 12), (24, 12)]
    assert [batches.count_progress(step) for step in range(4)] == [0, 1, 2, 3]


def test_a_ramp_by_hand():
    # Two increments over 24 windows: 4 until 12 windows are read, 8 until 24 are, and behind that 12.
    batches = cut(72, 12, 4, 4, 24)
    assert np.diff(batches.ends_S).tolist() == [4, 4, 4, 8, 8, 12, 12, 12, 8]
    assert batches.find(5) == (20, 8)
    assert batches.count_progress(5) == 28
    assert [batches.find_step(place) for place in (0, 4, 20, 28)] == [1, 2, 5, 6]


@given(
    st.integers(1, 6), st.integers(1, 6), st.integers(1, 8), st.integers(1, 500), st.integers(1, 40), st.integers(1, 4)
)
def test_sizes_are_those_of_megatron_core_and_every_window_is_read_once(start, step, rises, samples, wholes, unit):
    start, step = start * unit, step * unit
    largest = start + rises * step
    batches = cut(wholes * largest, largest, start, step, samples)
    reference = RampupBatchsizeNumMicroBatchesCalculator(largest, unit, 1, False, 1, start, step, samples)
    assert batches.count_windows(batches.num_steps) == wholes * largest
    for number in range(1, batches.num_steps + 1):
        first, size = batches.find(number)
        assert first == batches.count_windows(number - 1)
        reference.update(first, consistency_check=True)
        left = wholes * largest - first
        assert size == min(reference.get_current_global_batch_size(), left) > 0
        assert batches.find_step(first) == number
    batches.check_unit("s", unit)


@pytest.mark.parametrize("ramp", [(4, 3, 10), (12, 4, 10), (16, 4, 10)])
def test_ramps_that_do_not_lead_to_the_batch_are_refused(ramp):
    with pytest.raises(ConfigError, match=r"s: rampup_batch_size: from \d+ in steps of \d .*global_batch_size 12"):
        cut(24, 12, *ramp)


def test_ramps_that_are_no_three_numbers_are_refused():
    for ramp in ((4, 4), (4, 4, 0), (0, 4, 10)):
        with pytest.raises(ConfigError, match=r"rampup_batch_size \[.*\] is not three numbers from 1; give START"):
            cut(24, 12, *ramp)


def test_batches_that_ranks_cannot_share_are_refused():
    message = r"s: rampup_batch_size: a batch of 4 windows is not a multiple of the 6 that all ranks take"
    with pytest.raises(ConfigError, match=message):
        cut(72, 12, 4, 4, 24).check_unit("s", 6)
