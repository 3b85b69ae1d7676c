import json
from dataclasses import replace
from itertools import pairwise
from math import log, log2

import orjson
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from megatron_adapt.config import Evaluate, EvaluateSettings
from megatron_adapt.errors import CheckpointError, ConfigError, DataError
from megatron_adapt.evaluate import bits_per_byte
from megatron_adapt.evaluate.bits_per_byte import cut_windows, evaluate, load_model, prepend_context, score_texts
from megatron_adapt.files import is_finished, read_json
from megatron_adapt.tokenizer.pieces import encode_texts, read_tokenizer
from tests.helpers.tiny import write_llama

VOCAB_SIZE = 300
TEXTS = ["a dictionary of abbacadabra", "déjà vu", "x", "日本語のテキスト and then some more letters " * 2, "bad cab"]


def write_corpus(path, texts):
    path.write_bytes(b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts))
    return path


def change_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def zero_weights(folder, *endings):
    def change(weights):
        names = [name for name in weights if name.endswith(endings)]
        assert names
        for name in names:
            weights[name].zero_()

    change_weights(folder, change)


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def score(folder, texts=TEXTS, *, seq_length=128, batch_size=4):
    tokenizer = read_tokenizer(folder)
    settings = EvaluateSettings(seq_length=seq_length, batch_size=batch_size)
    model = load_model(folder, tokenizer, seq_length)
    return score_texts(model, tokenizer, texts, settings, lambda amount=1: None)


def score_by_hand(folder, texts):
    """One document at a time, all logits at once."""
    tokenizer = read_tokenizer(folder)
    model = LlamaForCausalLM.from_pretrained(folder)
    nats = 0.0
    for text in texts:
        ids_BT = torch.tensor([tokenizer.tokenizer.encode(text).ids])
        with torch.no_grad():
            logits_TV = model(ids_BT).logits[0].float()
        logprobs_TV = logits_TV.double().log_softmax(-1)
        nats -= sum(logprobs_TV[at, token].item() for at, token in enumerate(ids_BT[0, 1:]))
    return nats


@pytest.fixture
def folder(tmp_path):
    return write_llama(tmp_path / "model", vocab_size=VOCAB_SIZE)


# ---------------------------------------------------------------- the figures


def test_a_uniform_model_needs_log2_of_the_vocabulary_per_token(folder):
    zero_weights(folder, "lm_head.weight")
    text = "ab día"  # "ab" is one piece; space, d, two bytes of í, a
    found = score(folder, [text])
    assert (found.tokens, found.bytes, found.documents) == (6, 7, 1)
    assert found.bits_per_byte == pytest.approx(log2(VOCAB_SIZE) * 6 / 7, rel=1e-6)
    assert found.to_dict() == {
        "bits_per_byte": found.bits_per_byte,
        "loss_per_token": pytest.approx(log(VOCAB_SIZE), rel=1e-6),
        "tokens_per_byte": 6 / 7,
        "tokens": 6,
        "bytes": 7,
        "documents": 1,
    }


def test_the_sum_is_that_of_every_document_alone(folder):
    found = score(folder)
    assert found.nats == pytest.approx(score_by_hand(folder, TEXTS), rel=1e-5)
    assert found.bytes == sum(len(text.encode()) for text in TEXTS)
    assert found.documents == len(TEXTS)


