import numpy as np
import pytest
import torch

from megatron_adapt.errors import ConfigError
from megatron_adapt.vocab import linear
from megatron_adapt.vocab.linear import fit_map
from megatron_adapt.vocab.rotation import bound_rotation, bound_singular_values, find_rotation, scale_rotation

KINDS = ("ols", "ridge", "procrustes")


def fit(x, y, estimator="auto", seed=0, weights=None):
    options = {"estimator": estimator, "seed": seed, "where": "input matrix", "weights": weights}
    return fit_map(lambda at: (x[at], y[at]), len(x), **options)


def make_rows(num_rows, width, other, noise=0.0, seed=0):
    """Rows x with a mean, and their image under an affine map with noise."""
    torch.manual_seed(seed)
    x = torch.randn(num_rows, width, dtype=torch.float64) + 3
    matrix, bias = torch.randn(width, other, dtype=torch.float64), torch.randn(other, dtype=torch.float64)
    return x, x @ matrix + bias + noise * torch.randn(num_rows, other, dtype=torch.float64)


@pytest.mark.parametrize(("width", "other"), [(12, 8), (8, 8), (5, 9)])
@pytest.mark.parametrize("estimator", ["ols", "auto"])
def test_an_affine_image_is_recovered(width, other, estimator):
    x, y = make_rows(200, width, other)
    found = fit(x[:150], y[:150], estimator)
    assert torch.allclose(found.apply(x[150:]), y[150:], atol=1e-8)
    assert found.estimator == "ols"
    assert found.r2 == pytest.approx(1)


def test_least_squares_are_those_of_all_anchors_with_an_intercept():
    x, y = make_rows(90, 6, 4, noise=0.5)
    found = fit(x, y, "ols")
    design = np.hstack([x.numpy(), np.ones((90, 1))])
    expected = design @ np.linalg.lstsq(design, y.numpy(), rcond=None)[0]
    assert np.allclose(found.apply(x).numpy(), expected, atol=1e-10)


def test_ill_conditioned_anchors_that_fp32_squares_lose_are_fitted():
    torch.manual_seed(0)
    x = torch.randn(400, 20, dtype=torch.float64) * torch.logspace(0, -4, 20, dtype=torch.float64)
    x = x @ torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64)).Q
    matrix = torch.randn(20, 7, dtype=torch.float64)
    assert torch.allclose(fit(x, x @ matrix, "ols").weight, matrix, atol=1e-5)
    x32 = x.float()
    single = torch.linalg.solve(x32.T @ x32, x32.T @ (x32 @ matrix.float()))
    assert (single.double() - matrix).norm() > 0.01 * matrix.norm()


def test_columns_that_depend_on_each_other_give_the_least_map():
    x, y = make_rows(100, 4, 3, noise=0.1)
    x = torch.cat([x, x[:, :2] @ torch.randn(2, 3, dtype=torch.float64)], 1)
    found = fit(x, y, "ols")
    centred_x, centred_y = (rows.numpy() - rows.numpy().mean(0) for rows in (x, y))
    assert np.allclose(found.weight.numpy(), np.linalg.lstsq(centred_x, centred_y, rcond=1e-9)[0], atol=1e-6)


def test_ridge_is_the_closed_form_with_a_penalty_of_the_grid():
    x, y = make_rows(60, 30, 5, noise=3.0)
    found = fit(x, y, "ridge")
    assert found.penalty in linear._PENALTIES
    centred_x, centred_y = x - x.mean(0), y - y.mean(0)
    gram = centred_x.T @ centred_x
    penalised = gram + found.penalty * gram.trace() / 30 * torch.eye(30, dtype=torch.float64)
    assert torch.allclose(found.weight, torch.linalg.solve(penalised, centred_x.T @ centred_y), atol=1e-9)


