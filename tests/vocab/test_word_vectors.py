"""Files of word vectors: what a token text takes from them, what they look like, what is refused; rotations."""

import gzip
import re

import numpy as np
import pytest
import torch
from gensim.models.fasttext import FastText, save_facebook_model
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_adapt.errors import ConfigError, DataError
from megatron_adapt.vocab import word_vectors
from megatron_adapt.vocab.word_vectors import (
    fit_rotation,
    is_fasttext_binary,
    list_variants,
    read_dictionary,
    read_word_vectors,
)

LINES = "the 1 0\ncat 0 1\ncats 2 2\ncat 9 9\n"


def write(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_a_word_takes_its_vector_and_any_other_text_the_mean_of_the_words_around_it_by_rank(tmp_path):
    path = write(tmp_path / "x.vec", LINES)
    found = read_word_vectors(path, ["cat", "at", "t", "zz", "", "cat"], {"the", "dog"})
    # "t" is in the first, second, third and fourth line; "cat" once more is no word of its own.
    expected = [[0, 1], [2 / 3 + 9 / 4, 1 / 2 + 2 / 3 + 9 / 4], [1 + 2 / 3 + 9 / 4, 1 / 2 + 2 / 3 + 9 / 4]]
    assert torch.allclose(found.rows[:3], torch.tensor(expected))
    assert not found.rows[3:5].any()
    assert torch.equal(found.rows[5], found.rows[0])
    assert {word: row.tolist() for word, row in found.words.items()} == {"the": [1, 0]}


@given(st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=12), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_a_text_takes_the_first_words_that_contain_it_and_no_more(tmp_path_factory, words, most):
    path = tmp_path_factory.mktemp("vec") / "x.vec"
    write(path, "".join(f"{word} {2.0**at} 1\n" for at, word in enumerate(words)))
    texts = ["a", "ab", "bb", "aba"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(word_vectors, "_MOST_WORDS", most)
        rows = read_word_vectors(path, texts).rows
    for text, row in zip(texts, rows, strict=True):
        ranks = [rank for rank, word in enumerate(words) if text in word and text != word][:most]
        expected = np.sum([[2.0**rank / (rank + 1), 1 / (rank + 1)] for rank in ranks], 0) if ranks else [0, 0]
        if text in words:
            expected = [2.0 ** words.index(text), 1]
        assert np.allclose(row, expected, rtol=1e-5)


@pytest.mark.parametrize("header", ["", "4 2\n"], ids=["bare", "with a header"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_all_forms_of_a_text_file_say_the_same(tmp_path, header, pack):
    path = write(tmp_path / "x", pack((header + LINES.replace("\n", " \n")).encode()))
    assert not is_fasttext_binary(path)
    plain = read_word_vectors(write(tmp_path / "plain", LINES), ["cat", "at"]).rows
    assert torch.equal(read_word_vectors(path, ["cat", "at"]).rows, plain)


def test_words_with_spaces_bad_bytes_and_very_long_ones_are_left_out(tmp_path):
    odd = b"the 1 0\nnew york 5 5\n\xff\xfe 5 5\n" + b"x" * 41 + b" 5 5\n"
    found = read_word_vectors(write(tmp_path / "x.vec", odd), ["new", "york", "x", "he"])
    assert found.rows.tolist() == [[0, 0], [0, 0], [0, 0], [1, 0]]


@pytest.fixture(scope="module")
def binary(tmp_path_factory):
    path = tmp_path_factory.mktemp("bin") / "model.bin"
    model = FastText([["katze", "hund", "kater"] * 5] * 5, vector_size=4, min_count=1, bucket=50, workers=1, seed=1)
    save_facebook_model(model, str(path))
    return path, model.wv


def test_a_fasttext_model_has_vectors_for_words_and_all_other_texts(binary):
    path, vectors = binary
    assert is_fasttext_binary(path)
    found = read_word_vectors(path, ["hund", "katz", ""], {"hund", "katz"})
    assert np.allclose(found.rows[0], vectors["hund"], atol=1e-6)
    assert np.allclose(found.rows[1], vectors["katz"], atol=1e-6)
    assert not found.rows[2].any()
    assert list(found.words) == ["hund"]


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "x: no word vectors in it; name a .vec, .vec.gz or fastText .bin file"),
        ("3 2\n", "x: no word vectors in it"),
        ("the\n", "x:1: 0 numbers behind the word, where the first line has 0; name a"),
        ("the one two\n", "x:1: no word vector (could not convert string to float"),
        ("the 1 0\ncat 1\n", "x:2: 1 numbers behind the word, where the first line has 2; name a"),
        ("2 2\nthe 1 0\ncat 1 nan\n", "x:3: the vector of 'cat' holds NaN or infinity; mend the file"),
        ("the 1 0\ncat inf 1\n", "x:2: the vector of 'cat' holds NaN or infinity"),
        ("the 1 0\ncat 1 b\n", "x:2: no word vector (could not convert"),
        (gzip.compress(LINES.encode() * 50, mtime=0)[:-9], "x: cannot be read as word vectors (Compressed file ended"),
        ((793712314).to_bytes(4, "little") + b"\x0c\0\0\0abc", "x: cannot be read as word vectors (unpack requires"),
    ],
)
def test_files_that_are_none_are_refused_by_place(tmp_path, content, message):
    with pytest.raises(DataError, match=re.escape(message)):
        read_word_vectors(write(tmp_path / "x", content), ["cat"])


def test_a_missing_file_and_a_model_with_nan_are_refused(tmp_path, binary):
    with pytest.raises(DataError, match=r"none\.vec: cannot be read as word vectors \(.*No such file"):
        is_fasttext_binary(tmp_path / "none.vec")
    data = bytearray(binary[0].read_bytes())
    row = binary[1].vectors_vocab[binary[1].key_to_index["hund"]].tobytes()
    at = data.find(row)
    data[at : at + 4] = np.float32("nan").tobytes()
    with pytest.raises(DataError, match=r"x\.bin: the vector of 'hund' holds NaN or infinity; mend the file"):
        read_word_vectors(write(tmp_path / "x.bin", bytes(data)), ["hund"])


def test_a_fasttext_model_needs_gensim(binary, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gensim.models", None)
    with pytest.raises(ConfigError, match=r"reading .*model\.bin needs gensim, which is not installed; install the"):
        read_word_vectors(binary[0], ["hund"])


# ---------------------------------------------------------------- dictionaries and rotations


def test_a_dictionary_is_read_with_its_cases(tmp_path):
    pairs = read_dictionary(write(tmp_path / "d.tsv", "Dog\tHund\n\nnew york \t neu york\r\n"))
    assert pairs == [("Dog", "Hund"), ("new york", "neu york")]
    assert list_variants(pairs[:1]) == [("Dog", "Hund"), ("dog", "hund")]
    assert list_variants([("dog", "hund")]) == [("dog", "hund"), ("Dog", "Hund")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "d: no translations in it; write a word of the old language, a tab"),
        ("a\tb\ndog hund\n", "d:2: 'dog hund' is not a word, a tab and a word; correct the line"),
        ("a\tb\tc\n", r"d:1: 'a\tb\tc' is not a word, a tab and a word"),
        ("a\t\n", "d:1: 'a' is not a word"),
        (b"\xff\t\xfe\n", "d: cannot be read as a dictionary ('utf-8' codec"),
    ],
)
def test_a_file_that_is_no_dictionary_is_refused(tmp_path, content, message):
    with pytest.raises(DataError, match=re.escape(message)):
        read_dictionary(write(tmp_path / "d", content))
    with pytest.raises(DataError, match=r"none: cannot be read as a dictionary \(.*No such file"):
        read_dictionary(tmp_path / "none")


@pytest.mark.parametrize("width", [2, 50])
def test_procrustes_finds_a_rotation_again(width):
    torch.manual_seed(1)
    rotation = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64)).Q
    left = torch.randn(3 * width, width)
    found = fit_rotation(left, (left.double() @ rotation).float())
    assert torch.allclose(found, rotation, atol=1e-5)
    # Orthogonal also where nothing fits.
    found = fit_rotation(left, torch.randn(3 * width, width))
    assert torch.allclose(found @ found.T, torch.eye(width, dtype=torch.float64), atol=1e-10)
