import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_adapt.vocab import mixtures as mixtures_module
from megatron_adapt.vocab.mixtures import Mixtures, combine_mixtures
from tests.vocab.matrices import Rows


class PickyRows(Rows):
    """Rows that cannot be gathered from no ids at all, as those of a Megatron checkpoint."""

    most = 0

    def gather(self, ids):
        PickyRows.most = max(self.most, len(ids))
        return torch.cat([self.rows_VH[index][None] for index in ids])


@given(st.lists(st.lists(st.tuples(st.integers(0, 9), st.floats(-2, 2, width=32)), max_size=5), max_size=12))
@settings(max_examples=60, deadline=None)
def test_rows_are_the_product_of_the_weights_and_the_old_rows_in_any_division(entries):
    made = Mixtures.of(
        np.array([len(some) for some in entries], np.int64),
        np.array([number for some in entries for number, _ in some]),
        np.array([weight for some in entries for _, weight in some]),
    )
    rows_VH = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    dense = torch.zeros(len(entries), 10)
    for at, some in enumerate(entries):
        for number, weight in some:
            dense[at, number] += weight
    ids = list(range(100, 100 + len(entries)))
    for most in (2, 8192):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mixtures_module, "MAX_USED", most)
            patch.setattr(PickyRows, "most", 0)
            found = list(combine_mixtures(PickyRows(rows_VH), ids, made))
            assert PickyRows.most <= max(most, 5)
        assert [new for some, _ in found for new in some] == ids
        if found:
            assert torch.allclose(torch.cat([rows for _, rows in found]), dense @ rows_VH, atol=1e-5)


def test_mixtures_are_joined_renamed_and_spread():
    first = Mixtures.of(np.array([2, 0]), np.array([1, 0]), np.array([0.25, 0.75]))
    both = Mixtures.join([first, Mixtures.of(np.array([1]), np.array([2]), np.array([1.0]))])
    wide = both.rename(np.array([10, 20, 30])).spread(np.array([0, 2, 3]), 5)
    assert wide.lengths.tolist() == [2, 0, 0, 1, 0]
    assert wide.numbers.tolist() == [20, 10, 30]
    assert wide.weights.tolist() == [0.25, 0.75, 1.0]
    assert Mixtures.join([]).starts.tolist() == [0]
