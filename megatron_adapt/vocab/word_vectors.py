"""Vectors of token texts from files of word vectors, and the rotation that lays one file's space on another's.

Reads: the text format of word2vec and fastText (``.vec``, packed by gzip or not; a first line of two counts may be
missing), or the ``.bin`` of fastText, told apart by content. Writes nothing.

- In a text file, a token text that is a word takes its vector. Any other takes the mean of the 100 first words that
  contain it, weighted by 1 / rank: such files begin with the most frequent words, and by Zipf's law that is about how
  often they occur (WECHSEL weighs by frequency; Minixhofer et al. 2022, arXiv 2112.06598). None has no vector.
- A ``.bin`` has vectors of n-grams, so that every text has a vector.

1. ``read_word_vectors`` reads a file once.
2. ``read_dictionary`` and ``list_variants`` give pairs of words, ``fit_rotation`` the orthogonal map with the least
   squared distance between them (Procrustes; Schoenemann 1966).

Costs: for a text file a pass, in which only the vectors of words that some token takes are parsed, and memory of one
vector for each token text; for a ``.bin`` the memory that gensim takes to load it, more than the file.
"""

import gzip
import re
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import numpy as np
import torch

from megatron_adapt.errors import DataError
from megatron_adapt.logs import show_progress
from megatron_adapt.vocab.train_vectors import load_gensim

_MOST_WORDS = 100
_LONGEST_WORD = 40  # characters; longer ones are addresses and the like
_GZIP, _FASTTEXT = b"\x1f\x8b", (793712314).to_bytes(4, "little")
_HEADER = re.compile(rb"\d+ \d+\s*")
_NAME_ONE = "name a .vec, .vec.gz or fastText .bin file"


@dataclass(frozen=True)
class WordVectors:
    """What a file says of texts and words; all vectors as they stand there, of any length."""

    rows: torch.Tensor
    "Of the texts: [n, columns], fp32; zeros for a text that has none."
    words: dict[str, np.ndarray]
    "Of those words that the file knows as words."


def read_word_vectors(path: Path, texts: Sequence[str], words: Collection[str] = ()) -> WordVectors:
    """Read vectors of token texts, and of words.

    Args:
        path: the file.
        texts: texts of tokens, without white space around them; an empty one has no vector.
        words: words to return, where the file has them.

    Raises:
        ConfigError: it is a ``.bin``, and gensim is not installed.
        DataError: the file is missing, damaged, of no known form, or holds NaN or infinity.
    """
    if is_fasttext_binary(path):
        return _read_binary(path, texts, set(words))
    return _TextReader(path, texts, set(words)).read()


def is_fasttext_binary(path: Path) -> bool:
    """Tell whether a file of vectors is a fastText model.

    Raises:
        DataError: it is missing or cannot be read.
    """
    try:
        with _open(path) as file:
            return file.read(len(_FASTTEXT)) == _FASTTEXT
    except (OSError, EOFError, zlib.error) as error:
        raise _refuse(path, error) from None


def _open(path: Path) -> IO[bytes]:
    with path.open("rb") as file:
        is_packed = file.read(len(_GZIP)) == _GZIP
    return cast(IO[bytes], gzip.open(path, "rb")) if is_packed else path.open("rb")


def _refuse(path: Path, error: Exception) -> DataError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return DataError(f"{path}: cannot be read as word vectors ({reason}); {_NAME_ONE}")


def _read_binary(path: Path, texts: Sequence[str], words: set[str]) -> WordVectors:
    fasttext = load_gensim(f"reading {path}")
    try:
        vectors = fasttext.load_facebook_vectors(str(path))
    except Exception as error:  # gensim raises whatever it stumbles over
        raise _refuse(path, error) from None
    rows = np.zeros((len(texts), vectors.vector_size), np.float32)
    for at, text in enumerate(texts):
        if text:
            rows[at] = vectors.get_vector(text)
    found = {word: np.array(vectors.get_vector(word)) for word in sorted(words) if word in vectors.key_to_index}
    for text, row in (*zip(texts, rows, strict=True), *found.items()):
        if not np.isfinite(row).all():
            raise DataError(f"{path}: the vector of {text!r} holds NaN or infinity; mend the file or name another")
    return WordVectors(torch.from_numpy(rows), found)


