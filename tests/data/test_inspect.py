import json

import pytest

from megatron_adapt.config import DescribeTokens, PreprocessData, ShowTokens
from megatron_adapt.config.data import DataSettings
from megatron_adapt.data.encode import preprocess_data
from megatron_adapt.data.inspect import describe_tokens, show_tokens
from megatron_adapt.errors import ConfigError, DataError
from tests.helpers.tiny import write_byte_tokenizer

TEXTS = ["ab cd", "a much longer text than the others", "é"]


@pytest.fixture
def tokenizer(tmp_path):
    return write_byte_tokenizer(tmp_path / "tokenizer")


@pytest.fixture
def prefix(tmp_path, tokenizer):
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    settings = DataSettings(append_eod=True)
    preprocess_data(
        PreprocessData(input=(source,), tokenizer=tokenizer, output_prefix=tmp_path / "t", settings=settings)
    )
    return tmp_path / "t"


def test_a_document_comes_back_as_text(prefix, tokenizer, capsys):
    for number, text in enumerate(TEXTS):
        shown = show_tokens(ShowTokens(prefix=prefix, tokenizer=tokenizer, document=number))
        assert shown.removeprefix("<s>").removesuffix("</s>") == text
    assert TEXTS[1] in capsys.readouterr().out


def test_windows_share_one_token_with_the_next(prefix, tokenizer):
    first, second = (
        show_tokens(ShowTokens(prefix=prefix, tokenizer=tokenizer, window=number, seq_length=8, pieces=True)).split(
            "\n"
        )
        for number in (0, 1)
    )
    assert len(first) == len(second) == 9
    assert first[-1] == second[0]
    assert first[0].split("\t")[0] == "0"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"document": 3}, r"--document: 3 is not below 3, the number .*t\.bin has"),
        ({"window": 9999}, r"--window: 9999 is not below \d+"),
        ({"document": -1}, r"--document: -1 is not below 3"),
    ],
)
def test_a_number_that_is_not_there_is_refused(prefix, tokenizer, asked, message):
    with pytest.raises(ConfigError, match=message):
        show_tokens(ShowTokens(prefix=prefix, tokenizer=tokenizer, **asked))


@pytest.mark.parametrize("asked", [{}, {"document": 1, "window": 1}])
def test_one_of_document_and_window_is_asked_for(prefix, tokenizer, asked):
    with pytest.raises(ConfigError, match="--document, --window: give one of the two"):
        ShowTokens(prefix=prefix, tokenizer=tokenizer, **asked)


def test_another_tokenizer_is_refused(prefix, tmp_path):
    other = write_byte_tokenizer(tmp_path / "other", 310)
    with pytest.raises(DataError, match=r"made by tokenizer \w+, .*other is \w+; name the tokenizer it was made with"):
        show_tokens(ShowTokens(prefix=prefix, tokenizer=other, document=0))


def test_figures_are_those_of_a_hand_count(prefix, tmp_path, capsys):
    figures = describe_tokens(DescribeTokens(prefix=(prefix,), json=tmp_path / "f.json"))[str(prefix)]
    assert (figures.documents, figures.bytes) == (3, sum(len(text.encode()) for text in TEXTS))
    assert figures.eod_share == 3 / figures.tokens
    assert figures.longest == max(len(text.encode()) for text in TEXTS) - 1 + 2  # "mu" and others are one piece
    assert list(figures.length_quantiles) == ["5%", "50%", "95%"]
    stored = json.loads((tmp_path / "f.json").read_text())[str(prefix)]
    assert stored["tokens"] == figures.tokens
    assert "vocabulary used" in capsys.readouterr().out
