"""What holds for every method: the table, the fallbacks, finite rows."""

import typing

import pytest
import torch

from megatron_adapt.config import VocabSettings
from megatron_adapt.errors import CheckpointError
from megatron_adapt.vocab.fill import FILL_METHODS
from tests.vocab.matrices import fill_rows


def test_every_method_of_the_config_has_a_function():
    assert set(typing.get_args(typing.get_type_hints(VocabSettings)["method"])) == set(FILL_METHODS)


@pytest.mark.parametrize("pieces", [{4: [], 5: [1]}, {4: []}])
def test_a_token_without_old_pieces_takes_the_mean_and_is_counted(pieces, caplog):
    rows_VH = torch.randn(4, 3)
    rows = fill_rows("subtoken_mean", rows_VH, pieces)
    assert torch.allclose(rows[0], rows_VH.mean(0))
    assert (
        f"input matrix: 1 of {len(pieces)} new tokens have no row by subtoken_mean; 0 take the mean of their old "
        "pieces, 1, which have none, the mean of all rows" in caplog.text
    )


@pytest.mark.parametrize("method", ["subtoken_mean", "subtoken_weighted"])
@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_pieces_whose_rows_are_zero_or_not_finite_give_the_mean(bad, method):
    rows_VH = torch.tensor([[bad, bad], [1.0, 2.0], [3.0, 4.0]])
    settings = {"piece_weights": "position"} if method == "subtoken_weighted" else {}
    base_mean = torch.tensor([2.0, 3.0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.vocab.matrices.Rows.mean", lambda self: base_mean.double())
        rows = fill_rows(method, rows_VH, {3: [0], 4: [1]}, **settings)
    assert torch.equal(rows, torch.tensor([[2.0, 3.0], [1.0, 2.0]]))


def test_a_matrix_whose_mean_is_not_finite_is_refused_by_name():
    message = r"output head: the mean of its rows is not finite, so nothing can fill new ones; look for NaN with tools/"
    with pytest.raises(CheckpointError, match=message):
        fill_rows("subtoken_mean", torch.tensor([[float("nan")], [1.0]]), {2: []}, is_head=True)


@pytest.mark.parametrize("norm", ["none", "median", "quantile"])
@pytest.mark.parametrize("method", ["subtoken_mean", "normal"])
def test_an_empty_model_stays_empty_and_is_told(method, norm, caplog):
    assert not fill_rows(method, torch.zeros(3, 2), {3: [0], 4: []}, norm=norm).any()
    assert "input matrix: the mean of its rows is zero, and so are new rows; is the model empty?" in caplog.text
