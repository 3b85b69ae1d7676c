"""The whole diagnosis of a model made by hand: figures, files, tables, refusals."""

import json
import logging
import math

import orjson
import pytest
import torch
from safetensors.torch import load_file

from megatron_adapt.config import DiagnoseVocab, EvaluateSettings, ResizeVocab
from megatron_adapt.errors import CheckpointError, ConfigError, DataError
from megatron_adapt.evaluate.bits_per_byte import evaluate
from megatron_adapt.flags import load_config
from megatron_adapt.vocab.diagnose import diagnose_vocab
from megatron_adapt.vocab.resize import resize_vocab
from tests.helpers.tiny import write_byte_tokenizer, write_extended_tokenizer, write_llama
from tests.vocab.donors import MATRICES, write_donor, write_rows

NEW = [("x", "x"), ("y", "y"), ("z", "z"), ("xx", "yy")]
MERGES = [("c", "a"), ("ca", "t"), ("d", "o"), ("do", "g"), ("Ġ", "cat"), ("Ġ", "dog")]
CAT, DOG, XX, YY, ZZ, XXYY = 262, 263, 264, 265, 266, 267


@pytest.fixture
def base(tmp_path):
    folder = write_llama(tmp_path / "base", vocab_size=264, tokenizer=False)
    write_byte_tokenizer(folder, merges=MERGES)
    return folder


@pytest.fixture
def model(tmp_path, base):
    """Four new tokens: xx with the rows of cat, yy with twice those of dog, zz zero, xxyy NaN."""
    write_extended_tokenizer(base, tmp_path / "tokenizer", NEW)
    resize_vocab(ResizeVocab(model=base, tokenizer=tmp_path / "tokenizer", output=tmp_path / "model"))
    rows = load_file(tmp_path / "model" / "model.safetensors")
    for name in MATRICES:
        rows[name][XX], rows[name][YY] = rows[name][CAT], 2 * rows[name][DOG]
        rows[name][ZZ], rows[name][XXYY] = 0, torch.nan
    write_rows(tmp_path / "model", {name: rows[name] for name in MATRICES})
    return tmp_path / "model"


def mend(model):
    """Give the zero and the NaN rows values."""
    rows = {name: load_file(model / "model.safetensors")[name] for name in MATRICES}
    for matrix in rows.values():
        matrix[ZZ:] = 0.3
    write_rows(model, rows)


def diagnose(base, model, **settings):
    return diagnose_vocab(DiagnoseVocab(base=base, model=model, **settings), evaluate)


def write_lines(path, documents):
    path.write_bytes(b"".join(orjson.dumps(document) + b"\n" for document in documents))
    return path


def test_rows_of_a_hand_made_model_are_measured(base, model):
    found = diagnose(base, model, num_examples=3)
    assert found["vocabulary"]["new"] == 4
    assert found["vocabulary"]["pieces_per_new_token"] == (2 + 2 + 2 + 4) / 4
    assert list(found["matrices"]) == ["input", "head"]
    for role, name in zip(("input", "head"), MATRICES, strict=True):
        matrix = found["matrices"][role]
        old = load_file(base / "model.safetensors")[name].double()
        lengths = old.norm(dim=-1)
        assert matrix["norms"]["kept"] == matrix["norms"]["base"]
        for percent, length in matrix["norms"]["base"].items():
            assert length == pytest.approx(lengths.quantile(int(percent) / 100).item())
        new = torch.stack([lengths[CAT], 2 * lengths[DOG], torch.tensor(0.0)])
        assert matrix["norms"]["new"]["50"] == pytest.approx(new.median().item())
        assert matrix["kept_rows"] == {"identical": 1, "mean_cosine": pytest.approx(1)}
        odd = matrix["odd_rows"]
        assert odd["zero"] == {"count": 1, "tokens": [{"id": ZZ, "token": "zz", "is_new": True}]}
        assert odd["not_finite"] == {"count": 1, "tokens": [{"id": XXYY, "token": "xxyy", "is_new": True}]}
        assert odd["tiny"]["count"] == 0
        near = {item["token"]: item["nearest"] for item in matrix["nearest"]}
        assert list(near) == ["xx", "yy", "zz"]
        assert (near["xx"][0]["id"], near["xx"][0]["token"]) == (CAT, " cat")
        assert near["yy"][0]["token"] == " dog"
        assert near["yy"][0]["cosine"] == pytest.approx(1)
        cosines = torch.nn.functional.cosine_similarity(old[DOG], old, dim=-1).sort(descending=True)
        assert [item["id"] for item in near["yy"]] == cosines.indices[:5].tolist()
        assert [item["cosine"] for item in near["yy"]] == pytest.approx(cosines.values[:5].tolist(), abs=1e-5)
        assert near["zz"] == []
    assert [found[part] for part in ("use", "donor", "bits_per_byte", "lexicon")] == [None] * 4


