"""Rules that drop a document for what it looks like; ``RULES`` names them, the settings say how strict they are.

Each rule answers for one document alone and is off by default: what a rule drops, the model never learns. The values
in brackets are those of the paper.

- ``short``, ``long``: number of characters.
- ``repeated_lines``: share of the characters in lines that stood earlier in the document [0.2].
- ``repeated_runs``: share of the units in runs of ten units that stood earlier in it [0.1]. A unit is a word, or one
  character of a script that writes no spaces.
- ``script``: share of the letters that are of the language's scripts.

Source: Rae et al. 2021, *Scaling Language Models* (Gopher), table A1, arXiv:2112.11446; their rules count words, which
Japanese does not mark.
"""

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

import regex

from megatron_adapt.config import CorpusSettings

_RUN_UNITS = 10
_UNIT = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]|[\p{L}\p{M}\p{N}]+")
_LETTER = regex.compile(r"\p{L}")


@dataclass(frozen=True)
class Limits:
    """The settings of the rules, and the letters of the language."""

    settings: CorpusSettings
    script: regex.Pattern[str] | None
    "A letter of the language's scripts; None where none are named."


Rule = Callable[[str, Limits], bool]


def normalise(text: str, settings: CorpusSettings) -> str:
    """Return the text in the Unicode normal form that is asked for."""
    return text if settings.normal_form == "none" else unicodedata.normalize(settings.normal_form, text)


def find_reason(text: str, limits: Limits) -> str | None:
    """Return the name of the first rule that drops the text, or None."""
    return next((name for name, rule in RULES.items() if rule(text, limits)), None)


def is_short(text: str, limits: Limits) -> bool:
    """Tell whether the text has fewer than ``min_characters``."""
    return len(text) < limits.settings.min_characters


def is_long(text: str, limits: Limits) -> bool:
    """Tell whether the text has more than ``max_characters``."""
    return 0 < limits.settings.max_characters < len(text)


def repeats_lines(text: str, limits: Limits) -> bool:
    """Tell whether more than ``max_repeated_lines`` of the characters stand in lines that occurred before."""
    if limits.settings.max_repeated_lines == 1:
        return False
    seen: set[str] = set()
    repeated = total = 0
    for line in filter(None, map(str.strip, text.splitlines())):
        total += len(line)
        repeated += len(line) if line in seen else 0
        seen.add(line)
    return repeated > limits.settings.max_repeated_lines * total


def repeats_runs(text: str, limits: Limits) -> bool:
    """Tell whether more than ``max_repeated_runs`` of the units lie in runs of ten that occurred before."""
    if limits.settings.max_repeated_runs == 1:
        return False
    units = _UNIT.findall(text)
    seen: set[tuple[str, ...]] = set()
    covered = end = 0
    for start in range(len(units) - _RUN_UNITS + 1):
        run = tuple(units[start : start + _RUN_UNITS])
        if run in seen:
            covered += start + _RUN_UNITS - max(start, end)
            end = start + _RUN_UNITS
        seen.add(run)
    return covered > limits.settings.max_repeated_runs * len(units)


def lacks_script(text: str, limits: Limits) -> bool:
    """Tell whether fewer than ``min_script_share`` of the letters are of the language's scripts."""
    if limits.script is None or limits.settings.min_script_share == 0:
        return False
    letters = _LETTER.findall(text)
    return sum(limits.script.match(letter) is not None for letter in letters) < (
        limits.settings.min_script_share * max(1, len(letters))
    )


RULES: dict[str, Rule] = {
    "short": is_short,
    "long": is_long,
    "repeated_lines": repeats_lines,
    "repeated_runs": repeats_runs,
    "script": lacks_script,
}
