"""Drift counts documents whose old-language text is cut differently, and nothing else."""

import json
from dataclasses import replace

import pytest
from tokenizers import Tokenizer

from megatron_adapt.config import BuildTokenizer, TokenizerSettings
from megatron_adapt.errors import DataError
from megatron_adapt.tokenizer.drift import measure_drift
from tests.tokenizer.bases import make_texts, write_corpus
from tests.tokenizer.guarantees import encode, extend

ENGLISH = make_texts("en", 60, seed=5)


def drift_config(base, texts, tmp_path, **settings) -> BuildTokenizer:
    corpus = write_corpus(tmp_path / "old.jsonl", texts)
    return BuildTokenizer(
        base=base.folder,
        corpus=(corpus,),
        old_corpus=(corpus,),
        output=tmp_path / "unused",
        settings=TokenizerSettings(**settings),
    )


@pytest.fixture(scope="module", params=["byte_level", "sentencepiece"])
def pair(request, bases, tmp_path_factory):
    """A base, and it extended by pieces of Russian."""
    base = bases[request.param]
    output = tmp_path_factory.mktemp("russian") / "out"
    return base, extend(base.folder, output, make_texts("ru"), ("Cyrillic",), size=80)


def test_text_in_other_scripts_does_not_drift(pair, tmp_path):
    base, made = pair
    drift = measure_drift(base, made, drift_config(base, ENGLISH, tmp_path, scripts=("Cyrillic",)))
    assert (drift.documents, drift.touched, drift.changed) == (60, 0, 0)
    assert drift.base_tokens == drift.tokens == sum(map(len, encode(base, ENGLISH)))
    assert drift.bytes == sum(len(text.encode()) for text in ENGLISH)
    assert drift.figures["share"] == 0


def test_a_quotation_is_touched_and_not_changed(pair, tmp_path):
    base, made = pair
    quoting = [f"{text} {quotation}" for text, quotation in zip(ENGLISH[:7], make_texts("ru", 7), strict=True)]
    drift = measure_drift(
        base, made, drift_config(base, [*quoting, *ENGLISH[7:]], tmp_path, scripts=("Cyrillic",), max_drift=0.0)
    )
    assert (drift.touched, drift.changed) == (7, 0)
    assert drift.tokens < drift.base_tokens


def test_without_scripts_every_other_token_is_a_change(pair, tmp_path):
    base, made = pair
    texts = [*ENGLISH[:9], *make_texts("ru", 1)]
    drift = measure_drift(base, made, drift_config(base, texts, tmp_path))
    assert (drift.touched, drift.changed, drift.share) == (1, 1, 0.1)


def test_pieces_of_the_old_language_are_a_change_even_with_scripts(bases, tmp_path):
    base = bases["byte_level"]
    made = extend(base.folder, tmp_path / "english", make_texts("en", seed=1), size=80)
    config = drift_config(base, ENGLISH, tmp_path, scripts=("Cyrillic",))
    same = sum(old == new for old, new in zip(encode(base, ENGLISH), encode(made, ENGLISH), strict=True))
    assert measure_drift(base, made, config).changed == len(ENGLISH) - same > 0
    refused = drift_config(base, ENGLISH, tmp_path, scripts=("Cyrillic",), max_drift=0.001)
    with pytest.raises(DataError, match=r"of 60 documents \(.*%\) would change, the first '.*max_drift allows 0.10%"):
        measure_drift(base, made, refused)


def test_ids_that_only_moved_are_no_change(bases, tmp_path):
    base = bases["byte_level"]
    made = extend(base.folder, tmp_path / "moved", make_texts("ru"), ("Cyrillic",), size=10)
    stored = json.loads(made.tokenizer.to_str())
    # Swap the ids of two pieces that English uses: documents have other ids and the same pieces.
    ids = sorted(set(encode(base, ENGLISH)[0]))[:2]
    one, two = map(made.tokenizer.id_to_token, ids)
    stored["model"]["vocab"] |= {one: ids[1], two: ids[0]}
    (tmp_path / "moved" / "tokenizer.json").write_text(json.dumps(stored))
    moved = replace(made, tokenizer=Tokenizer.from_str(json.dumps(stored)))
    assert encode(moved, ENGLISH) != encode(base, ENGLISH)
    drift = measure_drift(base, moved, drift_config(base, ENGLISH, tmp_path, scripts=("Cyrillic",)))
    assert (drift.touched, drift.changed) == (0, 0)


def test_without_an_old_corpus_nothing_is_measured_and_an_empty_one_is_refused(pair, tmp_path):
    base, made = pair
    config = drift_config(base, [""], tmp_path)
    with pytest.raises(DataError, match=r"--old-corpus: .*old.jsonl hold no text"):
        measure_drift(base, made, config)
    without = BuildTokenizer(base=base.folder, corpus=config.corpus, output=config.output)
    assert measure_drift(base, made, without) is None
