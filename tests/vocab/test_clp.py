import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_adapt.checkpoint.hf import HFFolder
from megatron_adapt.tokenizer.pieces import read_tokenizer
from megatron_adapt.vocab import clp
from megatron_adapt.vocab.clp import average_by_cosine
from megatron_adapt.vocab.donor import list_surfaces
from tests.helpers.tiny import write_llama
from tests.vocab.donors import MATRICES, resize, write_donor, write_made


def average(targets, theirs, rows):
    return average_by_cosine(targets, lambda at: (theirs[at], rows[at]), len(rows))


def average_one(target, theirs, rows):
    """Compute one row in Python floats."""
    weights = []
    for other in theirs:
        lengths = math.hypot(*target.tolist()) * math.hypot(*other.tolist())
        product = sum(a * b for a, b in zip(target.tolist(), other.tolist(), strict=True))
        weights.append(max(0.0, product / lengths) if lengths else 0.0)
    total = sum(weights)
    return [
        sum(weight * value for weight, value in zip(weights, column, strict=True)) / total if total else 0.0
        for column in rows.T.tolist()
    ]


@given(st.integers(1, 12), st.integers(1, 30), st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_rows_are_the_means_weighted_by_cosines_that_are_positive(num_new, num_anchors, width, other, seed):
    draw = torch.Generator().manual_seed(seed)
    targets, theirs = (torch.randn(size, width, generator=draw) for size in (num_new, num_anchors))
    rows = torch.randn(num_anchors, other, generator=draw)
    theirs[:1] = 0
    expected = torch.tensor([average_one(target, theirs, rows) for target in targets])
    assert torch.allclose(average(targets, theirs, rows), expected, atol=1e-5)


def test_weights_whose_signed_sum_is_nearly_zero_give_a_row_between_the_anchors():
    target, theirs = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.001], [-1.0, 0.0], [0.5, 5.0]])
    rows = torch.tensor([[1.0], [-7.0], [2.0]])
    found = average(target, theirs, rows)
    assert 1 < found < 1.2  # signed weights sum to 0.1, and their mean is 82


def test_lengths_of_donor_rows_do_not_matter_even_where_squares_overflow():
    torch.manual_seed(0)
    targets, theirs, rows = torch.randn(3, 4), torch.randn(9, 4), torch.randn(9, 5)
    scales = torch.logspace(-25, 30, 9)[:, None]
    assert torch.allclose(average(targets * 1e25, theirs * scales, rows), average(targets, theirs, rows), atol=1e-5)


def test_a_row_without_a_positive_cosine_is_left_to_the_fallback():
    found = average(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[-1.0, 0.0], [0.0, 2.0]]), torch.ones(2, 3))
    assert not found.any()


def test_chunks_of_anchors_and_of_new_tokens_change_nothing(monkeypatch):
    torch.manual_seed(0)
    targets, theirs, rows = torch.randn(20, 8), torch.randn(50, 8), torch.randn(50, 6)
    whole = average(targets, theirs, rows)
    monkeypatch.setattr(clp, "CHUNK_ROWS", 7)
    assert torch.allclose(average(targets, theirs, rows), whole, atol=1e-6)
    assert torch.allclose(torch.cat([average(part, theirs, rows) for part in targets.split(3)]), whole, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_input_rows_are_weighed_by_the_donors_input_rows_and_the_head_by_its_head(tmp_path, tied):
    torch.manual_seed(6)
    made = write_made(tmp_path)
    model = write_llama(tmp_path / "model", tie_word_embeddings=tied)
    images = {name: torch.randn(304, 24) for name in MATRICES[: 1 if tied else 2]}
    donor = write_donor(tmp_path / "donor", made, images, tie_word_embeddings=tied)
    after = resize(tmp_path, model, made, donor, "clp")
    shared = [index for index in list_surfaces(read_tokenizer(made)).values() if index < 300]
    assert 150 < len(shared) < 300  # without bytes that are no text, and special tokens
    for name, image in images.items():
        old = HFFolder(model).read(name)
        assert torch.equal(after.read(name)[:300], old)
        assert torch.allclose(after.read(name)[300:], average(image[300:], image[shared], old[shared]), atol=1e-6)
