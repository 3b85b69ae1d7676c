"""Linear maps from donors in folders: which tokens are the same, exact recovery, weights; refusals of all donors."""

import json
import re
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_adapt.checkpoint.hf import HFFolder
from megatron_adapt.config import BuildTokenizer, TokenizerSettings
from megatron_adapt.errors import CheckpointError, ConfigError, DataError
from megatron_adapt.tokenizer.build import build_tokenizer
from megatron_adapt.tokenizer.id_map import read_id_map
from megatron_adapt.tokenizer.learn import learn_base_tokenizer
from megatron_adapt.tokenizer.pieces import copy_tokenizer, read_tokenizer
from megatron_adapt.vocab.donor import list_surfaces
from megatron_adapt.vocab.linear import fit_map
from tests.helpers.tiny import write_extended_tokenizer, write_llama
from tests.tokenizer.bases import SYLLABLES, learn_base, make_texts, write_corpus
from tests.vocab.donors import MATRICES, NEW, resize, write_donor, write_made, write_rows

METHODS = ("linear_transform", "clp", "omp")


@pytest.fixture
def made(tmp_path):
    return write_made(tmp_path)


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


@pytest.mark.parametrize("base_kind", ["byte_level", "sentencepiece"])
@pytest.mark.parametrize("donor_kind", ["byte_level", "sentencepiece"])
def test_an_adopted_tokenizer_keeps_shared_rows_bit_by_bit_and_maps_all_others(tmp_path, base_kind, donor_kind):
    base = learn_base(tmp_path / "base", base_kind)
    texts = [*make_texts("ru", 200), *make_texts("en", 200)]
    learn_base_tokenizer(texts, 600, donor_kind, tmp_path / "donor_tokenizer")
    theirs = read_tokenizer(tmp_path / "donor_tokenizer")
    build_tokenizer(
        BuildTokenizer(
            base=base.folder,
            corpus=(write_corpus(tmp_path / "ru.jsonl", make_texts("ru", 50)),),
            output=tmp_path / "adopted",
            settings=TokenizerSettings(method="transplant", donor=theirs.folder, adopt=True),
        )
    )
    adopted = read_tokenizer(tmp_path / "adopted")
    torch.manual_seed(2)
    model = write_llama(tmp_path / "model", vocab_size=base.vocab_size, tokenizer=False)
    copy_tokenizer(base.folder, model)
    before = HFFolder(model).read(MATRICES[0])
    # In the space of the base, a row for every token of the donor: shared ones have the base's own.
    truth, (old_ids, donor_ids) = torch.randn(theirs.vocab_size, 32), map(list_surfaces, (base, theirs))
    for form in old_ids.keys() & donor_ids.keys():
        truth[donor_ids[form]] = before[old_ids[form]]
    image = (truth.double() @ torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64)).Q[:32] + 2).float()
    write_rows(model, {MATRICES[1]: before})
    donor = write_donor(tmp_path / "donor", theirs.folder, dict.fromkeys(MATRICES, image))
    after, id_map = resize(tmp_path, model, adopted.folder, donor, estimator="ols"), read_id_map(adopted)
    kept = [new for new in range(adopted.vocab_size) if id_map.old_id(new) is not None]
    mapped = {new: donor_ids[form] for form, new in list_surfaces(adopted).items() if new in id_map.pieces}
    assert len(kept) > 250
    assert len(mapped) > 150
    assert len(mapped) > 0.7 * len(id_map.pieces)  # the others are bytes, parts of characters, special tokens
    for name in MATRICES:
        rows = after.read(name)
        assert len(rows) == adopted.vocab_size
        assert torch.equal(rows[kept], before[[id_map.old_id(new) for new in kept]])
        assert torch.allclose(rows[list(mapped)], truth[list(mapped.values())], atol=1e-5)


def test_frequent_tokens_weigh_more_by_the_root_of_their_count_in_the_corpus_as_the_new_tokenizer_cuts_it(
    tmp_path, made, caplog
):
    torch.manual_seed(4)
    model = write_llama(tmp_path / "model")
    image = torch.randn(304, 16)
    donor = write_donor(tmp_path / "donor", made, dict.fromkeys(MATRICES, image))
    texts = ["aa the ab ab ab ac", "the " * 500 + "az" * 40]
    corpus = write_corpus(tmp_path / "x.jsonl", texts)
    caplog.set_level("INFO")
    after = resize(tmp_path, model, made, donor, corpus=(corpus,), anchor_weights="frequency", estimator="ols")
    tokenizer = read_tokenizer(made)
    counts = Counter(
        index for text in texts for index in tokenizer.tokenizer.encode(text, add_special_tokens=False).ids
    )
    shared = np.array([index for index in list_surfaces(tokenizer).values() if index < 300])
    weights = np.sqrt([1 + counts[index] for index in shared.tolist()])
    assert weights.max() > 6
    old = HFFolder(model).read(MATRICES[0]).double()
    expected, plain = (
        fit_map(
            lambda at: (image[shared[at]].double(), old[shared[at]]),
            *(len(shared),),
            **{"estimator": "ols", "seed": 1234, "where": "x", "weights": some},
        ).apply(image[300:])
        for some in (weights, None)
    )
    assert torch.allclose(after.read(MATRICES[0])[300:].double(), expected, atol=1e-5)
    assert not torch.allclose(expected, plain, atol=1e-3)
    seen = sum(counts[index] > 0 for index in shared.tolist())
    assert f"{seen} of {len(shared)} shared tokens occur in the corpus" in caplog.text
    assert caplog.text.count("shared tokens occur in the corpus") == 1  # for both matrices


