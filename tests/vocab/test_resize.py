import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM

from megatron_adapt.checkpoint.convert import convert_checkpoint
from megatron_adapt.checkpoint.hf import HFFolder, HFWriter
from megatron_adapt.config import ConvertCheckpoint, ResizeVocab, VocabSettings
from megatron_adapt.errors import CheckpointError, ConfigError, DataError
from megatron_adapt.vocab import resize
from megatron_adapt.vocab.resize import resize_vocab
from tests.helpers.tiny import swap_two_pieces, write_byte_tokenizer, write_extended_tokenizer, write_llama

NEW = [("aa", "ab"), ("t", "h"), ("th", "e"), ("Ġ", "the")]
MATRICES = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture
def model(tmp_path):
    return write_llama(tmp_path / "model", dtype=torch.bfloat16)


@pytest.fixture
def tokenizer(tmp_path):
    return write_extended_tokenizer(write_byte_tokenizer(tmp_path / "base", 300), tmp_path / "tokenizer", NEW)


def _resize(model, tokenizer, output, method="subtoken_mean", **changes):
    settings = VocabSettings(method=method)
    resize_vocab(ResizeVocab(model=model, tokenizer=tokenizer, output=output, settings=settings, **changes))
    return HFFolder(output)


def _same_bytes(left, right):
    return left.dtype == right.dtype and torch.equal(left.view(torch.uint8), right.view(torch.uint8))


@pytest.mark.parametrize("method", ["subtoken_mean", "mean"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_old_rows_and_all_other_tensors_stay_bit_identical(tmp_path, tokenizer, tied, method):
    model = write_llama(tmp_path / "model", dtype=torch.bfloat16, tie_word_embeddings=tied, max_shard_size="30KB")
    after = _resize(model, tokenizer, tmp_path / "out", method)
    before = HFFolder(model)
    assert set(after.names) == set(before.names)
    assert ("lm_head.weight" in after.names) == (not tied)
    for name in before.names:
        old, new = before.read(name), after.read(name)
        if name in MATRICES:
            assert tuple(new.shape) == (304, 32)
            assert new.isfinite().all()
            assert new[300:].any(-1).all()
            new = new[:300]
        assert _same_bytes(old, new), name


def test_input_and_head_are_each_filled_from_their_own_rows(tmp_path, model, tokenizer):
    after, before = _resize(model, tokenizer, tmp_path / "out"), HFFolder(model)
    spelt = json.loads((tokenizer / "added_pieces.json").read_text())["pieces"]
    for name in MATRICES:
        rows = before.read(name).double()
        for new, olds in spelt.items():
            expected = rows[olds].mean(0).bfloat16()
            assert torch.equal(after.read(name)[int(new)], expected), (name, new)
    assert not torch.equal(after.read(MATRICES[0])[300:], after.read(MATRICES[1])[300:])


def test_transformers_loads_the_result_and_old_text_scores_as_before(tmp_path, model, tokenizer):
    _resize(model, tokenizer, tmp_path / "out")
    before, after = (LlamaForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (model, tmp_path / "out"))
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(before(ids).logits, after(ids).logits[..., :300])
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == after.config.vocab_size == 304
    config = json.loads((model / "config.json").read_text())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {**config, "vocab_size": 304}


@pytest.mark.parametrize("rows", [302, 320], ids=["fewer_spare", "more_spare"])
def test_spare_rows_are_overwritten_by_id_or_dropped(tmp_path, tokenizer, rows):
    model = write_llama(tmp_path / "model", vocab_size=rows, tokenizer=False)
    write_byte_tokenizer(model, 300)
    after, before = _resize(model, tokenizer, tmp_path / "out"), HFFolder(model)
    spelt = json.loads((tokenizer / "added_pieces.json").read_text())["pieces"]
    for name in MATRICES:
        assert after.shape(name) == (304, 32)
        old = before.read(name)
        assert _same_bytes(after.read(name)[:300], old[:300])
        assert torch.allclose(after.read(name)[301], old[spelt["301"]].mean(0), atol=1e-6)


def test_the_mean_leaves_spare_rows_out(tmp_path, tokenizer):
    model = write_llama(tmp_path / "model", vocab_size=320, tokenizer=False)
    write_byte_tokenizer(model, 300)
    after = _resize(model, tokenizer, tmp_path / "out", "mean")
    expected = HFFolder(model).read(MATRICES[0])[:300].double().mean(0).float()
    assert torch.allclose(after.read(MATRICES[0])[300:], expected.expand(4, -1), atol=1e-7)


def test_the_repeated_head_of_a_tied_model_is_left_out(tmp_path, tokenizer):
    model = write_llama(tmp_path / "model", tie_word_embeddings=True)
    tensors = load_file(model / "model.safetensors")
    specs = {**HFFolder(model).specs, "lm_head.weight": HFFolder(model).specs[MATRICES[0]]}
    with HFWriter(model, specs) as writer:
        for name in specs:
            writer.write(name, tensors[MATRICES[0] if name == "lm_head.weight" else name])
    assert "lm_head.weight" not in _resize(model, tokenizer, tmp_path / "out").names


def test_the_record_says_what_was_done(tmp_path, model, tokenizer):
    _resize(model, tokenizer, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "stage.json").read_text())
    assert record["counts"] == {"base_vocab_size": 300, "vocab_size": 304, "moved_rows": 0, "new_rows": 4}
    assert record["config"]["settings"]["method"] == "subtoken_mean"


def test_a_tokenizer_made_from_another_base_is_refused_with_both_numbers(tmp_path, model):
    other = write_extended_tokenizer(write_byte_tokenizer(tmp_path / "other", 310), tmp_path / "tokenizer", NEW[1:])
    with pytest.raises(
        CheckpointError, match=r"has 300 vocabulary rows .*, but .* made from a base of 310 tokens; build"
    ):
        _resize(model, other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_the_models_tokenizer_the_sizes_must_be_equal(tmp_path, tokenizer):
    model = write_llama(tmp_path / "model", vocab_size=320, tokenizer=False)
    with pytest.raises(CheckpointError, match=r"has 320 vocabulary rows, but .* made from a base of 300 tokens"):
        _resize(model, tokenizer, tmp_path / "out")
    same = write_llama(tmp_path / "same", tokenizer=False)
    assert _resize(same, tokenizer, tmp_path / "out").shape(MATRICES[0]) == (304, 32)


def test_a_tokenizer_whose_old_ids_moved_is_refused(tmp_path, model, tokenizer):
    path = tokenizer / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    vocab["aa"], vocab["ab"] = vocab["ab"], vocab["aa"]
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"id 258 is 'ab', in the model's tokenizer 'aa'"):
        _resize(model, tokenizer, tmp_path / "out")


def test_a_tokenizer_without_its_pieces_is_refused_with_the_way_out(tmp_path, model, tokenizer):
    (tokenizer / "added_pieces.json").unlink()
    with pytest.raises(
        DataError, match=r"no added_pieces\.json, .*; make the tokenizer with tools/build_tokenizer\.py"
    ):
        _resize(model, tokenizer, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "not of the form"),
        ({"vocab_size": 305}, "maps 305 ids, the tokenizer has 304"),
        ({"base_vocab_size": 299}, "id 299 has no old id below 299"),
        ({"moved": {"3": 300}}, "id 3 has no old id below 300"),
        (
            {"pieces": {"300": [1], "301": [300], "302": [1], "303": [1]}},
            r"id 301 is spelt by \[300\], not all below 300",
        ),
    ],
)
def test_pieces_that_do_not_fit_the_tokenizer_are_refused(tmp_path, model, tokenizer, changes, message):
    path = tokenizer / "added_pieces.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes} if changes else {}))
    with pytest.raises(DataError, match=message):
        _resize(model, tokenizer, tmp_path / "out")


