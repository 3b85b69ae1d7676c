"""Tokens of two tokenizers, by what became of them, by script and by use."""

import numpy as np
import pytest

from megatron_adapt.config import BuildTokenizer, TokenizerSettings
from megatron_adapt.errors import CheckpointError
from megatron_adapt.tokenizer.build import build_tokenizer
from megatron_adapt.tokenizer.id_map import IdMap, read_id_map
from megatron_adapt.tokenizer.pieces import read_tokenizer, to_letters
from megatron_adapt.vocab.census import (
    Census,
    classify_tokens,
    count_scripts,
    count_tokens,
    describe_use,
    describe_vocabulary,
    name_tokens,
)
from tests.helpers.tiny import write_byte_tokenizer, write_extended_tokenizer
from tests.tokenizer.bases import learn_base, make_texts, write_corpus

# Byte-level letters of "да" and "は", and of a first byte alone.
CYRILLIC = [("Ð", "´"), ("Ð", "°"), ("Ð´", "Ð°")]
NEW = [("t", "h"), ("th", "e"), *CYRILLIC, ("ã", "ģ")]


@pytest.fixture
def base(tmp_path):
    return read_tokenizer(write_byte_tokenizer(tmp_path / "base", 260))


@pytest.fixture
def made(base, tmp_path):
    return read_tokenizer(write_extended_tokenizer(base.folder, tmp_path / "made", NEW))


def test_every_token_is_kept_moved_new_or_dropped(base, made):
    found = describe_vocabulary(Census.of(base, made))
    scripts = found.pop("scripts")
    # th, the; д, а, да as two, two and four bytes; part of a character.
    pieces = [2, 3, 2, 2, 4, 2]
    assert found == {
        "base_vocab_size": 260,
        "vocab_size": 266,
        "kept": 260,
        "moved": 0,
        "new": 6,
        "dropped": 0,
        "pieces_per_new_token": sum(pieces) / len(pieces),
    }
    assert scripts["Latin"] == {"kept": 52 + 2, "moved": 0, "new": 2, "dropped": 0}
    assert scripts["Cyrillic"] == {"kept": 0, "moved": 0, "new": 3, "dropped": 0}
    assert scripts["bytes"] == {"kept": 128, "moved": 0, "new": 1, "dropped": 0}
    assert scripts["special"]["kept"] == 2
    assert sum(sum(counts.values()) for counts in scripts.values()) == 266


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_a_replaced_tokenizer_moves_and_drops_tokens_as_its_id_map_says(tmp_path, kind):
    base = learn_base(tmp_path / "base", kind)
    corpus, old_corpus = (write_corpus(tmp_path / f"{name}.jsonl", make_texts(name)) for name in ("ru", "en"))
    build_tokenizer(
        BuildTokenizer(
            base=base.folder,
            corpus=(corpus,),
            old_corpus=(old_corpus,),
            output=tmp_path / "made",
            settings=TokenizerSettings(method="replace", size="400"),
        )
    )
    made = read_tokenizer(tmp_path / "made")
    id_map = read_id_map(made)
    census = Census.of(base, made)
    assert census.id_map == id_map
    olds = {id_map.old_id(index) for index in range(id_map.vocab_size)} - {None}
    found = describe_vocabulary(census)
    assert found["moved"] == len(id_map.moved) > 0
    assert found["new"] == len(id_map.pieces) > 0
    assert found["dropped"] == base.vocab_size - len(olds) > 0
    scripts = count_scripts(census)
    for way in ("kept", "moved", "new", "dropped"):
        assert sum(counts[way] for counts in scripts.values()) == found[way]
    assert scripts["Latin"]["dropped"] > 0 == scripts["Cyrillic"]["dropped"]
    assert list(scripts) == sorted(scripts, key=lambda name: (-sum(scripts[name].values()), name))


def test_the_script_of_a_token_is_that_of_most_of_its_letters(base, tmp_path):
    texts = ["カード", "語る見", "ab1が", "१२", "ꦀꦁ"]
    spelt = [to_letters(text.encode()) for text in texts]
    merges = dict.fromkeys((word[:at], word[at]) for word in spelt for at in range(1, len(word)))
    made = read_tokenizer(write_extended_tokenizer(base.folder, tmp_path / "texts", list(merges)))
    names, scripts = name_tokens(made), classify_tokens(made)
    found = {text: scripts[names.index(text)] for text in texts}
    # The long vowel sign belongs to both kana, and Javanese is none of the scripts listed.
    assert found == {"カード": "Katakana", "語る見": "Han", "ab1が": "Latin", "१२": "no letters", "ꦀꦁ": "other"}


def test_names_are_texts_and_pieces_where_there_is_no_text(made):
    names = name_tokens(made)
    assert names[0] == "<s>"
    assert names[260:] == ["th", "the", "д", "а", "да", "ãģ"]
    assert " " in names


def test_use_counts_tokens_of_texts(base, made):
    census = Census.of(base, made)
    frequency = count_tokens(made, ["the the", "da да", ""])
    # "the", " ", "the"; "d", "a", " ", "да"
    assert frequency.sum() == 7
    assert frequency[261] == 2
    assert describe_use(census, frequency) == {
        "tokens": 7,
        "share_of_new_tokens": 3 / 7,
        "new_tokens_seen": 2 / 6,
        "vocabulary_used": 5 / 266,
    }
    assert describe_use(census, np.zeros(266, np.int64))["share_of_new_tokens"] == 0


def test_a_model_without_new_tokens_is_refused(base):
    with pytest.raises(CheckpointError, match=r"base: its tokenizer has no token that .*base lacks; name a model that"):
        Census.of(base, base)


def test_a_tokenizer_that_shares_nothing_is_refused(base, tmp_path, monkeypatch):
    other = learn_base(tmp_path / "other", "sentencepiece")
    pieces = {index: [] for index in range(other.vocab_size)}
    nothing = IdMap(base_vocab_size=base.vocab_size, vocab_size=other.vocab_size, moved={}, pieces=pieces)
    monkeypatch.setattr("megatron_adapt.vocab.census.map_ids", lambda base, made: nothing)
    with pytest.raises(CheckpointError, match=r"other: its tokenizer shares no token with .*base; name the model"):
        Census.of(base, other)