@pytest.mark.parametrize("width", [6, 9])
def test_procrustes_finds_a_rotation_and_its_scale(width):
    torch.manual_seed(1)
    rotation = torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64)).Q[:width]
    x = torch.randn(80, width, dtype=torch.float64) + 1
    y = 2.5 * x @ rotation - 4
    found = fit(x, y, "procrustes")
    assert torch.allclose(found.weight, 2.5 * rotation, atol=1e-8)
    assert torch.allclose(found.apply(x), y, atol=1e-8)


def test_procrustes_onto_fewer_columns_has_the_best_scale():
    x, y = make_rows(80, 9, 4, noise=0.2)
    found = fit(x, y, "procrustes")

    def error(scale):
        return ((x - found.mean_x) @ (scale * found.weight) - (y - found.mean_y)).norm()

    assert error(1.0) <= min(error(0.99), error(1.01))


@pytest.mark.parametrize(("num_rows", "noise"), [(200, 0.0), (45, 4.0), (30, 1.0), (400, 1.0)])
def test_auto_takes_what_predicts_held_out_anchors_best(num_rows, noise):
    x, y = make_rows(num_rows, 24, 10, noise=noise, seed=num_rows)
    assert fit(x, y).r2 == pytest.approx(max(fit(x, y, kind).r2 for kind in KINDS if num_rows > 40 or kind != "ols"))


def test_auto_finds_a_rotation_where_least_squares_have_too_few_anchors():
    rotation = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64))[0]
    x = torch.randn(60, 40, dtype=torch.float64)
    assert fit(x, x @ rotation + 0.1 * torch.randn_like(x)).estimator == "procrustes"


def test_auto_does_not_compute_a_rotation_that_cannot_win(monkeypatch):
    x = torch.randn(300, 40, dtype=torch.float64)
    y = x @ torch.randn(40, 40, dtype=torch.float64)
    assert fit(x, y).r2 > fit(x, y, "procrustes").r2 + 0.1
    monkeypatch.setattr(linear, "find_rotation", None)
    assert fit(x, y).estimator == "ols"


@pytest.mark.parametrize(("width", "other"), [(64, 64), (40, 64)])
@pytest.mark.parametrize("noise", [0.0, 0.3, 1.0])
def test_a_rotation_hardly_exceeds_its_bound_on_anchors_it_has_not_seen(width, other, noise):
    for seed in range(5):
        torch.manual_seed(seed)
        x = torch.randn(500, width, dtype=torch.float64)
        y = x @ torch.linalg.qr(torch.randn(other, other, dtype=torch.float64))[0][:width]
        y += noise * y.std() * torch.randn_like(y)
        gram, cross = x[:300].T @ x[:300], x[:300].T @ y[:300]
        error = (y[300:] - x[300:] @ scale_rotation(find_rotation(cross), gram, cross)).square().sum()
        r2 = 1 - float(error / y[300:].square().sum())
        bound = bound_rotation(gram, cross, float(y[:300].square().sum()), 300)
        assert r2 - 0.02 < bound < r2 + 0.2