# ---------------------------------------------------------------- refusals


def test_an_empty_corpus_weighs_nothing_and_is_refused(tmp_path, made):
    donor = write_donor(tmp_path / "donor", made, {name: torch.randn(304, 16) for name in MATRICES})
    corpus = write_corpus(tmp_path / "x.jsonl", [])
    with pytest.raises(DataError, match="corpus: no text in it to count shared tokens in; name documents in the new"):
        resize(
            *(tmp_path, write_llama(tmp_path / "model"), made, donor),
            **{"corpus": (corpus,), "anchor_weights": "frequency"},
        )


@pytest.mark.parametrize("method", METHODS)
def test_without_shared_tokens_the_donor_is_refused(tmp_path, made, method):
    texts = ["".join(SYLLABLES["ja"][at:]) for at in range(12)] * 20
    learn_base_tokenizer(texts, 300, "sentencepiece", tmp_path / "ja")
    size = read_tokenizer(tmp_path / "ja").vocab_size
    donor = write_donor(tmp_path / "donor", tmp_path / "ja", {name: torch.randn(size, 24) for name in MATRICES})
    with pytest.raises(CheckpointError, match=r"donor: shares \d tokens with .*model, too few to go by; name a donor"):
        resize(tmp_path, write_llama(tmp_path / "model"), made, donor, method)
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


@pytest.mark.parametrize("method", METHODS)
def test_a_donor_whose_tokenizer_does_not_fit_its_matrix_is_refused(tmp_path, made, method):
    donor = write_llama(tmp_path / "donor", vocab_size=303, tokenizer=False)
    copy_tokenizer(made, donor)
    message = r"donor: its tokenizer has 304 tokens, model\.embed_tokens\.weight only 303 rows; name a donor with"
    with pytest.raises(CheckpointError, match=message):
        resize(tmp_path, write_llama(tmp_path / "model"), made, donor, method)


@pytest.mark.parametrize("index", [270, 302], ids=["shared", "new"])
@pytest.mark.parametrize("method", METHODS)
def test_a_damaged_row_of_the_donor_is_named(tmp_path, made, method, index):
    rows = {name: torch.randn(304, 24) for name in MATRICES}
    rows["lm_head.weight"][index, 3] = float("nan")
    donor = write_donor(tmp_path / "donor", made, rows)
    token = read_tokenizer(made).tokenizer.id_to_token(index)
    message = f"donor: row {index} ({token!r}) of lm_head.weight holds NaN or infinity; mend the donor"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        resize(tmp_path, write_llama(tmp_path / "model"), made, donor, method)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", METHODS)
def test_a_damaged_row_of_the_base_is_named(tmp_path, made, method):
    model = write_llama(tmp_path / "model")
    rows = load_file(model / "model.safetensors")[MATRICES[0]]
    rows[270] = float("inf")
    write_rows(model, {MATRICES[0]: rows})
    donor = write_donor(tmp_path / "donor", made, {name: torch.randn(304, 24) for name in MATRICES})
    with pytest.raises(CheckpointError, match=r"input matrix: row 270 \('am'\) holds NaN or infinity; mend the model"):
        resize(tmp_path, model, made, donor, method)


def test_a_folder_without_weights_or_tokenizer_is_no_donor(tmp_path, made):
    model = write_llama(tmp_path / "model")
    with pytest.raises(CheckpointError, match="nowhere"):
        resize(tmp_path, model, made, tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"holds no tokenizer\.json"):
        resize(tmp_path, model, made, write_llama(tmp_path / "donor", tokenizer=False))


@pytest.mark.parametrize("method", METHODS)
def test_a_model_without_its_tokenizer_has_no_anchors(tmp_path, made, method):
    model = write_llama(tmp_path / "model", tokenizer=False)
    donor = write_donor(tmp_path / "donor", made, {name: torch.randn(304, 24) for name in MATRICES})
    with pytest.raises(ConfigError, match=f"{method} reads the model's own tokenizer, and none travels with it"):
        resize(tmp_path, model, made, donor, method)
