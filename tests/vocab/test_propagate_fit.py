"""The fit against LAPACK's rank-revealing least squares, on matrices as badly conditioned as real embeddings."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_adapt.tokenizer.id_map import IdMap
from megatron_adapt.vocab import propagate_fit
from megatron_adapt.vocab.propagate_fit import fit_propagation, list_equations

WIDTH = 48


def draw(rows, columns, seed):
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make_rows(num_rows, condition, rank=WIDTH, seed=0):
    """Return a matrix whose singular values fall evenly (by their logarithm) from 1 to 1 / condition."""
    left, _ = torch.linalg.qr(draw(num_rows, rank, seed))
    right, _ = torch.linalg.qr(draw(WIDTH, rank, seed + 1))
    values = torch.logspace(0, -torch.log10(torch.tensor(condition)), rank, dtype=torch.float64)
    return (left * values) @ right.T * num_rows**0.5


def fit(base, instruct, equations):
    return fit_propagation(lambda ids: base[list(ids)], lambda ids: instruct[list(ids)], equations, "input matrix")


def write_out(equations, num_olds):
    """Return the dense matrix of the equations."""
    dense = torch.zeros(len(equations), num_olds, dtype=torch.float64)
    for row, olds in enumerate(equations):
        for old in olds:
            dense[row, old] += 1 / len(olds)
    return dense


def solve_by_lapack(base, instruct, equations):
    dense = write_out(equations, len(base))
    return torch.linalg.lstsq(dense @ base, dense @ instruct, driver="gelsy").solution


def draw_equations(num_olds, num_new, seed=0):
    draw = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 6, (num_new,), generator=draw).tolist()
    return [[at] for at in range(num_olds)] + [
        torch.randint(0, num_olds, (size,), generator=draw).tolist() for size in sizes
    ]


def distance(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("condition", [10.0, 1e3, 1e4])
def test_the_map_equals_that_of_lapack_at_the_conditions_of_real_embeddings(condition):
    base, instruct = make_rows(600, condition), make_rows(600, condition, seed=7)
    equations = draw_equations(600, 200)
    found = fit(base, instruct, equations)
    assert found.rank == WIDTH
    assert distance(found.weight_HH, solve_by_lapack(base, instruct, equations)) < 1e-16 * condition**2 * 100


def test_squares_in_fp32_would_not_do():
    base, instruct = make_rows(600, 1e4), make_rows(600, 1e4, seed=7)
    equations = draw_equations(600, 200)
    expected = solve_by_lapack(base, instruct, equations)
    x, y = (write_out(equations, 600) @ rows for rows in (base, instruct))
    single = torch.linalg.solve((x.float().T @ x.float()).double(), (x.float().T @ y.float()).double())
    assert distance(single, expected) > 0.1
    assert distance(fit(base, instruct, equations).weight_HH, expected) < 1e-6


def test_a_linear_image_is_recovered_from_stored_bf16_rows():
    base = make_rows(600, 1e4).bfloat16()
    matrix = draw(WIDTH, WIDTH, 3)
    found = fit(base, base.double() @ matrix, draw_equations(600, 200))
    assert distance(found.weight_HH, matrix) < 1e-6
    assert found.error < 1e-12


def test_dependent_columns_give_the_least_map_and_are_said(caplog):
    caplog.set_level(logging.WARNING, "megatron_adapt")
    base, instruct = make_rows(600, 100.0, rank=30), draw(600, WIDTH, 5)
    equations = draw_equations(600, 0)
    found = fit(base, instruct, equations)
    expected = torch.linalg.lstsq(base, instruct, driver="gelsy", rcond=1e-8).solution
    assert found.rank == 30
    assert distance(found.weight_HH, expected) < 1e-9
    assert "the rows of 600 tokens span 30 of 48 columns; what adapted rows have beyond them is lost" in caplog.text


def test_fewer_tokens_than_columns_give_the_least_map():
    base, instruct = draw(20, WIDTH, 1), draw(20, WIDTH, 2)
    found = fit(base, instruct, [[at] for at in range(20)])
    assert found.rank == 20
    assert distance(found.weight_HH, torch.linalg.pinv(base) @ instruct) < 1e-9
    assert found.error < 1e-12


def test_chunks_do_not_change_the_map_beyond_the_last_bits(monkeypatch):
    base, instruct = make_rows(600, 100.0), draw(600, WIDTH, 5)
    equations = draw_equations(600, 200)
    whole = fit(base, instruct, equations)
    monkeypatch.setattr(propagate_fit, "CHUNK_ROWS", 7)
    parts = fit(base, instruct, equations)
    assert distance(parts.weight_HH, whole.weight_HH) < 1e-11
    assert parts.error == pytest.approx(whole.error)


@settings(max_examples=50, deadline=None)
@given(num_olds=st.integers(30, 80), num_new=st.integers(0, 60), seed=st.integers(0, 1000))
def test_the_error_is_the_share_of_the_squares_that_is_left(num_olds, num_new, seed):
    base, instruct = draw(num_olds, 8, seed), draw(num_olds, 8, seed + 1)
    equations = draw_equations(num_olds, num_new, seed)
    found = fit(base, instruct, equations)
    dense = write_out(equations, num_olds)
    left = dense @ instruct - dense @ base @ found.weight_HH
    assert found.error == pytest.approx(float(left.square().sum() / (dense @ instruct).square().sum()), rel=1e-6)
    assert distance(found.weight_HH, solve_by_lapack(base, instruct, equations)) < 1e-8


def test_equations_are_those_of_the_paper():
    # Id 1 moved, 3 and 4 are new, 4 without old pieces; old id 2 means something else to the instruct model.
    id_map = IdMap(base_vocab_size=4, vocab_size=7, moved={1: 3, 5: 1, 6: 2}, pieces={3: [0, 0, 1], 4: []})
    assert list_equations(id_map, frozenset(), only_shared=False) == [[0], [3], [2], [0, 0, 1], [1], [2]]
    assert list_equations(id_map, frozenset({2}), only_shared=False) == [[0], [3], [0, 0, 1], [1]]
    assert list_equations(id_map, frozenset({1}), only_shared=False) == [[0], [3], [2], [2]]
    assert list_equations(id_map, frozenset({2}), only_shared=True) == [[0], [3], [1]]
