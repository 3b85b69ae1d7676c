import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_adapt.vocab.norms import match_median, match_quantiles, read_norms
from tests.vocab.matrices import Rows, fill_rows

LENGTHS = st.lists(st.floats(0.01, 100), min_size=1, max_size=20)


def test_norms_leave_out_rows_that_are_zero_or_not_finite():
    rows_VH = torch.tensor([[3.0, 4.0], [0.0, 0.0], [float("nan"), 1.0], [0.0, 1.0]])
    assert read_norms(Rows(rows_VH)).tolist() == [1.0, 5.0]


@given(LENGTHS, LENGTHS)
def test_quantiles_keep_directions_and_ranks_and_give_lengths_of_old_rows(new, old):
    rows_NH = torch.nn.functional.normalize(torch.randn(len(new), 3)) * torch.tensor(new)[:, None]
    old_norms = torch.tensor(old, dtype=torch.float64).sort().values
    matched = match_quantiles(rows_NH, old_norms)
    assert torch.allclose(torch.nn.functional.cosine_similarity(rows_NH, matched), torch.ones(len(new)), atol=1e-5)
    norms = matched.double().norm(dim=-1)
    assert ((norms[:, None] - old_norms).abs().min(1).values < 1e-4).all()
    order = rows_NH.double().norm(dim=-1).argsort(stable=True)
    assert (norms[order].diff() > -1e-4).all()


def test_as_many_new_rows_as_old_get_just_their_lengths():
    old_norms = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    rows_NH = torch.tensor([[9.0, 0.0], [0.0, 7.0], [8.0, 0.0]])
    assert torch.allclose(match_quantiles(rows_NH, old_norms), torch.tensor([[5.0, 0.0], [0.0, 1.0], [2.0, 0.0]]))


def test_the_median_is_that_of_the_old_rows():
    old_norms = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    assert torch.allclose(match_median(torch.tensor([[3.0, 4.0]]), old_norms), torch.tensor([[1.2, 1.6]]))


def test_equal_rows_stay_in_their_chunks(monkeypatch):
    monkeypatch.setattr("megatron_adapt.vocab.rows.CHUNK_ROWS", 2)
    rows_VH = torch.diag(torch.arange(1.0, 6.0))
    rows = fill_rows("subtoken_mean", rows_VH, {at: [at - 5] for at in range(5, 10)}, norm="quantile")
    assert torch.allclose(rows, rows_VH)
