import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_adapt.checkpoint.hf import HFFolder
from megatron_adapt.config import VocabSettings
from megatron_adapt.tokenizer.pieces import read_tokenizer
from megatron_adapt.vocab import omp
from megatron_adapt.vocab.donor import list_surfaces
from megatron_adapt.vocab.fill import count_fill_bytes
from megatron_adapt.vocab.omp import Dictionary, combine_atoms
from tests.helpers.tiny import write_llama
from tests.vocab.donors import MATRICES, resize, write_donor, write_made


def pursue(atoms, targets, num_atoms):
    """Return what Batch-OMP makes of the targets, and the numbers of the atoms."""
    index, weights = Dictionary(atoms).pursue(targets, num_atoms)
    return combine_atoms(atoms, index, weights), [
        {at for at, weight in zip(*row, strict=True) if weight}
        for row in zip(index.tolist(), weights.tolist(), strict=True)
    ]


def pursue_one(atoms, target, num_atoms):
    """Orthogonal matching pursuit of one row, by its definition, in fp64."""
    atoms, target, chosen = atoms.double(), target.double(), []
    units = torch.nn.functional.normalize(atoms, dim=1)
    left = target
    for _ in range(min(num_atoms, len(atoms))):
        if left.norm() <= 1e-5 * target.norm():
            break
        nearest = int((units @ left).abs().argmax())
        beside = units[nearest] - units[nearest] @ torch.linalg.pinv(units[chosen]) @ units[chosen] if chosen else left
        if beside.square().sum() <= 1e-5:  # as good as dependent
            break
        chosen.append(nearest)
        weights = torch.linalg.lstsq(atoms[chosen].T, target[:, None], driver="gelsd").solution[:, 0]
        left = target - weights @ atoms[chosen]
    return target - left, set(chosen)


@given(st.integers(1, 9), st.integers(1, 60), st.integers(2, 40), st.integers(1, 12), st.integers(0, 999))
@settings(max_examples=80, deadline=None)
def test_batches_equal_the_pursuit_of_each_row_by_its_definition(num_new, num_atoms, width, most, seed):
    draw = torch.Generator().manual_seed(seed)
    atoms = torch.randn(num_atoms, width, generator=draw) * torch.rand(num_atoms, 1, generator=draw).add(0.1)
    targets = torch.randn(num_new, width, generator=draw)
    found, chosen = pursue(atoms, targets, most)
    for at, target in enumerate(targets):
        expected, numbers = pursue_one(atoms, target, most)
        # Where nearly all columns are spanned, correlations at the edge of fp32 stand for much that is left.
        is_sparse = len(numbers) < width // 2
        assert torch.allclose(found[at].double(), expected, atol=1e-4 if is_sparse else 5e-3)
        assert chosen[at] == numbers or not is_sparse


def test_blocks_of_the_gram_matrix_change_nothing(monkeypatch):
    torch.manual_seed(0)
    atoms, targets = torch.randn(50, 16), torch.randn(9, 16)
    whole, chosen = pursue(atoms, targets, 6)
    monkeypatch.setattr(omp, "_BLOCK_COLUMNS", 7)
    found, again = pursue(atoms, targets, 6)
    assert chosen == again
    assert torch.allclose(found, whole, atol=1e-6)
    assert torch.allclose(torch.cat([pursue(atoms, part, 6)[0] for part in targets.split(2)]), whole, atol=1e-6)


def test_exact_sums_of_a_few_atoms_are_recovered():
    torch.manual_seed(1)
    atoms = torch.randn(300, 128)
    index = torch.stack([torch.randperm(300)[:5] for _ in range(20)])
    weights = torch.randn(20, 5).sign() * (1 + torch.rand(20, 5))
    targets = combine_atoms(atoms, index, weights)
    found, chosen = pursue(atoms, targets, 32)
    assert torch.allclose(found, targets, atol=1e-4)
    assert [len(numbers) for numbers in chosen] == [5] * 20
    assert chosen == [set(numbers) for numbers in index.tolist()]


def test_the_nearest_in_angle_is_taken_not_the_longest():
    atoms = torch.tensor([[9.0, 9.0], [0.1, 0.0]])
    assert pursue(atoms, torch.tensor([[1.0, 0.2]]), 1)[1] == [{1}]


