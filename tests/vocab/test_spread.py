import pytest
import torch

from megatron_adapt.vocab import rows as rows_module
from megatron_adapt.vocab.spread import read_moments
from tests.vocab.matrices import Rows, fill_rows


def test_the_mean_is_that_of_all_old_rows():
    rows_VH = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    assert torch.equal(fill_rows("mean", rows_VH, {2: [0], 3: []}), torch.tensor([[2.0, 4.0]] * 2))


@pytest.mark.parametrize("num_rows", [200, 3], ids=["full_rank", "fewer_rows_than_columns"])
def test_moments_are_those_of_all_rows_and_chunks_change_nothing(num_rows, monkeypatch):
    monkeypatch.setattr(rows_module, "CHUNK_ROWS", 7)
    rows_VH = torch.randn(num_rows, 5) + 10
    mean_H, root_HH = read_moments(Rows(rows_VH))
    assert torch.allclose(mean_H, rows_VH.double().mean(0))
    assert torch.allclose(root_HH @ root_HH.T, torch.cov(rows_VH.double().T, correction=0), atol=1e-10)


def test_drawn_rows_have_the_moments_of_the_old_ones():
    torch.manual_seed(0)
    rows_VH = torch.randn(500, 3) @ torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 0.1]]) + 3
    drawn = fill_rows("normal", rows_VH, {at: [0] for at in range(500, 20_500)}).double()
    assert torch.allclose(drawn.mean(0), rows_VH.double().mean(0), atol=0.05)
    assert torch.allclose(torch.cov(drawn.T), torch.cov(rows_VH.double().T, correction=0), atol=0.1)


def test_a_drawn_row_depends_on_seed_matrix_and_id_alone(monkeypatch):
    rows_VH = torch.randn(20, 4)
    whole = fill_rows("normal", rows_VH, {20: [0], 21: [1], 22: [2]})
    assert torch.equal(whole[1:2], fill_rows("normal", rows_VH, {21: []}))
    assert not torch.equal(whole, fill_rows("normal", rows_VH, {20: [0], 21: [1], 22: [2]}, seed=7))
    assert not torch.equal(whole, fill_rows("normal", rows_VH, {20: [0], 21: [1], 22: [2]}, is_head=True))
    monkeypatch.setattr(rows_module, "CHUNK_ROWS", 2)
    assert torch.allclose(whole, fill_rows("normal", rows_VH, {20: [0], 21: [1], 22: [2]}), atol=1e-6)
