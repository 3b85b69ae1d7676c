"""Rows of ``similarity_topk``: the right weights on the right rows, the same for both matrices."""

import numpy as np
import pytest
import torch

from megatron_adapt.vocab.fill import count_fill_bytes, plan_fill
from megatron_adapt.vocab.mixtures import MAX_USED
from megatron_adapt.vocab.similarity import plan_similarity_topk
from tests.vocab.matrices import Rows, collect
from tests.vocab.pairs import make_pair, make_pair_sources, name_tokens

WORDS = "dog 1 0\nhund 0.8 0.6\ncat 0 2\n"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def path(tmp_path):
    (tmp_path / "x.vec").write_text(WORDS)
    return tmp_path / "x.vec"


def fill_weights(pair, **settings):
    """Fill from an identity matrix, so that rows are weights: {new piece: {old piece: weight}}."""
    own, made = pair
    sources = make_pair_sources(pair, method="similarity_topk", **settings)
    ids, rows = collect(plan_similarity_topk(sources), Rows(torch.eye(own.vocab_size)))
    assert ids == list(sources.id_map.pieces)
    return {
        name: {old: float(weight) for old, weight in zip(name_tokens(own, range(len(row))), row, strict=True) if weight}
        for name, row in zip(name_tokens(made, ids), rows, strict=True)
    }


def test_the_nearest_old_tokens_weigh_the_softmax_of_their_cosines(pair, path):
    # h, u and n are in "hund" alone; d is in "dog", and in "hund", the second word.
    d = np.array([1 + 0.8 / 2, 0.6 / 2])
    n_cosine, d_cosine = 1.0, float(d @ [0.8, 0.6] / np.linalg.norm(d))
    weights = np.exp(np.array([n_cosine, n_cosine, n_cosine, d_cosine]) / 0.5)
    found = fill_weights(pair, vectors=path, num_neighbors=4, temperature=0.5)
    for name in ("hu", "hun", "hund", "Ġhund"):
        expected = dict(zip("hund", weights / weights.sum(), strict=True))
        assert found[name] == pytest.approx(expected, abs=1e-6)
    assert found["car"] == found["Ð´"] == {}


def test_with_one_neighbour_the_row_is_that_of_the_lowest_id_among_equals(pair, path):
    found = fill_weights(pair, vectors=path, num_neighbors=1)
    assert found["hund"] == {"h": 1.0}
    everything = fill_weights(pair, vectors=path, num_neighbors=1000)
    assert len(everything["hund"]) == 15
    assert sum(everything["hund"].values()) == pytest.approx(1)


def test_input_and_head_take_the_same_weights_and_vectors_are_made_once(pair, path, caplog, monkeypatch):
    sources = make_pair_sources(pair, method="similarity_topk", vectors=path)
    fill = plan_fill(sources)
    torch.manual_seed(0)
    first, second = torch.randn(2, pair[0].vocab_size, 5)
    _, rows = collect(fill, Rows(first))
    path.unlink()
    _, head = collect(fill, Rows(second, is_head=True))
    weights = fill_weights_of(sources, path)
    assert torch.allclose(rows[:4], (weights @ first)[:4], atol=1e-6)
    assert torch.allclose(head[:4], (weights @ second)[:4], atol=1e-6)
    for matrix in ("input matrix", "output head"):
        assert f"{matrix}: 2 of 6 new tokens have no row by similarity_topk; 2 take the mean of their" in caplog.text


def fill_weights_of(sources, path):
    path.write_text(WORDS)
    return collect(plan_similarity_topk(sources), Rows(torch.eye(sources.id_map.base_vocab_size)))[1]


def test_the_estimate_counts_the_old_rows_that_are_held(pair, path):
    sources = make_pair_sources(pair, method="similarity_topk", vectors=path)
    counted = count_fill_bytes(sources.settings, sources.id_map.pieces, 4096, 2)
    assert MAX_USED * 6 * 4096 < counted < 1.5 * MAX_USED * 6 * 4096