def test_a_tied_model_has_one_matrix(tmp_path):
    base = write_llama(tmp_path / "base", tie_word_embeddings=True)
    write_extended_tokenizer(base, tmp_path / "tokenizer", NEW)
    resize_vocab(ResizeVocab(model=base, tokenizer=tmp_path / "tokenizer", output=tmp_path / "model"))
    assert list(diagnose(base, tmp_path / "model")["matrices"]) == ["input"]


def test_corpora_give_use_frequent_examples_and_bits_per_byte(tmp_path, base, model):
    mend(model)
    path = write_lines(tmp_path / "xx.jsonl", [{"body": "yyyxxyyyy"}, {"body": "b"}])
    settings = EvaluateSettings(seq_length=64)
    found = diagnose(base, model, corpora=(f"new={path}", f"old={path}"), text_key="body", settings=settings)
    # yy, y, xxyy, yy; and b
    assert found["use"]["new"] == found["use"]["old"]
    assert found["use"]["new"] == {
        "tokens": 5,
        "share_of_new_tokens": 3 / 5,
        "new_tokens_seen": 2 / 4,
        "vocabulary_used": 4 / 268,
    }
    nearest = found["matrices"]["input"]["nearest"]
    assert [(item["token"], item["occurrences"]) for item in nearest] == [("yy", 4), ("xxyy", 2), ("xx", 0), ("zz", 0)]
    scores = found["bits_per_byte"]
    assert list(scores) == ["base", "model"]
    assert scores["base"]["new"]["tokens"] == 10
    assert scores["model"]["new"]["tokens"] == 5
    assert all(math.isfinite(scores[name]["new"]["bits_per_byte"]) for name in scores)


def test_count_bytes_limits_the_texts_that_tokens_are_counted_in(tmp_path, base, model):
    mend(model)
    path = write_lines(tmp_path / "a.jsonl", [{"text": "aaaa"}] * 100)
    settings = EvaluateSettings(seq_length=64)
    found = diagnose(base, model, corpora=(f"a={path}", f"a={path}"), count_bytes=10, settings=settings)
    assert found["use"]["a"]["tokens"] == 2 * 8  # of each file whole texts until five bytes are reached
    found = diagnose(base, model, corpora=(f"a={path}",), count_bytes=0, settings=settings)
    assert found["use"]["a"]["tokens"] == 400


def test_a_dictionary_is_searched_by_the_input_rows(tmp_path, base, model):
    mend(model)
    path = tmp_path / "words.tsv"
    path.write_text("cat\txx\ndog\tyy\ncat dog\tyy\nbbbbbbbbb\tzz\ncat\tb\n")
    lexicon = diagnose(base, model, dictionary=path)["lexicon"]
    assert lexicon["left_out"] == {"long": 1, "no_new_token": 1, "new_token_in_old": 0}
    assert (lexicon["entries"], lexicon["examples"]) == (3, [("cat", "xx"), ("dog", "yy"), ("cat dog", "yy")])
    assert lexicon["to_old"]["queries"] == 2
    # 128 bytes that are characters and the six merges, and "cat dog".
    assert lexicon["to_old"]["candidates"] == 128 + 6 + 1
    assert lexicon["to_old"]["cosine"]["1"] == 1
    assert lexicon["to_new"]["cosine"]["1"] >= 2 / 3
    assert lexicon["to_old"]["chance"]["1"] == pytest.approx((1 + 2) / 2 / 135)


