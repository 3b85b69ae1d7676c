"""Cut documents into sentences, each a sequence of its document (``preprocess_data --split-sentences``).

Reads: the first texts of the input, to learn abbreviations from, or parameters that are there already (``--lang``).
Writes: what was learned, in the folder of the unfinished run and in the end as PREFIX.sentences.json.
Guarantees: the same input gives the same sentences, on any number of workers and after every restart: what was learned
is found again only where it was learned from the same texts. Nothing is downloaded.

1. ``choose_splitter`` finds the parameters; ``Splitter.keep`` saves learned ones, so that a restart need not learn.
2. ``make_cutter`` gives a worker the function that cuts a text.

What is dropped is decided as in Megatron-LM, whose splitter leaves out all white space between sentences, blanks too,
and behind the last one; ``--keep-newlines`` keeps it, here at the end of a sentence. Ours differs in one thing: a
sentence also ends at a blank line, and at marks such as the full stops of Chinese or Hindi (``corpus/sentences.py``).

Costs: learning takes a second a megabyte, of 50 MB at most; splitting a seventh of a second a megabyte in a worker.
Source: ``tools/preprocess_data.py`` of Megatron-LM.
"""

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from nltk.tokenize.punkt import PunktParameters

from megatron_adapt.config import PreprocessData
from megatron_adapt.corpus.chunks import cut_files
from megatron_adapt.corpus.documents import get_text, limit_texts, parse_line
from megatron_adapt.corpus.sentences import (
    SentenceSplitter,
    export_parameters,
    import_parameters,
    learn_splitter,
    read_installed_splitter,
    read_splitter,
)
from megatron_adapt.errors import DataError
from megatron_adapt.files import require_file, write_json

Cutter = Callable[[str], list[str]]
"A text to its sentences."
LEARNED = "learned"
_LEARNING_BYTES = 50_000_000
_LEARNING_CHARACTERS = 1_000_000
"Of one text; Punkt takes a hundred times as much memory as the text it learns from."
_READ_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Splitter:
    """How documents are cut, as it is sent to workers."""

    parameters: dict[str, Any]
    "Of Punkt."
    keep_newlines: bool
    "Keep the white space between sentences."
    saved_as: str = ""
    "Name of a file for learned parameters; it tells the texts they were learned from."

    def hash_parameters(self) -> str:
        """Return a hash of what decides where sentences end."""
        return hashlib.blake2b(orjson.dumps(self.parameters), digest_size=16).hexdigest()

    def keep(self, folder: Path) -> None:
        """Save learned parameters in the folder of the unfinished run."""
        if self.saved_as and not (folder / self.saved_as).exists():
            write_json(folder / self.saved_as, self.parameters)


def choose_splitter(config: PreprocessData, folder: Path) -> Splitter:
    """Return the splitter that ``config.lang`` names; learned ones are looked for in ``folder`` first.

    Raises:
        ConfigError: nltk_data has no such language.
        DataError: the named file holds no parameters.
    """
    if config.lang.endswith(".json"):
        require_file(Path(config.lang), "--lang")
        return _describe(read_splitter(Path(config.lang)), config)
    if config.lang != LEARNED:
        return _describe(read_installed_splitter(config.lang), config)
    digest, size = hashlib.blake2b(digest_size=16), 0
    for text in _read_beginning(config):
        digest.update(text.encode() + b"\0")
        size += len(text)
    path = folder / f"sentences.{digest.hexdigest()}.json"
    with suppress(DataError):  # what a loss of power left of the file
        return _describe(read_splitter(path), config, path.name)
    # That there is no text is told by the run, with the lines and the reasons.
    splitter = learn_splitter(_read_beginning(config)) if size else SentenceSplitter(PunktParameters())
    return _describe(splitter, config, path.name)


def _describe(splitter: SentenceSplitter, config: PreprocessData, saved_as: str = "") -> Splitter:
    return Splitter(parameters=export_parameters(splitter), keep_newlines=config.keep_newlines, saved_as=saved_as)


def make_cutter(splitter: Splitter) -> Cutter:
    """Return the function that cuts a text into sentences that are not empty."""
    cut = import_parameters(splitter.parameters, "the parent process").split
    if splitter.keep_newlines:
        return cut
    return lambda text: [kept for sentence in cut(text) if (kept := sentence.rstrip())]


def _read_beginning(config: PreprocessData) -> Iterable[str]:
    """Return the texts to learn from; what is wrong with the input is told by the run itself, in its order."""
    return limit_texts(_read_good_texts(config), _LEARNING_BYTES)


def _read_good_texts(config: PreprocessData) -> Iterator[str]:
    with suppress(DataError):
        for chunk in cut_files(config.input, _READ_BYTES, config.plain_text):
            for line in io.BytesIO(chunk.read()):
                for key in config.json_keys:
                    with suppress(DataError):
                        yield get_text(parse_line(line, ""), key, "")[:_LEARNING_CHARACTERS]
