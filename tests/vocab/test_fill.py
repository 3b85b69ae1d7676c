"""What holds for every method: the table, the fallbacks, finite rows, old rows untouched, on whole models."""

import json
import re
import typing

import pytest
import torch

from megatron_adapt.checkpoint.convert import convert_checkpoint
from megatron_adapt.checkpoint.hf import HFFolder
from megatron_adapt.config import BuildTokenizer, ConvertCheckpoint, ResizeVocab, TokenizerSettings, VocabSettings
from megatron_adapt.errors import CheckpointError
from megatron_adapt.tokenizer.build import build_tokenizer
from megatron_adapt.tokenizer.id_map import read_id_map
from megatron_adapt.tokenizer.learn import learn_base_tokenizer
from megatron_adapt.tokenizer.pieces import copy_tokenizer, read_tokenizer
from megatron_adapt.vocab.fill import FILL_METHODS
from megatron_adapt.vocab.resize import resize_vocab
from tests.helpers.tiny import write_llama
from tests.tokenizer.bases import learn_base, make_texts, write_corpus
from tests.vocab.matrices import fill_rows

MATRICES = ("model.embed_tokens.weight", "lm_head.weight")


def test_every_method_of_the_config_has_a_function():
    assert set(typing.get_args(typing.get_type_hints(VocabSettings)["method"])) == set(FILL_METHODS)


@pytest.mark.parametrize("pieces", [{4: [], 5: [1]}, {4: []}])
def test_a_token_without_old_pieces_takes_the_mean_and_is_counted(pieces, caplog):
    rows_VH = torch.randn(4, 3)
    rows = fill_rows("subtoken_mean", rows_VH, pieces)
    assert torch.allclose(rows[0], rows_VH.mean(0))
    assert (
        f"input matrix: 1 of {len(pieces)} new tokens have no row by subtoken_mean; 0 take the mean of their old "
        "pieces, 1, which have none, the mean of all rows" in caplog.text
    )


