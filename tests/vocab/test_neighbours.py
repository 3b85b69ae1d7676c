import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_adapt.vocab import neighbours
from megatron_adapt.vocab.neighbours import find_nearest, normalize_rows, weigh_by_softmax, weigh_by_sparsemax

SMALL_BLOCKS = (3, 8, 4)


@pytest.fixture(scope="module", params=[SMALL_BLOCKS, (1024, 8192, 32)], ids=["small blocks", "blocks as they are"])
def _blocks(request):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in zip(("_NUM_QUERIES", "_NUM_ANCHORS", "_NUM_GROUPED"), request.param, strict=True):
            patch.setattr(neighbours, name, value)
        yield


def at_angles(*cosines):
    """Return vectors of length 1 with these cosines to the first axis."""
    first = torch.tensor(cosines, dtype=torch.float64)
    return torch.stack([first, (1 - first.square()).sqrt()], 1).float()


def sparsemax(values):
    """Sort, as Martins and Astudillo write it."""
    ordered = np.sort(values)[::-1]
    totals = np.cumsum(ordered)
    size = np.flatnonzero(1 + np.arange(1, len(values) + 1) * ordered > totals)[-1] + 1
    return np.clip(values - (totals[size - 1] - 1) / size, 0, None)


def to_dense(mixtures, num_anchors):
    dense = np.zeros((len(mixtures.lengths), num_anchors))
    for at, (start, stop) in enumerate(zip(mixtures.starts[:-1], mixtures.starts[1:], strict=True)):
        dense[at, mixtures.numbers[start:stop]] = mixtures.weights[start:stop]
    return dense


# Whole numbers, so that every order of summation gives the same cosines, with many ties, duplicates and zero vectors.
@st.composite
def tables(draw):
    width = draw(st.integers(1, 3))
    row = st.lists(st.integers(-2, 2), min_size=width, max_size=width)
    queries, anchors = (draw(st.lists(row, min_size=1, max_size=most)) for most in (8, 40))
    return torch.tensor(queries, dtype=torch.float32), torch.tensor(anchors, dtype=torch.float32)


@pytest.mark.usefixtures("_blocks")
@given(tables(), st.integers(1, 50))
@settings(max_examples=100, deadline=None)
def test_the_nearest_are_those_of_the_whole_table_and_ties_go_to_the_lowest(table, num_neighbors):
    queries, anchors = table
    values, numbers = find_nearest(queries, anchors, num_neighbors)
    whole = (queries @ anchors.T).numpy()
    order = np.argsort(-whole, axis=1, kind="stable")[:, :num_neighbors]
    assert np.array_equal(numbers.numpy(), order)
    assert np.array_equal(values.numpy(), np.take_along_axis(whole, order, 1))


@pytest.mark.usefixtures("_blocks")
@given(tables(), st.sampled_from([0.05, 0.3, 1.0]))
@settings(max_examples=100, deadline=None)
def test_sparsemax_is_that_of_the_whole_table(table, scale):
    queries, anchors = table[0] * scale, table[1]
    dense = to_dense(weigh_by_sparsemax(queries, anchors), len(anchors))
    whole = (queries @ anchors.T).double().numpy()
    assert np.allclose(dense, [sparsemax(row) for row in whole], atol=1e-6)
    assert np.allclose(dense.sum(1), 1, atol=1e-5)


def test_many_blocks_of_real_size_agree_with_the_whole_table():
    torch.manual_seed(0)
    queries, anchors = (normalize_rows(torch.randn(num, 16))[1] for num in (1100, 2 * 8192 + 77))
    anchors[9000] = anchors[5]
    whole = queries @ anchors.T
    values, numbers = find_nearest(queries, anchors, 10)
    assert torch.allclose(values, whole.topk(10).values, atol=1e-6)
    assert torch.allclose(whole.gather(1, numbers), values, atol=1e-6)
    assert all(len(set(row)) == 10 for row in numbers.tolist())
    some = slice(None, None, 50)
    dense = to_dense(weigh_by_sparsemax(queries[some], anchors), len(anchors))
    for left, right in zip(dense, whole[some].double().numpy(), strict=True):
        assert np.allclose(left, sparsemax(right), atol=1e-5)


def test_weights_by_hand():
    # e^(0.9 / 0.1), e^(0.8 / 0.1) and e^(0.8 / 0.1) are as e : 1 : 1.
    e = np.e
    found = weigh_by_softmax(torch.tensor([[0.9, 0.8, 0.8]], dtype=torch.float64), 0.1)
    assert found[0].tolist() == pytest.approx([e / (e + 2), 1 / (e + 2), 1 / (e + 2)])
    # With threshold 0.3 the parts above it, 0.6 and 0.4, sum to 1.
    mixtures = weigh_by_sparsemax(at_angles(1.0), at_angles(0.7, -0.5, 0.9, 0.29))
    assert mixtures.numbers.tolist() == [0, 2]
    assert mixtures.weights.tolist() == pytest.approx([0.4, 0.6], abs=1e-6)
    # All alike: each the same, however many.
    alike = weigh_by_sparsemax(at_angles(1.0), at_angles(*[0.5] * 40))
    assert alike.weights.tolist() == pytest.approx([1 / 40] * 40, abs=1e-6)


def test_rows_without_a_direction_are_left_out_and_no_length_is_too_small_or_large():
    nan, inf = float("nan"), float("inf")
    rows = torch.tensor([[0.0, 0.0], [3.0, 4.0], [nan, 1.0], [3e-38, -4e-38], [inf, 0.0], [3e38, 0.0]])
    numbers, units = normalize_rows(rows)
    assert numbers.tolist() == [1, 3, 5]
    assert torch.allclose(units, torch.tensor([[0.6, 0.8], [0.6, -0.8], [1.0, 0.0]]), atol=1e-6)
    assert [len(part) for part in normalize_rows(torch.zeros(3, 0))] == [0, 0]
