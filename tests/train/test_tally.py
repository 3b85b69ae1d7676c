"""Losses and bytes per source add up to those of all, whatever the micro-batches."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_adapt.train.tally import SourceTally, merge_languages, sum_by_source

LN2 = math.log(2)


def test_sums_by_hand():
    loss_BT = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0], [64.0, 128.0, 256.0]])
    mask_BT = torch.tensor([[True, True, False], [True, True, True], [True, False, True]])
    bytes_BT = torch.tensor([[3, 1, 9], [0, 2, 2], [1, 1, 5]])
    sums = sum_by_source(loss_BT, mask_BT, bytes_BT, torch.tensor([2, 0, 2]), 4)
    # Left out: what is masked, and the target of no bytes.
    assert sums.tolist() == [16 + 32, 0, 1 + 2 + 64 + 256, 0, 2 + 2, 0, 3 + 1 + 1 + 5, 0]


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 6))
def test_sources_of_any_cut_of_a_batch_add_up_to_all_of_it(seed, num_sources, size):
    draw = np.random.default_rng(seed)
    loss_BT, mask_BT = torch.from_numpy(draw.random((6, 7))), torch.from_numpy(draw.random((6, 7)) < 0.8)
    bytes_BT = torch.from_numpy(draw.integers(0, 4, (6, 7)))
    sources_B = torch.from_numpy(draw.integers(0, num_sources, 6))
    parts = [slice(at, at + size) for at in range(0, 6, size)]
    sums = sum(sum_by_source(loss_BT[p], mask_BT[p], bytes_BT[p], sources_B[p], num_sources) for p in parts)
    is_text_BT = mask_BT & (bytes_BT > 0)
    assert sums[:num_sources].sum().item() == pytest.approx(loss_BT[is_text_BT].sum().item())
    assert sums[num_sources:].sum().item() == bytes_BT[is_text_BT].sum().item()


def test_steps_are_added_up_until_they_are_asked_for():
    tally = SourceTally(("en", "xx/a", "xx/b", "yy"))
    tally.add((10 * LN2, 4 * LN2, 0, 0, 5, 4, 0, 0))
    tally.add((2 * LN2, 4 * LN2, 9 * LN2, 0, 1, 4, 2, 0))
    # A source without text is left out; a language of several weighs them by their bytes.
    assert tally.take() == pytest.approx({"en": 2.0, "xx/a": 1.0, "xx/b": 4.5, "xx": 17 / 10})
    tally.add(())
    assert tally.take() == {}


def test_a_language_of_one_source_is_named_once_and_a_lone_part_gets_its_language():
    assert merge_languages({"en": 6.0}, {"en": 3}) == {"en": 2.0}
    assert merge_languages({"xx/a": 6.0}, {"xx/a": 3}) == {"xx/a": 2.0, "xx": 2.0}