def test_rows_follow_tokens_that_moved_and_dropped_ones_are_gone(tmp_path, model, tokenizer):
    swap_two_pieces(tokenizer)
    after, before = _resize(model, tokenizer, tmp_path / "out"), HFFolder(model)
    order = [*range(258), 259, 258, *range(260, 300)]
    for name in MATRICES:
        assert _same_bytes(after.read(name)[:300], before.read(name)[order])
    assert json.loads((tmp_path / "out" / "stage.json").read_text())["counts"]["moved_rows"] == 2


def test_an_existing_output_is_kept_unless_told_otherwise(tmp_path, model, tokenizer):
    _resize(model, tokenizer, tmp_path / "out")
    with pytest.raises(ConfigError, match="exists already"):
        _resize(model, tokenizer, tmp_path / "out")
    _resize(model, tokenizer, tmp_path / "out", overwrite=True)


def test_a_mistake_found_late_leaves_nothing(tmp_path, model, tokenizer, monkeypatch):
    def refuse(*args):
        raise CheckpointError("x: wrong")

    monkeypatch.setattr(resize, "renumber_companions", refuse)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="x: wrong"):
        _resize(model, tokenizer, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_a_resized_model_goes_to_megatron_and_back(tmp_path, model, tokenizer):
    resized = _resize(model, tokenizer, tmp_path / "out")
    convert_checkpoint(ConvertCheckpoint(source=tmp_path / "out", to="megatron", output=tmp_path / "megatron"))
    convert_checkpoint(ConvertCheckpoint(source=tmp_path / "megatron", to="hf", output=tmp_path / "again"))
    again = HFFolder(tmp_path / "again")
    assert all(_same_bytes(resized.read(name), again.read(name)) for name in resized.names)
    with pytest.raises(CheckpointError, match=r"has 300 tokens, the checkpoint's vocabulary has 304"):
        convert_checkpoint(
            ConvertCheckpoint(source=tmp_path / "megatron", to="hf", output=tmp_path / "x", tokenizer=model)
        )
