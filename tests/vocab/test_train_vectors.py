import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest

from megatron_adapt.config import VocabSettings
from megatron_adapt.errors import ConfigError
from megatron_adapt.vocab.train_vectors import Training, train_vectors

TRAINING = {"epochs": 2, "min_count": 2, "negative": 3, "shortest": 1, "longest": 3}
SENTENCES = [["katze", "und", "hund"], ["katze", "kater", "und"], ["selten"]] * 2 + [["einmal"]]
SCRIPT = """
import hashlib
from tests.vocab.test_train_vectors import train
print(hashlib.sha256(train().vectors_ngrams.tobytes()).hexdigest())
"""


def train(sentences=SENTENCES, seed=1, **training):
    settings = VocabSettings(method="focus", vector_size=8, seed=seed)
    return train_vectors(lambda: iter(sentences), Training(**{**TRAINING, **training}), settings)


def test_two_runs_in_processes_that_hash_strings_differently_give_the_same_bits():
    here = hashlib.sha256(train().vectors_ngrams.tobytes()).hexdigest()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == here, done.stderr
    assert hashlib.sha256(train(seed=2).vectors_ngrams.tobytes()).hexdigest() != here


def test_texts_of_seen_n_grams_have_a_vector_and_those_of_none_have_zeros():
    vectors = train()
    assert set(vectors.key_to_index) == {"katze", "und", "hund", "kater", "selten"}
    assert vectors.get_vector("katz").any()
    assert not vectors.get_vector("日本").any()
    assert np.allclose(np.linalg.norm(vectors.vectors_ngrams, axis=1).astype(bool).sum(), 60, atol=30)


def test_a_corpus_without_frequent_words_gives_none():
    assert len(train([["a", "b"]])) == 0
    assert len(train([])) == 0


def test_gensim_must_be_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "gensim.models", None)
    message = r"vocab\.method: training vectors needs gensim, which is not installed; install the extra: pip install"
    with pytest.raises(ConfigError, match=message):
        train()
