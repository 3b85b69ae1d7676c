import json
import re

import orjson
import pytest

from megatron_adapt.config import MeasureTokenizer, SweepSettings
from megatron_adapt.errors import ConfigError, DataError
from megatron_adapt.flags import load_config
from megatron_adapt.tokenizer.measure import measure_tokenizer
from tests.tokenizer.bases import make_texts, write_corpus


def write_documents(path, documents):
    path.write_bytes(b"".join(orjson.dumps(document) + b"\n" for document in documents))
    return path


@pytest.fixture
def corpora(tmp_path):
    return tuple(
        f"{language}={write_corpus(tmp_path / f'{language}.jsonl', make_texts(language, 30))}"
        for language in ("en", "ru")
    )


def name_all(bases):
    return tuple(f"{kind}={base.folder}" for kind, base in bases.items())


def test_the_tool_writes_figures_by_tokenizer_and_language(bases, corpora, tmp_path, capsys):
    config = MeasureTokenizer(
        tokenizers=name_all(bases), corpora=corpora, json=tmp_path / "out.json", plot=tmp_path / "out.png"
    )
    figures = measure_tokenizer(config)
    written = json.loads((tmp_path / "out.json").read_text())
    assert list(written) == ["byte_level", "sentencepiece"]
    assert written["sentencepiece"]["ru"]["tokens_per_byte"] == figures["sentencepiece"]["ru"].tokens_per_byte
    assert written["sentencepiece"]["ru"]["premium"] is None
    assert (tmp_path / "out.stage.json").is_file()
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert re.search(r"ru\s+│ sentencepiece │ 0.0\d MB", printed)
    assert "premium" not in printed


def test_flags_of_scripts_keep_their_meaning():
    flags = "--tokenizers a=x b=y --corpora en=f ja=g --json o.json --parity-reference en --sweep 25 50 --base z"
    config = load_config(MeasureTokenizer, [*flags.split(), "--corpus", "g", "--scripts", "Han", "--plot", "o.png"])
    assert (config.tokenizers, config.corpora, str(config.json)) == (("a=x", "b=y"), ("en=f", "ja=g"), "o.json")
    assert (config.settings.sweep, config.settings.scripts) == ((25, 50), ("Han",))


def test_max_bytes_limits_the_text(bases, tmp_path):
    path = write_corpus(tmp_path / "en.jsonl", ["in the"] * 100)
    config = MeasureTokenizer(tokenizers=(f"b={bases['byte_level'].folder}",), corpora=(f"en={path}",), max_bytes=10)
    assert measure_tokenizer(config)["b"]["en"].documents == 2


# ---------------------------------------------------------------- parity


def test_the_premium_compares_documents_of_the_same_id(bases, tmp_path, capsys):
    assert "Ġthe" in bases["byte_level"].tokenizer.get_vocab()
    # 1 + 2 tokens, and one of no translation; in the other language a token for every byte, ids in another order
    english = [{"id": 1, "text": " the"}, {"id": "b", "text": " the the"}, {"id": "c", "text": " the the the"}]
    russian = [{"id": "b", "text": "да"}, {"id": "d", "text": "нет"}, {"id": "1", "text": "яд!"}]
    other = [{"id": "z", "text": "x"}]
    corpora = {"en": english, "ru": russian, "xx": other}
    paths = {language: write_documents(tmp_path / f"{language}.jsonl", rows) for language, rows in corpora.items()}
    config = MeasureTokenizer(
        tokenizers=(f"b={bases['byte_level'].folder}",),
        corpora=tuple(f"{language}={path}" for language, path in paths.items()),
        parity_reference="en",
        json=tmp_path / "out.json",
    )
    figures = measure_tokenizer(config)["b"]
    assert (figures["ru"].parallel_documents, figures["ru"].premium) == (2, pytest.approx((4 + 5) / 3))
    assert (figures["en"].parallel_documents, figures["en"].premium) == (3, 1)
    assert (figures["xx"].parallel_documents, figures["xx"].premium) == (0, None)
    assert json.loads((tmp_path / "out.json").read_text())["b"]["ru"]["premium"] == pytest.approx(3)
    assert re.search(r"ru\s.* 3\.00 │\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("russian", "flags", "message"),
    [
        (
            [{"text": "да"}],
            {},
            r"ru\.jsonl:1: no key 'id' \(keys: text\), which --parity-reference compares .* --id-key",
        ),
        ([{"id": "x", "text": "да"}], {}, r"no document of another language has an id of en's"),
        ([{"id": "a", "text": "да"}] * 3, {}, r"--corpora: 2 of 3 documents of ru have the 'id' of another one"),
        ([{"id": "a", "text": "да"}], {"id_key": "url"}, r"en\.jsonl:1: no key 'url'"),
    ],
)
def test_documents_that_cannot_be_compared_are_refused(bases, tmp_path, russian, flags, message):
    english = write_documents(tmp_path / "en.jsonl", [{"id": "a", "text": "the"}])
    config = MeasureTokenizer(
        tokenizers=(f"b={bases['byte_level'].folder}",),
        corpora=(f"en={english}", f"ru={write_documents(tmp_path / 'ru.jsonl', russian)}"),
        parity_reference="en",
        **flags,
    )
    with pytest.raises(DataError, match=message):
        measure_tokenizer(config)


# ---------------------------------------------------------------- mistakes


def test_wrong_arguments_are_refused(bases, tmp_path):
    folder = bases["byte_level"].folder
    empty = write_corpus(tmp_path / "en.jsonl", [""])
    with pytest.raises(ConfigError, match="--tokenizers: 'a' names 2 folders"):
        measure_tokenizer(MeasureTokenizer(tokenizers=(f"a={folder}", f"a={folder}"), corpora=(f"en={empty}",)))
    with pytest.raises(DataError, match="--corpora: en holds no text"):
        measure_tokenizer(MeasureTokenizer(tokenizers=(f"a={folder}",), corpora=(f"en={empty}",)))
    with pytest.raises(DataError, match="is not a file"):
        measure_tokenizer(MeasureTokenizer(tokenizers=(f"a={folder}",), corpora=(f"en={tmp_path / 'x'}",)))
    with pytest.raises(ConfigError, match=r"--parity-reference: 'de' is not among --corpora \(en\); name one"):
        measure_tokenizer(
            MeasureTokenizer(tokenizers=(f"a={folder}",), corpora=(f"en={empty}",), parity_reference="de")
        )
    with pytest.raises(ConfigError, match="--tokenizers: 'sweep' is the key of --sweep in the JSON"):
        measure_tokenizer(
            MeasureTokenizer(
                tokenizers=(f"sweep={folder}",),
                corpora=(f"en={empty}",),
                settings=SweepSettings(sweep=(25,), base=folder, corpus=(empty,)),
            )
        )
    with pytest.raises(ConfigError, match="--tokenizers: names none; give NAME=DIR of each, or --sweep"):
        MeasureTokenizer(corpora=(f"en={empty}",))