def test_translations_are_linked_in_parallel_text(tmp_path, base, model):
    mend(model)
    pairs = [{"a": "the cat", "b": "xx b"}] * 6 + [{"a": "the dog", "b": "yy b"}] * 5
    path = write_lines(tmp_path / "pairs.jsonl", pairs)
    lexicon = diagnose(base, model, parallel=path, parallel_keys=("a", "b"))["lexicon"]
    assert lexicon["examples"] == [("cat", "xx"), ("dog", "yy")]
    assert lexicon["to_old"]["cosine"] == lexicon["to_new"]["cosine"] == {"1": 1, "5": 1, "above": 0}


def test_a_donor_is_judged_for_each_matrix(tmp_path, base, model):
    rows = load_file(base / "model.safetensors")
    image = {name: torch.cat([rows[name] @ torch.randn(32, 32) + 1, torch.randn(4, 32)]) for name in MATRICES}
    donor = write_donor(tmp_path / "donor", tmp_path / "tokenizer", image)
    found = diagnose(base, model, donor=donor)["donor"]
    assert (found["shared"], found["new_in_donor"]) == (134, 1)
    assert list(found["maps"]) == ["input", "head"]
    for judged in found["maps"].values():
        assert judged["r2"] == pytest.approx(1, abs=1e-4)
        assert judged["mean_cosine"] == pytest.approx(1, abs=1e-4)


def test_the_json_the_record_and_the_plots_hold_what_was_found(tmp_path, base, model, capsys):
    mend(model)
    corpus = write_lines(tmp_path / "a.jsonl", [{"text": "xx yy cat"}])
    words = tmp_path / "words.tsv"
    words.write_text("cat\txx\n")
    outputs = {"json": tmp_path / "out" / "found.json", "plots": tmp_path / "plots"}
    settings = EvaluateSettings(seq_length=64)
    found = diagnose(base, model, corpora=(f"a={corpus}",), dictionary=words, settings=settings, **outputs)
    written = json.loads((tmp_path / "out" / "found.json").read_text())
    assert written == json.loads(orjson.dumps(found))
    record = json.loads((tmp_path / "out" / "found.stage.json").read_text())
    assert set(record["inputs"]) == {str(path) for path in (base, model, corpus, words)}
    plots = {"norms-input.png", "norms-head.png", "scripts.png", "bits_per_byte.png", "lexicon.png"}
    assert {path.name for path in (tmp_path / "plots").iterdir()} == plots
    printed = capsys.readouterr().out
    for part in ("tokens: 264 before, 268 now", "length of rows", "rows to look at", "nearest to new ones, head"):
        assert part in printed
    assert "translations found by the input rows, of 1 (left out: 0 long" in " ".join(printed.split())


def test_broken_models_are_drawn_and_shown_too(tmp_path, base, model, capsys):
    write_rows(model, {name: torch.full((268, 32), torch.nan) for name in MATRICES})
    found = diagnose(base, model, json=tmp_path / "found.json", plots=tmp_path / "plots")
    matrix = found["matrices"]["input"]
    assert matrix["norms"]["new"] == matrix["norms"]["kept"] == {}
    assert matrix["odd_rows"]["not_finite"]["count"] == 268
    assert matrix["kept_rows"] == {"identical": 0, "mean_cosine": None}
    assert (tmp_path / "plots" / "norms-head.png").is_file()
    assert "[/" not in capsys.readouterr().err


def test_a_model_of_other_rows_is_warned_of(tmp_path, base, model, caplog):
    torch.manual_seed(3)
    write_rows(model, {name: torch.randn(268, 32) for name in MATRICES})
    with caplog.at_level(logging.WARNING, logger="megatron_adapt"):
        found = diagnose(base, model)
    assert abs(found["matrices"]["input"]["kept_rows"]["mean_cosine"]) < 0.1
    assert "point elsewhere than in --base (mean cosine" in caplog.text


