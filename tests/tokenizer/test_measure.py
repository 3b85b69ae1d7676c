import json
import re

import pytest

from megatron_adapt.config import MeasureTokenizer
from megatron_adapt.errors import ConfigError, DataError
from megatron_adapt.tokenizer.measure import measure, measure_tokenizer
from tests.tokenizer.bases import make_texts, write_corpus


def test_figures_by_hand(bases):
    tokenizer = bases["byte_level"]
    pieces = tokenizer.tokenizer.get_vocab()
    assert "Ġthe" in pieces
    figures = measure(tokenizer, [" the the", " é", ""])
    # Ġthe Ġthe, then Ġ and two bytes
    assert (figures.documents, figures.bytes, figures.characters, figures.words, figures.tokens) == (3, 11, 10, 3, 5)
    assert figures.tokens_per_word == pytest.approx(5 / 3)
    assert figures.tokens_per_character == pytest.approx(0.5)
    assert figures.tokens_per_byte == pytest.approx(5 / 11)
    assert figures.bytes_per_token == pytest.approx(11 / 5)
    assert figures.single_token_words == pytest.approx(2 / 3)
    assert figures.vocabulary_used == pytest.approx(4 / 418)


def test_no_text_gives_zeros(base):
    figures = measure(base, [])
    assert (figures.tokens, figures.tokens_per_word, figures.bytes_per_token, figures.single_token_words) == (
        0,
        0,
        0,
        0,
    )


def test_special_tokens_in_the_text_are_no_use_of_the_vocabulary(base):
    assert measure(base, [base.tokenizer.id_to_token(base.eos_id)]).vocabulary_used == 0


def test_a_sentencepiece_word_counts_with_its_space(bases):
    assert "▁the" in bases["sentencepiece"].tokenizer.get_vocab()
    assert measure(bases["sentencepiece"], ["the the"]).single_token_words == 1


def test_the_tool_writes_figures_by_tokenizer_and_language(bases, tmp_path, capsys):
    corpora = [write_corpus(tmp_path / f"{language}.jsonl", make_texts(language, 30)) for language in ("en", "ru")]
    config = MeasureTokenizer(
        tokenizers=tuple(f"{kind}={base.folder}" for kind, base in bases.items()),
        corpora=tuple(f"{path.stem}={path}" for path in corpora),
        json=tmp_path / "out.json",
    )
    figures = measure_tokenizer(config)
    written = json.loads((tmp_path / "out.json").read_text())
    assert set(written) == {"byte_level", "sentencepiece"}
    assert written["sentencepiece"]["ru"]["tokens_per_byte"] == figures["sentencepiece"]["ru"].tokens_per_byte
    assert (tmp_path / "out.stage.json").is_file()
    assert re.search(r"ru\s+│ sentencepiece │ 0.0\d MB", capsys.readouterr().out)


def test_max_bytes_limits_the_text(bases, tmp_path):
    path = write_corpus(tmp_path / "en.jsonl", ["in the"] * 100)
    config = MeasureTokenizer(tokenizers=(f"b={bases['byte_level'].folder}",), corpora=(f"en={path}",), max_bytes=10)
    assert measure_tokenizer(config)["b"]["en"].documents == 2


def test_wrong_arguments_are_refused(bases, tmp_path):
    folder = bases["byte_level"].folder
    empty = write_corpus(tmp_path / "en.jsonl", [""])
    with pytest.raises(ConfigError, match="--tokenizers: 'a' names 2 folders"):
        measure_tokenizer(MeasureTokenizer(tokenizers=(f"a={folder}", f"a={folder}"), corpora=(f"en={empty}",)))
    with pytest.raises(DataError, match="--corpora: en holds no text"):
        measure_tokenizer(MeasureTokenizer(tokenizers=(f"a={folder}",), corpora=(f"en={empty}",)))
    with pytest.raises(DataError, match="is not a file"):
        measure_tokenizer(MeasureTokenizer(tokenizers=(f"a={folder}",), corpora=(f"en={tmp_path / 'x'}",)))
