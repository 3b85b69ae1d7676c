import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_adapt.vocab import rows as rows_module
from megatron_adapt.vocab.rows import combine_rows, read_blocks
from tests.vocab.matrices import Rows, collect


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_chunks_change_nothing(data):
    rows_VH = torch.randn(9, 4).bfloat16()
    spelt = data.draw(st.lists(st.lists(st.integers(0, 8), min_size=1, max_size=5), min_size=1, max_size=12))
    weights = [
        [draw / 7 for draw in data.draw(st.lists(st.integers(1, 9), min_size=len(s), max_size=len(s)))] for s in spelt
    ]
    olds, each = dict(enumerate(spelt, start=9)), dict(enumerate(weights, start=9))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_module, "CHUNK_ROWS", data.draw(st.integers(1, 13)))
        ids, mean = collect(lambda base: combine_rows(base, olds), Rows(rows_VH))
        _, weighted = collect(lambda base: combine_rows(base, olds, each), Rows(rows_VH))
        blocks = torch.cat(list(read_blocks(Rows(rows_VH))))
    assert ids == list(olds)
    assert torch.equal(blocks, rows_VH.double())
    exact = rows_VH.double()
    assert torch.allclose(mean.double(), torch.stack([exact[s].mean(0) for s in spelt]), atol=1e-6)
    sums = [torch.tensor(w, dtype=torch.float64) @ exact[s] for s, w in zip(spelt, weights, strict=True)]
    assert torch.allclose(weighted.double(), torch.stack(sums), atol=1e-4)


def test_bfloat16_rows_are_summed_in_fp32():
    # In bfloat16 257 + 1 rounds back, so a running sum would be lost.
    rows_VH = torch.tensor([[256.0], [1.0]]).bfloat16()
    ((_, row),) = combine_rows(Rows(rows_VH), {2: [0, 1, 1, 1]})
    assert row.item() == 259 / 4


def test_blocks_leave_rows_out_that_are_not_finite():
    rows_VH = torch.tensor([[1.0], [float("nan")], [float("-inf")], [2.0]])
    assert torch.cat(list(read_blocks(Rows(rows_VH)))).tolist() == [[1.0], [2.0]]