class _TextReader:
    """Reads a text file once; sums what texts get from the words that contain them."""

    def __init__(self, path: Path, texts: Sequence[str], words: set[str]) -> None:
        self._path, self._texts, self._words = path, texts, words
        self._places = {text: at for at, text in enumerate(sorted({*texts} - {""}))}
        # Texts that still take words, with how many they have taken.
        self._open = dict.fromkeys(self._places, 0)
        self._longest = max(map(len, self._places), default=0)
        self._sums = np.zeros((len(self._places), 0), np.float32)
        self._found: dict[str, np.ndarray] = {}
        self._seen: set[str] = set()

    def read(self) -> WordVectors:
        """Return what the file says."""
        rank = 0
        try:
            for number, line in self._read_lines():
                name, _, values = line.rstrip(b" \r\n").partition(b" ")
                rank += 1
                if rank == 1:
                    self._sums = np.zeros((len(self._places), len(values.split())), np.float32)
                    self._parse(name.decode(errors="replace"), values, number)
                if self._has_all(values, number):
                    self._take(name, values, rank, number)
        except (OSError, EOFError, zlib.error) as error:
            raise _refuse(self._path, error) from None
        if not rank:
            raise DataError(f"{self._path}: no word vectors in it; {_NAME_ONE}")
        rows = np.zeros((len(self._texts), self._sums.shape[1]), np.float32)
        for at, text in enumerate(self._texts):
            if text:
                rows[at] = self._sums[self._places[text]]
        return WordVectors(torch.from_numpy(rows), self._found)

    def _read_lines(self) -> Iterator[tuple[int, bytes]]:
        with _open(self._path) as file, show_progress(f"reading {self._path.name}", None, "MB") as advance:
            for number, line in enumerate(file, start=1):
                advance(len(line) / 1e6)
                if line.strip() and not (number == 1 and _HEADER.fullmatch(line)):
                    yield number, line

    def _has_all(self, values: bytes, number: int) -> bool:
        """Tell whether a line is a word and its vector; more fields are a word with spaces in it, which is left out."""
        width = self._sums.shape[1]
        if values.count(b" ") + 1 == width:
            return True
        num_values = len(values.split())
        if num_values < width or not width:
            raise DataError(
                f"{self._path}:{number}: {num_values} numbers behind the word, where the first line has {width}; "
                f"{_NAME_ONE}"
            )
        return num_values == width

    def _take(self, name: bytes, values: bytes, rank: int, number: int) -> None:
        try:
            word = name.decode()
        except UnicodeDecodeError:
            return
        places = self._list_places(word)
        is_text = word in self._places and word not in self._seen
        is_word = word in self._words and word not in self._found
        if not (places or is_text or is_word):
            return
        vector = self._parse(word, values, number)
        if is_word:
            self._found[word] = vector
        if is_text:
            self._seen.add(word)
            self._open.pop(word, None)
            self._sums[self._places[word]] = vector
        self._sums[places] += vector / np.float32(rank)

    def _list_places(self, word: str) -> list[int]:
        """Return the places of the texts that are part of a word, still take words, and are not the word itself."""
        if len(word) > _LONGEST_WORD or not self._open:
            return []
        parts = {
            word[start:stop]
            for start in range(len(word))
            for stop in range(start + 1, min(start + self._longest, len(word)) + 1)
        }
        found = []
        for part in parts & self._open.keys() - {word}:
            found.append(self._places[part])
            self._open[part] += 1
            if self._open[part] == _MOST_WORDS:
                del self._open[part]
        return found

    def _parse(self, word: str, values: bytes, number: int) -> np.ndarray:
        try:
            vector = np.array(values.split(), np.float32)
        except ValueError as error:
            raise DataError(f"{self._path}:{number}: no word vector ({error}); {_NAME_ONE}") from None
        if not np.isfinite(vector).all():
            raise DataError(
                f"{self._path}:{number}: the vector of {word!r} holds NaN or infinity; mend the file or name another"
            )
        return vector


def read_dictionary(path: Path) -> list[tuple[str, str]]:
    """Read translations, a pair a line with a tab between; blank lines are skipped.

    Raises:
        DataError: it is missing, empty, no UTF-8, or a line is no pair.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a dictionary ({error}); name a file of UTF-8 text") from None
    pairs = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        words = [part.strip() for part in line.split("\t")]
        if len(words) != 2 or not all(words):
            raise DataError(f"{path}:{number}: {line.strip()[:60]!r} is not a word, a tab and a word; correct the line")
        pairs.append((words[0], words[1]))
    if not pairs:
        raise DataError(f"{path}: no translations in it; write a word of the old language, a tab, one of the new")
    return pairs


def list_variants(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the pairs as written, in lower and in title case, each once (as WECHSEL does)."""
    cases = (str, str.lower, str.title)
    return list(dict.fromkeys((case(left), case(right)) for left, right in pairs for case in cases))


def fit_rotation(left_ND: torch.Tensor, right_ND: torch.Tensor) -> torch.Tensor:
    """Return the orthogonal matrix W [D, D], fp64, with the least squared distance of ``left W`` and ``right``."""
    left, _, right = torch.linalg.svd(left_ND.double().T @ right_ND.double())
    rotation: torch.Tensor = left @ right
    return rotation