# ---------------------------------------------------------------- refusals


def test_a_model_that_was_not_resized_from_the_base_is_refused(tmp_path, model):
    wide = write_llama(tmp_path / "wide", hidden_size=48)
    with pytest.raises(
        CheckpointError, match=r"model: of width 32 with untied matrices, .*wide of width 48 with untied"
    ):
        diagnose(wide, model)
    tied = write_llama(tmp_path / "tied", tie_word_embeddings=True)
    with pytest.raises(
        CheckpointError, match=r"tied of width 32 with tied; name the model it was resized from: --base"
    ):
        diagnose(tied, model)


def test_a_model_without_new_tokens_is_refused(base):
    with pytest.raises(
        CheckpointError, match=r"has no token that .*base lacks; name a model that tools/resize_vocab.py"
    ):
        diagnose(base, base)


def test_a_tokenizer_larger_than_the_matrices_is_refused(tmp_path, base, model):
    write_extended_tokenizer(base, tmp_path / "base", NEW)
    with pytest.raises(CheckpointError, match="base: the model has 264 rows, its tokenizer 268 ids; give it the rows"):
        diagnose(base, model)


def test_missing_and_empty_inputs_are_refused(tmp_path, base, model):
    with pytest.raises(DataError, match=r"--corpora: .*none.jsonl is not a file"):
        diagnose(base, model, corpora=(f"a={tmp_path / 'none.jsonl'}",))
    with pytest.raises(ConfigError, match="--corpora: 'a' is not NAME=PATH"):
        diagnose(base, model, corpora=("a",))
    empty = write_lines(tmp_path / "empty.jsonl", [{"text": ""}])
    with pytest.raises(DataError, match=r"--corpora: a holds no text \(.*empty.jsonl\); check the files"):
        diagnose(base, model, corpora=(f"a={empty}",))
    with pytest.raises(DataError, match=r"--parallel: .*none is not a file"):
        diagnose(base, model, parallel=tmp_path / "none", parallel_keys=("a", "b"))
    with pytest.raises(DataError, match="no translation is left of 0"):
        diagnose(base, model, parallel=write_lines(tmp_path / "p", [{"a": "cat", "b": "xx"}]), parallel_keys=("a", "b"))
    words = tmp_path / "words.tsv"
    words.write_text("cat\tb\n")
    with pytest.raises(DataError, match=r"no translation is left of 1 .*1 without a new token"):
        diagnose(base, model, dictionary=words)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dictionary": "d", "parallel": "p"}, "--dictionary: d and --parallel p are two sources of translations"),
        ({"parallel": "p"}, r"--parallel-keys: \(\) are not two keys; name them: en ja"),
        ({"parallel": "p", "parallel_keys": ("en", "en")}, r"--parallel-keys: \('en', 'en'\) are not two keys"),
        ({"parallel_keys": ("en", "ja")}, "--parallel-keys: has no effect without --parallel; leave it out"),
        ({"max_word_tokens": 0}, "--max-word-tokens: 0 is below 1; use 1 or more"),
        ({"num_examples": 0}, "--num-examples: 0 is below 1; use 1 or more"),
        ({"count_bytes": -1}, "--count-bytes: -1 is below 0; 0 counts in all"),
    ],
)
def test_settings_that_contradict_are_refused(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        DiagnoseVocab(base=tmp_path, model=tmp_path, **settings)


def test_flags_are_flat():
    flags = "--base b --model m --corpora en=f ja=g --parallel p --parallel-keys en ja --json o --max-bytes 9"
    config = load_config(DiagnoseVocab, flags.split())
    assert (str(config.base), config.corpora, config.parallel_keys) == ("b", ("en=f", "ja=g"), ("en", "ja"))
    assert config.settings.max_bytes == 9
