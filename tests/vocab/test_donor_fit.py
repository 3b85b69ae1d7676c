"""What a donor shares, and a map judged on tokens it did not see."""

import numpy as np
import pytest
import torch

from megatron_adapt.checkpoint.hf import HFFolder
from megatron_adapt.errors import CheckpointError
from megatron_adapt.tokenizer.pieces import read_tokenizer
from megatron_adapt.vocab.census import Census
from megatron_adapt.vocab.donor_fit import describe_overlap, judge_map, open_donor
from megatron_adapt.vocab.resize import MatrixRows
from tests.helpers.tiny import write_byte_tokenizer, write_extended_tokenizer, write_llama
from tests.vocab.donors import MATRICES, NEW, write_donor, write_rows

NUM_SURFACES = 128 + 42  # of 300 base tokens: those that are whole characters, special ones aside


@pytest.fixture
def census(tmp_path):
    base = write_byte_tokenizer(tmp_path / "base", 300)
    made = write_extended_tokenizer(base, tmp_path / "made", NEW)
    return Census.of(read_tokenizer(base), read_tokenizer(made))


def make_donor(tmp_path, census, image, merges=NEW[:3]):
    """A donor that has three of the four new tokens, and one of its own."""
    tokenizer = write_extended_tokenizer(census.base.folder, tmp_path / "theirs", [*merges, ("q", "q")])
    num_rows = 300 + len(merges) + 1
    return write_donor(tmp_path / "donor", tokenizer, dict.fromkeys(MATRICES, image[:num_rows]))


def open_base(tmp_path, rows_VH):
    folder = write_llama(tmp_path / "model")
    write_rows(folder, dict.fromkeys(MATRICES, rows_VH))
    return MatrixRows(HFFolder(folder), MATRICES[0], 300)


def test_shared_tokens_and_those_the_donor_has_are_counted(tmp_path, census):
    overlap = open_donor(make_donor(tmp_path, census, torch.randn(310, 24)), census)
    # The letter pairs hold "ab", so that of the donor's own four tokens "qq" alone is not new.
    expected = {"tokens": NUM_SURFACES + 4, "shared": NUM_SURFACES, "new_in_donor": 3 / 4}
    assert describe_overlap(overlap, census, None) == {**expected, "new_in_donor_by_occurrence": None}
    frequency = np.zeros(304, np.int64)
    assert describe_overlap(overlap, census, frequency)["new_in_donor_by_occurrence"] is None
    frequency[[5, 300, 303]] = [50, 6, 4]
    assert describe_overlap(overlap, census, frequency)["new_in_donor_by_occurrence"] == 0.6


def test_a_linear_image_is_predicted_and_noise_is_not(tmp_path, census):
    generator = torch.Generator().manual_seed(0)
    rows_VH = torch.randn(300, 32, generator=generator)
    image = torch.randn(310, 48, generator=generator)
    image[:300] = rows_VH @ torch.randn(32, 48, generator=generator) + 3
    base = open_base(tmp_path, rows_VH)
    found = judge_map(open_donor(make_donor(tmp_path, census, image), census), base)
    assert (found["fitted"], found["held_out"]) == (153, 17)
    assert found["r2"] == pytest.approx(1, abs=1e-6)
    assert found["mean_cosine"] == pytest.approx(1, abs=1e-6)
    noise = open_donor(make_donor(tmp_path, census, torch.randn(310, 48, generator=generator)), census)
    found = judge_map(noise, base)
    assert found["r2"] < 0.3
    assert abs(found["mean_cosine"]) < 0.3


def test_half_noise_is_predicted_by_half_and_its_cosine_is_the_root(tmp_path, census):
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(310, 4, generator=generator)
    rows_VH = torch.zeros(300, 32)
    rows_VH[:, :4] = image[:300] @ torch.linalg.qr(torch.randn(4, 4, generator=generator)).Q
    rows_VH[:, 4:8] = torch.randn(300, 4, generator=generator)
    overlap = open_donor(make_donor(tmp_path, census, image), census)
    found = judge_map(overlap, open_base(tmp_path, rows_VH))
    assert found["r2"] == pytest.approx(0.5, abs=0.15)
    assert found["mean_cosine"] == pytest.approx(0.5**0.5, abs=0.15)


def test_rows_that_are_all_alike_have_no_variance_to_predict(tmp_path, census):
    overlap = open_donor(make_donor(tmp_path, census, torch.randn(310, 24)), census)
    found = judge_map(overlap, open_base(tmp_path, torch.ones(300, 32)))
    assert found["r2"] is None
    assert found["mean_cosine"] == pytest.approx(1)


def test_a_donor_that_is_no_model_is_refused(tmp_path, census):
    with pytest.raises(CheckpointError, match=r"nowhere: neither model.safetensors nor"):
        open_donor(tmp_path / "nowhere", census)
