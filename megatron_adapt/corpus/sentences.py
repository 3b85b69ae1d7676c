"""Cut text into sentences, by Punkt parameters learned from the user's own corpus.

Punkt (Kiss and Strunk 2006, *Unsupervised Multilingual Sentence Boundary Detection*) learns from raw text which words
with a full stop are abbreviations; ``nltk.tokenize.punkt`` does it, and nothing is downloaded. It looks only at
places before white space. Marks that end a sentence and nothing else end one wherever they stand: the full stops of
Japanese and Chinese, the danda of Hindi, the Arabic question mark, every character that Unicode calls
Sentence_Terminal but ``.``, ``?`` and ``!``.

Guarantees: the sentences, end to end, are the text; white space between two belongs to the first, and none is white
space alone. What is learned depends on the texts and their order alone.

1. ``learn_splitter`` reads texts; or ``read_splitter`` what was learned before, or what nltk_data has of a language.
2. ``SentenceSplitter.split`` cuts at blank lines and plain marks, and by Punkt in between.

Costs: learning about 1 MB of text a second, splitting about 3.
"""

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import nltk
import regex
from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer, PunktTrainer, load_punkt_params

from megatron_adapt.errors import ConfigError, DataError
from megatron_adapt.files import read_json, write_json
from megatron_adapt.logs import show_progress

# A mark that can end nothing but a sentence, with the closing quotes and brackets behind it; or a blank line, which is
# looked for once in a run of white space, or a long run would take the square of its length.
_PLAIN_END = regex.compile(r"(?:[\p{Sentence_Terminal}--.?!]+[\p{Pe}\p{Pf}\"']*\s*|(?<!\s)\s*\n\s*\n\s*)", regex.V1)


class SentenceSplitter:
    """Cuts texts by learned parameters."""

    def __init__(self, parameters: PunktParameters) -> None:
        self.parameters = parameters
        self._punkt = PunktSentenceTokenizer(parameters)

    def split(self, text: str) -> list[str]:
        """Return the sentences of ``text``; joined they are the text."""
        sentences: list[str] = []
        start = 0
        for end in [*(found.end() for found in _PLAIN_END.finditer(text)), len(text)]:
            for sentence in self._split_part(text[start:end]):
                if sentences and (sentence.isspace() or sentences[-1].isspace()):
                    sentences[-1] += sentence
                else:
                    sentences.append(sentence)
            start = end
        return sentences

    def _split_part(self, part: str) -> list[str]:
        starts = [start for start, _ in self._punkt.span_tokenize(part)]
        # White space in front of the first sentence has no sentence before it.
        bounds = [0, *starts[1:], len(part)]
        return [part[left:right] for left, right in pairwise(bounds) if right > left]


def learn_splitter(texts: Iterable[str]) -> SentenceSplitter:
    """Learn abbreviations, collocations and sentence starters from texts.

    Raises:
        DataError: there is no text.
    """
    trainer, size = PunktTrainer(), 0
    with show_progress("learning sentences", None, "MB") as advance:
        for text in texts:
            trainer.train(text, finalize=False)
            size += len(text)
            advance(len(text.encode()) / 1e6)
    if not size:
        raise DataError("sentences: no text to learn from; check the files and the text key")
    trainer.finalize_training()
    return SentenceSplitter(trainer.get_params())


def write_splitter(splitter: SentenceSplitter, path: Path) -> None:
    """Write what was learned as JSON; ``read_splitter`` is the inverse."""
    write_json(path, export_parameters(splitter))


def read_splitter(path: Path) -> SentenceSplitter:
    """Read what ``write_splitter`` wrote.

    Raises:
        DataError: the file is missing or was not written by it.
    """
    return import_parameters(read_json(path), str(path))


def export_parameters(splitter: SentenceSplitter) -> dict[str, Any]:
    """Return what was learned as JSON knows it, sorted; ``import_parameters`` is the inverse."""
    parameters = splitter.parameters
    return {
        "abbrev_types": sorted(parameters.abbrev_types),
        "collocations": sorted(map(list, parameters.collocations)),
        "sent_starters": sorted(parameters.sent_starters),
        "ortho_context": dict(sorted(parameters.ortho_context.items())),
    }


def import_parameters(content: Any, where: str) -> SentenceSplitter:
    """Return the splitter of exported parameters.

    Raises:
        DataError: these are none; ``where`` says what was read.
    """
    parameters = PunktParameters()
    try:
        parameters.abbrev_types = set(content["abbrev_types"])
        parameters.collocations = {(left, right) for left, right in content["collocations"]}
        parameters.sent_starters = set(content["sent_starters"])
        parameters.ortho_context.update({word: int(flags) for word, flags in content["ortho_context"].items()})
    except (KeyError, TypeError, ValueError, AttributeError):
        raise DataError(f"{where}: no parameters of a sentence splitter; learn them again") from None
    return SentenceSplitter(parameters)


def read_installed_splitter(language: str) -> SentenceSplitter:
    """Read the parameters that an installed ``nltk_data`` has for a language, such as ``english``.

    Raises:
        ConfigError: it has none.
    """
    try:
        folder = nltk.data.find(f"tokenizers/punkt_tab/{language}/")
    except LookupError:
        raise ConfigError(
            f"sentences: nltk_data has no punkt_tab/{language}; install it, or learn from the corpus itself"
        ) from None
    return SentenceSplitter(load_punkt_params(folder))
