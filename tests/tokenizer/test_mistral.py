"""A published tokenizer of 32,000 and more pieces, extended by every method that keeps it."""

from pathlib import Path

import pytest

from megatron_adapt.config import BuildTokenizer, TokenizerSettings
from megatron_adapt.tokenizer.build import build_tokenizer
from megatron_adapt.tokenizer.model_proto import read_model
from megatron_adapt.tokenizer.pieces import read_tokenizer
from tests.tokenizer.bases import ODD_TEXTS, make_texts, write_corpus
from tests.tokenizer.guarantees import encode, encode_by_model, encode_by_transformers, extend, require_guarantees

mistral_common = pytest.importorskip("mistral_common", reason="mistral-common brings the published model")

MODELS = ("tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3")
TEXTS = {language: make_texts(language, 300) for language in ("en", "ru", "ja", "ar")}
PROBES = [*ODD_TEXTS, *(text for language in TEXTS for text in make_texts(language, 30, seed=9))]
SCRIPTS = ("Cyrillic", "Arabic", "Han", "Hiragana", "Katakana")


@pytest.fixture(scope="module", params=MODELS)
def published(request, tmp_path_factory):
    """The folder a user has who downloaded the model file alone."""
    folder = tmp_path_factory.mktemp("mistral")
    source = Path(mistral_common.__file__).parent / "data" / request.param
    (folder / "tokenizer.model").write_bytes(source.read_bytes())
    return read_tokenizer(folder)


@pytest.fixture(scope="module")
def extended(published, tmp_path_factory):
    texts = [text for language in ("ru", "ja", "ar") for text in TEXTS[language]]
    return extend(published.folder, tmp_path_factory.mktemp("extended") / "out", texts, SCRIPTS, size=300)


def test_its_two_files_agree_before_and_after(published, extended):
    agreed = require_guarantees(published, extended, PROBES, SCRIPTS)
    assert agreed == len(PROBES)
    assert extended.vocab_size == published.vocab_size + 300


def test_transformers_reads_the_same_ids(extended):
    # The markers of chats are cut out of text by tokenizers alone; none is in the probes.
    assert encode_by_transformers(extended, PROBES) == encode(extended, PROBES)


def test_old_pieces_scores_and_kinds_are_untouched(published, extended):
    before, after = (read_model(tokenizer.folder / "tokenizer.model").pieces for tokenizer in (published, extended))
    assert after[: len(before)] == before
    assert len(after) == len(before) + 300


def test_the_new_languages_get_shorter(published, extended):
    for language in ("ru", "ja", "ar"):
        before, after = (sum(map(len, encode(item, TEXTS[language]))) for item in (published, extended))
        assert after < 0.8 * before
    assert encode(extended, TEXTS["en"]) == encode(published, TEXTS["en"])


@pytest.mark.parametrize("method", ["merge", "transplant"])
def test_pieces_from_elsewhere_keep_both_files_equal(published, bases, tmp_path, method):
    donor = extend(bases["byte_level"].folder, tmp_path / "donor", TEXTS["ru"], ("Cyrillic",), size=150)
    own = {"donor": donor.folder} if method == "transplant" else {}
    settings = TokenizerSettings(method=method, size="120", scripts=("Cyrillic",), **own)
    corpus = write_corpus(tmp_path / "ru.jsonl", TEXTS["ru"])
    build_tokenizer(BuildTokenizer(base=published.folder, corpus=(corpus,), output=tmp_path / "out", settings=settings))
    made = read_tokenizer(tmp_path / "out")
    require_guarantees(published, made, PROBES, ("Cyrillic",))
    assert encode_by_model(made, PROBES) == encode(made, PROBES)
    assert sum(map(len, encode(made, TEXTS["ru"]))) < 0.8 * sum(map(len, encode(published, TEXTS["ru"])))