def test_equal_atoms_are_one_and_the_lowest_is_taken():
    torch.manual_seed(2)
    atoms = torch.randn(12, 30)
    twice = torch.cat([atoms, atoms, 3 * atoms, atoms * (1 + 1e-6)])
    targets = torch.randn(6, 30)
    found, chosen = pursue(twice, targets, 40)
    expected, _ = pursue(atoms, targets, 12)
    assert torch.allclose(found, expected, atol=1e-5)
    assert all(len({at % 12 for at in numbers}) == len(numbers) == 12 for numbers in chosen)


def test_zero_rows_are_no_atoms_and_have_no_row():
    atoms = torch.cat([torch.zeros(5, 4), torch.eye(4)])
    found, chosen = pursue(atoms, torch.tensor([[0.0, 0, 0, 0], [1, 2, 0, 0]]), 6)
    assert torch.allclose(found, torch.tensor([[0.0, 0, 0, 0], [1, 2, 0, 0]]))
    assert chosen == [set(), {5, 6}]
    assert not pursue(torch.zeros(3, 4), torch.ones(2, 4), 2)[0].any()


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_scale_of_the_donor_does_not_matter(scale):
    torch.manual_seed(3)
    atoms, targets = torch.randn(40, 16), torch.randn(5, 16)
    found, chosen = pursue(atoms, targets, 8)
    scaled, again = pursue(atoms * scale, targets * scale, 8)
    assert chosen == again
    assert torch.allclose(scaled / scale, found, atol=1e-5)


# ---------------------------------------------------------------- models


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_donor_that_is_the_base_gives_its_own_rows(tmp_path, tied):
    torch.manual_seed(6)
    made = write_made(tmp_path)
    model = write_llama(tmp_path / "model", tie_word_embeddings=tied)
    images = {}
    for name in MATRICES[: 1 if tied else 2]:
        images[name] = torch.cat([HFFolder(model).read(name), torch.randn(4, 32)])
    donor = write_donor(tmp_path / "donor", made, images, tie_word_embeddings=tied)
    after = resize(tmp_path, model, made, donor, "omp")
    for name, image in images.items():
        assert torch.equal(after.read(name)[:300], image[:300])
        # 32 of the 64 atoms span all columns.
        assert torch.allclose(after.read(name)[300:], image[300:], atol=1e-5)


def test_coefficients_of_the_donors_rows_are_applied_to_the_bases(tmp_path):
    torch.manual_seed(7)
    made = write_made(tmp_path)
    model = write_llama(tmp_path / "model")
    images = {name: torch.randn(304, 48) for name in MATRICES}
    donor = write_donor(tmp_path / "donor", made, images)
    after = resize(tmp_path, model, made, donor, "omp", num_atoms=5)
    shared = [index for index in list_surfaces(read_tokenizer(made)).values() if index < 300]
    for name, image in images.items():
        old = HFFolder(model).read(name)
        index, weights = Dictionary(image[shared]).pursue(image[300:], 5)
        assert index.shape == (4, 5)
        expected = torch.einsum("nk,nkh->nh", weights, old[shared][index])
        assert torch.allclose(after.read(name)[300:], expected, atol=1e-5)


def test_of_too_many_shared_tokens_those_with_the_lowest_ids_are_atoms(tmp_path, monkeypatch, caplog):
    torch.manual_seed(8)
    monkeypatch.setattr(omp, "_MAX_ATOMS", 30)
    caplog.set_level("INFO")
    made = write_made(tmp_path)
    model = write_llama(tmp_path / "model")
    images = {name: torch.randn(304, 16) for name in MATRICES}
    after = resize(tmp_path, model, made, write_donor(tmp_path / "donor", made, images), "omp", num_atoms=3)
    shared = [index for index in list_surfaces(read_tokenizer(made)).values() if index < 300]
    assert f"input matrix: the 30 of {len(shared)} shared tokens with the lowest ids are atoms" in caplog.text
    old = HFFolder(model).read(MATRICES[0])[shared[:30]]
    index, weights = Dictionary(images[MATRICES[0]][shared[:30]]).pursue(images[MATRICES[0]][300:], 3)
    assert torch.allclose(after.read(MATRICES[0])[300:], combine_atoms(old, index, weights), atol=1e-5)


def test_an_estimate_counts_the_gram_matrix_of_the_most_atoms():
    settings = VocabSettings(method="omp", donor=Path("donor"))
    assert 2**30 < count_fill_bytes(settings, {}, 4096, 2) < 4 * 2**30
    assert count_fill_bytes(dataclasses.replace(settings, method="clp"), {}, 4096, 2) < 2**30