@pytest.mark.parametrize("decay", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("shape", [(64, 64), (64, 100), (200, 200), (3, 5), (1, 1)])
def test_the_bound_of_the_singular_values_lies_closely_above_their_sum(shape, decay):
    for seed in range(5):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        matrix *= torch.logspace(0, -decay, shape[0])[:, None]
        exact = float(torch.linalg.svdvals(matrix).sum())
        assert 0.98 * exact < bound_singular_values(matrix) < 1.6 * exact
    assert bound_singular_values(torch.zeros(4, 4, dtype=torch.float64)) == 0


def test_r2_is_that_of_anchors_the_judged_fit_has_not_seen():
    x, _ = make_rows(60, 40, 3)
    noise = torch.randn(60, 3, dtype=torch.float64)
    assert fit(x, noise, "ols").r2 < 0.2  # on the anchors it has seen it would be 0.7


def test_a_map_that_predicts_nothing_is_said_to(caplog):
    x, y = make_rows(60, 40, 3)
    fit(x, y, "ols")
    assert "no better than their mean" not in caplog.text
    fit(x, torch.randn(60, 3, dtype=torch.float64), "ols")
    assert "input matrix: the map predicts held-out rows no better than their mean does; look at the" in caplog.text


def test_with_fewer_anchors_than_columns_a_penalty_is_taken_or_least_squares_refused(caplog):
    x, y = make_rows(30, 40, 5)
    assert fit(x, y).estimator in ("ridge", "procrustes")
    assert "input matrix: only 27 shared tokens to fit 40 columns, so least squares take a penalty" in caplog.text
    with pytest.raises(
        ConfigError, match=r"ols needs more shared tokens than the donor has columns, .* 27 to fit 40; use"
    ):
        fit(x, y, "ols")


def test_the_same_seed_gives_the_same_map_and_chunks_change_nothing(monkeypatch):
    x, y = make_rows(100, 10, 5, noise=1.0)
    found = fit(x, y, seed=3)
    assert torch.equal(found.weight, fit(x, y, seed=3).weight)
    assert found.r2 != fit(x, y, seed=4).r2
    monkeypatch.setattr(linear, "_CHUNK_ANCHORS", 7)
    assert torch.allclose(found.weight, fit(x, y, seed=3).weight, atol=1e-10)


# ---------------------------------------------------------------- weights


def test_weighted_least_squares_are_those_of_scaled_anchors_with_an_intercept():
    x, y = make_rows(90, 6, 4, noise=0.5)
    weights = np.random.default_rng(0).uniform(0.1, 20, 90)
    design = np.hstack([x.numpy(), np.ones((90, 1))])
    roots = np.sqrt(weights)[:, None]
    expected = design @ np.linalg.lstsq(design * roots, y.numpy() * roots, rcond=None)[0]
    found = fit(x, y, "ols", weights=weights)
    assert np.allclose(found.apply(x).numpy(), expected, atol=1e-10)
    assert torch.allclose(found.weight, fit(x, y, "ols", weights=7 * weights).weight, atol=1e-10)


@pytest.mark.parametrize("estimator", ["ols", "procrustes"])
def test_an_anchor_that_weighs_twice_counts_as_two(estimator):
    x, y = make_rows(60, 5, 5, noise=1.0)
    weights = np.where(np.arange(60) < 20, 2.0, 1.0)
    twice = fit(torch.cat([x, x[:20]]), torch.cat([y, y[:20]]), estimator)
    assert torch.allclose(fit(x, y, estimator, weights=weights).apply(x), twice.apply(x), atol=1e-9)


def test_r2_weighs_held_out_anchors_as_the_fit_does():
    x, y = make_rows(400, 5, 4)
    y[:200] += 30 * torch.randn(200, 4, dtype=torch.float64)
    weights = np.where(np.arange(400) < 200, 1e-6, 1.0)
    assert fit(x, y, "ols", weights=weights).r2 > 0.99
    assert fit(x, y, "ols").r2 < 0.9


# ---------------------------------------------------------------- rotations


@pytest.mark.parametrize("shape", [(7, 7), (9, 4), (4, 9), (40, 40)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_rotation_is_that_of_the_singular_value_decomposition(shape, dtype):
    torch.manual_seed(3)
    cross = torch.randn(shape, dtype=dtype) * 1e5
    left, _, right = torch.linalg.svd(cross.double(), full_matrices=False)
    error = (find_rotation(cross).double() - left @ right).abs().max()
    assert error < (1e-10 if dtype == torch.float64 else 1e-3)


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_singular_products_give_a_rotation_all_the_same(rank):
    torch.manual_seed(rank)
    cross = torch.randn(12, rank, dtype=torch.float64) @ torch.randn(rank, 12, dtype=torch.float64)
    rotation = find_rotation(cross)
    assert torch.allclose(rotation.T @ rotation, torch.eye(12, dtype=torch.float64), atol=1e-8)
    # The best one: nothing is lost of the trace.
    assert (rotation * cross).sum() == pytest.approx(float(torch.linalg.svdvals(cross).sum()), abs=1e-6)
