"""Donors in folders: which tokens are the same, exact recovery, refusals."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_adapt.checkpoint.hf import HFFolder
from megatron_adapt.config import ResizeVocab, VocabSettings
from megatron_adapt.errors import CheckpointError, ConfigError, DataError
from megatron_adapt.tokenizer.learn import learn_base_tokenizer
from megatron_adapt.tokenizer.pieces import copy_tokenizer, read_tokenizer
from megatron_adapt.vocab.donor import list_surfaces
from megatron_adapt.vocab.resize import resize_vocab
from tests.helpers.tiny import write_byte_tokenizer, write_extended_tokenizer, write_llama
from tests.tokenizer.bases import SYLLABLES, learn_base

NEW = [("aa", "ab"), ("t", "h"), ("th", "e"), ("Ġ", "the")]
MATRICES = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture
def made(tmp_path):
    return write_extended_tokenizer(write_byte_tokenizer(tmp_path / "base", 300), tmp_path / "made", NEW)


def write_rows(folder, rows):
    """Put matrices into the one weights file of a model."""
    path = folder / "model.safetensors"
    save_file({**load_file(path), **{name: matrix.clone() for name, matrix in rows.items()}}, path, {"format": "pt"})


def write_donor(folder, tokenizer, rows, **settings):
    width = next(iter(rows.values())).shape[1]
    write_llama(folder, vocab_size=len(next(iter(rows.values()))), tokenizer=False, hidden_size=width, **settings)
    copy_tokenizer(tokenizer, folder)
    write_rows(folder, rows)
    return folder


def resize(tmp_path, model, made, donor, **settings):
    settings = VocabSettings(method="linear_transform", donor=donor, **settings)
    resize_vocab(ResizeVocab(model=model, tokenizer=made, output=tmp_path / "out", settings=settings))
    return HFFolder(tmp_path / "out")


def make_images(width, tied=False):
    """Rows of base and new tokens, and two affine images of another width."""
    torch.manual_seed(5)
    truth = {name: torch.randn(304, 32) for name in MATRICES[: 1 if tied else 2]}
    images = {}
    for name, rows in truth.items():
        spread = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64)).Q[:32]
        stretch = torch.linspace(0.3, 3, 32, dtype=torch.float64)[:, None]
        images[name] = (rows.double() @ (stretch * spread) + torch.randn(width)).float()
    return truth, images


@pytest.mark.parametrize("estimator", ["auto", "ols"])
@pytest.mark.parametrize("width", [32, 48])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_donor_that_is_a_linear_image_of_the_base_is_recovered(tmp_path, made, width, estimator, tied):
    truth, images = make_images(width, tied)
    model = write_llama(tmp_path / "model", tie_word_embeddings=tied)
    write_rows(model, {name: rows[:300] for name, rows in truth.items()})
    donor = write_donor(tmp_path / "donor", made, images, tie_word_embeddings=tied)
    after = resize(tmp_path, model, made, donor, estimator=estimator)
    for name, rows in truth.items():
        assert torch.equal(after.read(name)[:300], rows[:300])
        assert torch.allclose(after.read(name)[300:], rows[300:], atol=1e-5), name


def test_a_donor_with_tied_matrices_serves_both_matrices_each_by_its_own_map(tmp_path, made):
    truth, images = make_images(32)
    head = truth[MATRICES[0]] @ torch.linalg.qr(torch.randn(32, 32)).Q
    model = write_llama(tmp_path / "model")
    write_rows(model, {MATRICES[0]: truth[MATRICES[0]][:300], MATRICES[1]: head[:300]})
    donor = write_donor(tmp_path / "donor", made, {MATRICES[0]: images[MATRICES[0]]}, tie_word_embeddings=True)
    after = resize(tmp_path, model, made, donor)
    assert torch.allclose(after.read(MATRICES[0])[300:], truth[MATRICES[0]][300:], atol=1e-4)
    assert torch.allclose(after.read(MATRICES[1])[300:], head[300:], atol=1e-4)


def test_tokens_that_the_donor_lacks_take_the_mean_of_their_pieces_and_are_counted(tmp_path, made, caplog):
    model = write_llama(tmp_path / "model")
    shorter = write_extended_tokenizer(tmp_path / "base", tmp_path / "shorter", NEW[:2])
    donor = write_donor(tmp_path / "donor", shorter, {name: torch.randn(302, 24) for name in MATRICES})
    after = resize(tmp_path, model, made, donor)
    pieces = json.loads((made / "added_pieces.json").read_text())["pieces"]
    for name in MATRICES:
        old = HFFolder(model).read(name)
        for new in (302, 303):
            assert torch.allclose(after.read(name)[new], old[pieces[str(new)]].mean(0), atol=1e-6)
        assert not torch.allclose(after.read(name)[301], old[pieces["301"]].mean(0), atol=1e-2)
    for matrix in ("input matrix", "output head"):
        assert f"{matrix}: 2 of 4 new tokens have no row by linear_transform; 2 take the mean" in caplog.text


def test_surface_forms_do_not_depend_on_the_family_and_leave_bytes_and_special_tokens_out(tmp_path):
    byte_level, pieces = (list_surfaces(learn_base(tmp_path / kind, kind)) for kind in ("byte_level", "sentencepiece"))
    for forms in (byte_level, pieces):
        assert (True, "the") in forms
        assert (False, "the") not in forms or forms[False, "the"] != forms[True, "the"]
        assert not {text for _, text in forms} & {"<s>", "</s>", "<unk>", "<0x41>"}
    tokenizer = read_tokenizer(tmp_path / "sentencepiece")
    assert tokenizer.tokenizer.token_to_id("<0x41>") not in pieces.values()
    assert len(byte_level.keys() & pieces.keys()) > 50
    assert not {form for form in byte_level if "\ufffd" in form[1]}


# ---------------------------------------------------------------- refusals


def test_without_shared_tokens_the_donor_is_refused(tmp_path, made):
    texts = ["".join(SYLLABLES["ja"][at:]) for at in range(12)] * 20
    learn_base_tokenizer(texts, 300, "sentencepiece", tmp_path / "ja")
    size = read_tokenizer(tmp_path / "ja").vocab_size
    donor = write_donor(tmp_path / "donor", tmp_path / "ja", {name: torch.randn(size, 24) for name in MATRICES})
    with pytest.raises(
        CheckpointError, match=r"donor: shares \d tokens with .*model, too few to fit a map; name a donor"
    ):
        resize(tmp_path, write_llama(tmp_path / "model"), made, donor)
    assert not (tmp_path / "out").exists()


def test_fewer_anchors_than_columns_are_refused_by_least_squares_and_fitted_with_a_penalty(tmp_path, made, caplog):
    model = write_llama(tmp_path / "model")
    donor = write_donor(tmp_path / "donor", made, {name: torch.randn(304, 512) for name in MATRICES})
    with pytest.raises(
        ConfigError, match=r"ols needs more shared tokens than the donor has columns, and (input|output) .* has 153 to"
    ):
        resize(tmp_path, model, made, donor, estimator="ols")
    after = resize(tmp_path, model, made, donor)
    assert after.read(MATRICES[0]).isfinite().all()
    assert "shared tokens to fit 512 columns, so least squares take a penalty (ridge)" in caplog.text


def test_a_donor_whose_tokenizer_does_not_fit_its_matrix_is_refused(tmp_path, made):
    donor = write_llama(tmp_path / "donor", vocab_size=303, tokenizer=False)
    copy_tokenizer(made, donor)
    message = r"donor: its tokenizer has 304 tokens, model\.embed_tokens\.weight only 303 rows; name a donor with"
    with pytest.raises(CheckpointError, match=message):
        resize(tmp_path, write_llama(tmp_path / "model"), made, donor)


@pytest.mark.parametrize("index", [270, 302], ids=["shared", "new"])
def test_a_damaged_row_of_the_donor_is_named(tmp_path, made, index):
    rows = {name: torch.randn(304, 24) for name in MATRICES}
    rows["lm_head.weight"][index, 3] = float("nan")
    donor = write_donor(tmp_path / "donor", made, rows)
    token = read_tokenizer(made).tokenizer.id_to_token(index)
    message = f"donor: row {index} ({token!r}) of lm_head.weight holds NaN or infinity; mend the donor"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        resize(tmp_path, write_llama(tmp_path / "model"), made, donor)
    assert not (tmp_path / "out").exists()


def test_a_damaged_row_of_the_base_is_named(tmp_path, made):
    model = write_llama(tmp_path / "model")
    rows = load_file(model / "model.safetensors")[MATRICES[0]]
    rows[270] = float("inf")
    write_rows(model, {MATRICES[0]: rows})
    donor = write_donor(tmp_path / "donor", made, {name: torch.randn(304, 24) for name in MATRICES})
    with pytest.raises(CheckpointError, match=r"input matrix: row 270 \('am'\) holds NaN or infinity; mend the model"):
        resize(tmp_path, model, made, donor)


def test_a_folder_without_weights_or_tokenizer_is_no_donor(tmp_path, made):
    model = write_llama(tmp_path / "model")
    with pytest.raises(CheckpointError, match="nowhere"):
        resize(tmp_path, model, made, tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"holds no tokenizer\.json"):
        resize(tmp_path, model, made, write_llama(tmp_path / "donor", tokenizer=False))


def test_a_model_without_its_tokenizer_has_no_anchors(tmp_path, made):
    model = write_llama(tmp_path / "model", tokenizer=False)
    donor = write_donor(tmp_path / "donor", made, {name: torch.randn(304, 24) for name in MATRICES})
    with pytest.raises(ConfigError, match="linear_transform reads the model's own tokenizer, and none travels with it"):
        resize(tmp_path, model, made, donor)