@pytest.mark.parametrize("method", ["subtoken_mean", "subtoken_weighted"])
@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_pieces_whose_rows_are_zero_or_not_finite_give_the_mean(bad, method):
    rows_VH = torch.tensor([[bad, bad], [1.0, 2.0], [3.0, 4.0]])
    settings = {"piece_weights": "position"} if method == "subtoken_weighted" else {}
    base_mean = torch.tensor([2.0, 3.0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.vocab.matrices.Rows.mean", lambda self: base_mean.double())
        rows = fill_rows(method, rows_VH, {3: [0], 4: [1]}, **settings)
    assert torch.equal(rows, torch.tensor([[2.0, 3.0], [1.0, 2.0]]))


def test_a_matrix_whose_mean_is_not_finite_is_refused_by_name():
    message = r"output head: the mean of its rows is not finite, so nothing can fill new ones; look for NaN with tools/"
    with pytest.raises(CheckpointError, match=message):
        fill_rows("subtoken_mean", torch.tensor([[float("nan")], [1.0]]), {2: []}, is_head=True)


@pytest.mark.parametrize("norm", ["none", "median", "quantile"])
@pytest.mark.parametrize("method", ["subtoken_mean", "normal"])
def test_an_empty_model_stays_empty_and_is_told(method, norm, caplog):
    assert not fill_rows(method, torch.zeros(3, 2), {3: [0], 4: []}, norm=norm).any()
    assert "input matrix: the mean of its rows is zero, and so are new rows; is the model empty?" in caplog.text


# ---------------------------------------------------------------- whole models


@pytest.fixture(scope="module", params=["byte_level", "sentencepiece"])
def built(request, tmp_path_factory):
    """A base tokenizer, one made from it, a donor's and a corpus."""
    root = tmp_path_factory.mktemp(request.param)
    base = learn_base(root / "base", request.param)
    corpus = write_corpus(root / "ru.jsonl", make_texts("ru"))
    build_tokenizer(
        BuildTokenizer(
            base=base.folder,
            corpus=(corpus,),
            output=root / "made",
            settings=TokenizerSettings(method="merge", size="60"),
        )
    )
    other = "sentencepiece" if request.param == "byte_level" else "byte_level"
    donor_corpus = make_texts("ru") + make_texts("en")
    learn_base_tokenizer(donor_corpus, 600, other, root / "donor_tokenizer")
    donor_tokenizer = read_tokenizer(root / "donor_tokenizer")
    donor = write_llama(root / "donor", vocab_size=donor_tokenizer.vocab_size, tokenizer=False, hidden_size=24, seed=3)
    copy_tokenizer(donor_tokenizer.folder, donor)
    return base, read_tokenizer(root / "made"), donor, corpus


def write_model(folder, base, **settings):
    model = write_llama(folder, vocab_size=base.vocab_size, tokenizer=False, dtype=torch.bfloat16, **settings)
    copy_tokenizer(base.folder, model)
    return model


def resize(model, built, output, method, **settings):
    _, made, donor, corpus = built
    needs = {"donor": donor} if method in ("linear_transform", "clp", "omp") else {}
    resize_vocab(
        ResizeVocab(
            model=model,
            tokenizer=made.folder,
            output=output,
            corpus=(corpus,) if VocabSettings(method=method, **needs).reads_corpus else (),
            settings=VocabSettings(method=method, **needs, **settings),
        )
    )
    return HFFolder(output) if (output / "config.json").is_file() else output


@pytest.mark.parametrize("method", FILL_METHODS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_every_method_keeps_old_rows_bit_by_bit_and_gives_finite_rows_twice_the_same(
    tmp_path, built, tied, method, caplog
):
    base, made, _, _ = built
    model = write_model(tmp_path / "model", base, tie_word_embeddings=tied)
    before = HFFolder(model)
    first, second = (resize(model, built, tmp_path / name, method) for name in ("first", "second"))
    id_map = read_id_map(made)
    kept = [new for new in range(made.vocab_size) if new not in id_map.pieces]
    assert len(id_map.pieces) == 60
    # Most rows are the method's own.
    assert all(int(left) < 30 for left in re.findall(r": (\d+) of 60 new tokens have no row", caplog.text))
    for name in before.names:
        old, new, again = (folder.read(name).view(torch.int16) for folder in (before, first, second))
        assert torch.equal(new, again)
        if name in MATRICES:
            rows = first.read(name)[list(id_map.pieces)]
            assert rows.isfinite().all()
            assert rows.any(-1).all()
            new, old = new[kept], old[[id_map.old_id(index) for index in kept]]
        assert torch.equal(new, old), name


@pytest.mark.parametrize("norm", ["median", "quantile"])
@pytest.mark.parametrize("method", ["subtoken_mean", "linear_transform"])
def test_norms_are_matched_whatever_the_method(tmp_path, built, method, norm):
    base, made, _, _ = built
    model = write_model(tmp_path / "model", base)
    plain, matched = (resize(model, built, tmp_path / name, method, norm=name) for name in ("none", norm))
    news = list(read_id_map(made).pieces)
    for name in MATRICES:
        old = HFFolder(model).read(name).float().norm(dim=-1)
        left, right = (folder.read(name)[news].float() for folder in (plain, matched))
        # bf16 keeps 8 bits.
        assert torch.allclose(torch.nn.functional.cosine_similarity(left, right), torch.ones(len(news)), atol=1e-3)
        assert right.norm(dim=-1).median() == pytest.approx(float(old.median()), rel=0.03)
        assert left.norm(dim=-1).median() != pytest.approx(float(old.median()), rel=0.03)


@pytest.mark.parametrize(
    "method", ["normal", "align", "merge_tree", "linear_transform", "similarity_topk", "focus", "omp"]
)
def test_a_megatron_checkpoint_gets_the_rows_of_the_hugging_face_folder(tmp_path, built, method):
    base, made, _, _ = built
    model = write_model(tmp_path / "model", base)
    convert_checkpoint(ConvertCheckpoint(source=model, to="megatron", output=tmp_path / "megatron"))
    resize(tmp_path / "megatron", built, tmp_path / "resized", method)
    convert_checkpoint(ConvertCheckpoint(source=tmp_path / "resized", to="hf", output=tmp_path / "back"))
    left, right = HFFolder(tmp_path / "back"), resize(model, built, tmp_path / "direct", method)
    for name in MATRICES:
        assert torch.allclose(left.read(name).float(), right.read(name).float(), rtol=1e-2, atol=1e-6), name
        old = torch.tensor([read_id_map(made).old_id(new) is not None for new in range(made.vocab_size)])
        assert torch.equal(left.read(name)[old], right.read(name)[old])


def test_the_record_names_what_was_read(tmp_path, built):
    base, made, donor, _ = built
    model = write_model(tmp_path / "model", base)
    resize(model, built, tmp_path / "out", "linear_transform")
    record = json.loads((tmp_path / "out" / "stage.json").read_text())
    assert set(record["inputs"]) == {str(model), str(made.folder), str(donor)}