def test_a_tied_model_is_scored_by_its_embedding(tmp_path):
    folder = write_llama(tmp_path / "model", vocab_size=VOCAB_SIZE, tie_word_embeddings=True)
    assert score(folder).nats == pytest.approx(score_by_hand(folder, TEXTS), rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_batches_and_padding_do_not_change_the_result(folder, batch_size):
    assert score(folder, batch_size=batch_size).nats == pytest.approx(score(folder).nats, rel=1e-5)


def test_slices_of_the_head_do_not_change_the_result(folder, monkeypatch):
    whole = score(folder).nats
    monkeypatch.setattr(bits_per_byte, "_LOGITS_BYTES", 4 * VOCAB_SIZE * 7)
    assert score(folder).nats == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("seq_length", [1, 2, 5, 64])
def test_windows_do_not_change_the_result_of_a_model_without_attention(folder, seq_length):
    zero_weights(folder, "o_proj.weight")
    whole, cut = score(folder), score(folder, seq_length=seq_length)
    assert cut.tokens == whole.tokens
    assert cut.nats == pytest.approx(whole.nats, rel=1e-5)


def test_windows_forget_what_lies_before_their_one_token_of_overlap(folder):
    ids = read_tokenizer(folder).tokenizer.encode(TEXTS[3]).ids
    assert len(ids) > 41
    model = LlamaForCausalLM.from_pretrained(folder)
    expected = 0.0
    for start in range(0, len(ids) - 1, 20):
        window = torch.tensor(ids[start : start + 21])
        with torch.no_grad():
            logits_TV = model(window[None, :-1]).logits[0]
        expected += torch.nn.functional.cross_entropy(logits_TV, window[1:], reduction="sum").item()
    assert score(folder, [TEXTS[3]], seq_length=20).nats == pytest.approx(expected, rel=1e-5)


def test_groups_of_documents_do_not_change_the_result(folder, monkeypatch):
    whole = score(folder)
    monkeypatch.setattr(bits_per_byte, "_GROUP_DOCUMENTS", 2)
    parts = score(folder)
    assert parts.nats == pytest.approx(whole.nats, rel=1e-5)
    assert (parts.tokens, parts.bytes, parts.documents) == (whole.tokens, whole.bytes, whole.documents)


def test_a_model_is_scored_in_its_stored_type_with_losses_in_fp32(tmp_path):
    folder = write_llama(tmp_path / "model", vocab_size=VOCAB_SIZE, dtype=torch.bfloat16)
    model = load_model(folder, read_tokenizer(folder), 16)
    assert model.dtype == torch.bfloat16
    assert score(folder, batch_size=1).nats == pytest.approx(score_by_hand(folder, TEXTS), rel=1e-3)


@given(st.integers(1, 60), st.integers(1, 20))
def test_windows_predict_every_token_but_the_first_once(num_ids, seq_length):
    ids = list(range(num_ids))
    windows = cut_windows(ids, seq_length)
    assert [token for window in windows for token in window[1:]] == ids[1:]
    assert all(2 <= len(window) <= seq_length + 1 for window in windows)
    assert all(one[-1] == two[0] for one, two in pairwise(windows))


# ---------------------------------------------------------------- the first token's context


def test_bos_is_context_and_not_scored(folder):
    tokenizer = read_tokenizer(folder)
    assert tokenizer.adds_bos
    (ids,) = encode_texts(tokenizer, ["bad"])
    assert prepend_context(ids, tokenizer) == ids
    assert ids[0] == tokenizer.bos_id
    assert score(folder, ["bad"]).tokens == len(ids) - 1


def test_without_bos_a_document_follows_the_end_of_another(folder):
    edit_json(folder / "tokenizer.json", lambda content: content.update(post_processor=None))
    tokenizer = read_tokenizer(folder)
    assert not tokenizer.adds_bos
    (ids,) = encode_texts(tokenizer, ["bad"])
    assert prepend_context(ids, tokenizer) == [tokenizer.eos_id, *ids]
    assert score(folder, ["bad"]).tokens == len(ids)


def test_a_tokenizer_with_neither_is_refused(folder):
    tokenizer = replace(read_tokenizer(folder), adds_bos=False, eos_id=None)
    with pytest.raises(DataError, match=r"model: neither adds a BOS token nor has an EOS token; name an eos_token$"):
        prepend_context([5, 6], tokenizer)


# ---------------------------------------------------------------- the tool


def make_config(tmp_path, *models, texts=TEXTS, **changes):
    corpus = write_corpus(tmp_path / "en.jsonl", texts)
    settings = EvaluateSettings(**{"seq_length": 64, **changes})
    return Evaluate(models=models, corpora=(f"en={corpus}",), json=tmp_path / "out" / "e.json", settings=settings)


def test_every_model_is_scored_on_every_language(tmp_path, folder, capsys):
    other = write_llama(tmp_path / "other", vocab_size=VOCAB_SIZE, seed=1)
    config = make_config(tmp_path, f"base={folder}", f"other={other}")
    more = write_corpus(tmp_path / "more.jsonl", ["bad cab", ""])
    config = Evaluate(
        models=config.models,
        corpora=(*config.corpora, f"qx={more}", f"qx={tmp_path / 'en.jsonl'}"),
        json=config.json,
        settings=config.settings,
    )
    evaluation = evaluate(config)
    assert read_json(config.json) == evaluation
    assert list(evaluation) == ["base", "other"]
    assert list(evaluation["base"]) == ["en", "qx"]
    assert evaluation["base"]["en"]["bits_per_byte"] == pytest.approx(score(folder, seq_length=64).bits_per_byte)
    assert evaluation["base"]["en"]["bits_per_byte"] != evaluation["other"]["en"]["bits_per_byte"]
    assert evaluation["base"]["qx"]["documents"] == len(TEXTS) + 1
    assert f"{evaluation['other']['qx']['bits_per_byte']:.4f}" in capsys.readouterr().out
    assert is_finished(config.json.with_name("e.stage.json"), config=config)


def test_whole_documents_are_scored_up_to_max_bytes(tmp_path, folder):
    config = make_config(tmp_path, f"base={folder}", max_bytes=len(TEXTS[0]) + 1)
    found = evaluate(config)["base"]["en"]
    assert found["documents"] == 2
    assert found["bytes"] == len(TEXTS[0]) + len(TEXTS[1].encode())


def test_max_bytes_are_shared_by_the_files_of_a_language(tmp_path, folder):
    parts = [write_corpus(tmp_path / f"{letter}.jsonl", [letter * 50] * 4) for letter in "ab"]
    settings = EvaluateSettings(seq_length=64, max_bytes=150)
    corpora = tuple(f"en={path}" for path in parts)
    found = evaluate(Evaluate(models=(f"base={folder}",), corpora=corpora, settings=settings))["base"]["en"]
    assert found["documents"] == 4  # 75 bytes of each file are two documents; the first three were all of one file


def test_a_name_stands_for_one_model(tmp_path, folder):
    with pytest.raises(ConfigError, match=r"^--models: 'm' names 2 folders; give every model a name of its own$"):
        evaluate(make_config(tmp_path, f"m={folder}", f"m={folder}"))


def test_a_missing_corpus_is_refused_before_a_model_is_loaded(tmp_path):
    config = Evaluate(models=("m=nowhere",), corpora=(f"en={tmp_path / 'gone.jsonl'}",))
    with pytest.raises(DataError, match=r"^--corpora: .*gone\.jsonl is not a file; check the path$"):
        evaluate(config)


def test_a_corpus_without_text_is_refused(tmp_path, folder):
    config = make_config(tmp_path, f"m={folder}", texts=["", ""])
    with pytest.raises(DataError, match=r"en\.jsonl: no text to score for 'en'; give files with documents that are"):
        evaluate(config)
    assert not config.json.exists()


def test_a_loss_that_is_not_finite_is_refused(tmp_path, folder):
    change_weights(folder, lambda weights: weights["lm_head.weight"][7].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=r"^m: the loss on 'en' is nan; the weights are damaged or training"):
        evaluate(make_config(tmp_path, f"m={folder}"))


# ---------------------------------------------------------------- models that cannot be scored


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused_with_both_numbers(tmp_path, folder):
    larger = write_llama(tmp_path / "larger", vocab_size=VOCAB_SIZE + 20)
    with pytest.raises(
        CheckpointError, match=r"model: the model has 300 rows, its tokenizer 320 ids; give it the rows"
    ):
        load_model(folder, read_tokenizer(larger), 16)


def test_windows_longer_than_the_model_are_refused(folder):
    with pytest.raises(
        ConfigError, match=r"^evaluate\.seq_length: 129 exceeds the 128 positions of .*; use at most 128$"
    ):
        load_model(folder, read_tokenizer(folder), 129)


def test_a_missing_tensor_is_refused_not_invented(folder):
    change_weights(folder, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(
        CheckpointError, match=r"model: 1 tensors are missing, first model\.layers\.1\.mlp\.up_proj\.weight; write the"
    ):
        load_model(folder, read_tokenizer(folder), 16)


def test_a_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model: the model cannot be loaded \(.*\); write the folder again$"):
        load_model(folder, read_tokenizer(folder), 16)


def test_a_truncated_weights_file_is_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model: the model cannot be loaded \(.*\); write the folder again$"):
        load_model(folder, read_tokenizer(folder), 16)
