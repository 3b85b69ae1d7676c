import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "examples" / "quickstart" / "make_corpus.py"


def make(output, documents=400, seed=1):
    command = [sys.executable, PROGRAM, "--output", output, "--documents", str(documents), "--seed", str(seed)]
    shown = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    assert "synthetic" in shown
    return {name: [json.loads(line) for line in (output / f"{name}.jsonl").open()] for name in ("en", "qx")}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make(tmp_path_factory.mktemp("corpus"))


def test_a_seed_gives_the_same_stories_and_another_seed_others(tmp_path, corpus):
    assert make(tmp_path / "again") == corpus
    assert make(tmp_path / "other", seed=2)["qx"] != corpus["qx"]


def test_more_documents_begin_with_the_same_ones(tmp_path, corpus):
    longer = make(tmp_path, documents=600)
    assert longer["en"][:400] == corpus["en"]
    assert longer["qx"][:200] == corpus["qx"]


def test_half_of_the_qx_stories_are_told_in_english_too(corpus):
    names = {name: {document["id"] for document in documents} for name, documents in corpus.items()}
    assert (len(names["en"]), len(names["qx"]), len(names["en"] & names["qx"])) == (400, 200, 100)


def test_stories_under_one_id_have_the_same_sentences_and_people(corpus):
    english = {document["id"]: document["text"] for document in corpus["en"]}
    told_twice = [document for document in corpus["qx"] if document["id"] in english]
    for document in told_twice:
        text = english[document["id"]]
        assert len(re.findall(r"[.?]", document["text"])) == len(re.findall(r"[.?]", text))
        assert document["text"].count("\n") == text.count("\n")


def test_the_two_languages_share_no_letter(corpus):
    letters = [
        {letter for document in documents for letter in document["text"] if letter.isalpha()}
        for documents in corpus.values()
    ]
    assert not letters[0] & letters[1]
    assert all(letter.isascii() for letter in letters[0])
    assert all("ა" <= letter <= "ჰ" for letter in letters[1])


def test_stories_differ_and_use_hundreds_of_words(corpus):
    for documents in corpus.values():
        texts = [document["text"] for document in documents]
        assert len(set(texts)) == len(texts)
        words = {word for text in texts for word in re.findall(r"\w+", text)}
        assert len(words) > 700
