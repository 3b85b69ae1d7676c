import typing

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_adapt.config import VocabSettings
from megatron_adapt.vocab import fill
from megatron_adapt.vocab.fill import FILL_METHODS


class _Rows:
    """Old rows in memory."""

    def __init__(self, rows_VH: torch.Tensor) -> None:
        self.rows_VH = rows_VH
        self.num_rows = len(rows_VH)

    def gather(self, ids):
        return self.rows_VH[list(ids)]

    def mean(self):
        return self.rows_VH.double().mean(0)


def _run(method, rows_VH, pieces):
    ids, rows = [], []
    for some_ids, some_rows in FILL_METHODS[method](_Rows(rows_VH), pieces):
        assert some_rows.dtype == torch.float32
        ids += some_ids
        rows.append(some_rows)
    assert ids == list(pieces)
    return torch.cat(rows)


def test_every_method_of_the_config_has_a_function():
    names = typing.get_args(typing.get_type_hints(VocabSettings)["method"])
    assert set(names) == set(FILL_METHODS)


def test_the_subtoken_mean_equals_a_hand_computation():
    rows_VH = torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, -2.0]])
    pieces = {3: [0, 1], 4: [2], 5: [0, 0, 1, 2]}
    expected = torch.tensor([[2.0, 4.0], [5.0, -2.0], [2.5, 2.0]])
    assert torch.equal(_run("subtoken_mean", rows_VH, pieces), expected)


def test_the_mean_is_that_of_all_old_rows():
    rows_VH = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    assert torch.equal(_run("mean", rows_VH, {2: [0], 3: []}), torch.tensor([[2.0, 4.0]] * 2))


@pytest.mark.parametrize("pieces", [{4: [], 5: [1]}, {4: []}])
def test_a_token_without_old_pieces_takes_the_mean_and_is_counted(pieces, caplog):
    rows_VH = torch.randn(4, 3)
    rows = _run("subtoken_mean", rows_VH, pieces)
    assert torch.allclose(rows[0], rows_VH.mean(0))
    assert "1 new tokens have no old pieces" in caplog.text


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_chunks_change_nothing(data):
    rows_VH = torch.randn(9, 4).bfloat16()
    spelt = data.draw(st.lists(st.lists(st.integers(0, 8), min_size=1, max_size=5), min_size=1, max_size=12))
    pieces = dict(enumerate(spelt, start=9))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fill, "_CHUNK_TOKENS", data.draw(st.integers(1, 13)))
        found = _run("subtoken_mean", rows_VH, pieces)
    expected = torch.stack([rows_VH[olds].double().mean(0) for olds in spelt])
    assert torch.allclose(found.double(), expected, atol=1e-6)


def test_bfloat16_rows_are_summed_in_fp32():
    # In bfloat16 257 + 1 rounds back, so a running sum would be lost.
    rows_VH = torch.tensor([[256.0], [1.0]]).bfloat16()
    assert _run("subtoken_mean", rows_VH, {2: [0, 1, 1, 1]}).item() == 259 / 4
