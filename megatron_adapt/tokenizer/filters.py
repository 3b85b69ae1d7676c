"""Which texts may become a piece, and where a word of running text may be cut.

Scripts are those of the Unicode Character Database. A character passes a script if its ``Script_Extensions`` name
it (so the Japanese full stop passes ``Hiragana`` and the Arabic comma ``Arabic``); inherited characters - combining
marks, joiners - pass together with one that does. With scripts named, no character of other scripts, ASCII digits
and punctuation included, is ever part of a new piece: text in them keeps its ids.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import regex

from megatron_adapt.scripts import make_script_class

MAX_PIECE_CHARACTERS = 16  # sentencepiece's max_sentencepiece_length
_DIGIT = regex.compile(r"\p{N}")
_LETTER = regex.compile(r"\p{L}")
# SentencePiece takes Japanese as one script (trainer_interface.cc); the two marks prolong kana.
_JAPANESE = r"\p{Han}\p{Hiragana}\p{Katakana}ーｰ"
_CUT_AT = (
    "Latin Greek Cyrillic Armenian Hebrew Arabic Syriac Thaana Devanagari Bengali Gurmukhi Gujarati Oriya Tamil Telugu "
    "Kannada Malayalam Sinhala Thai Lao Tibetan Myanmar Georgian Hangul Ethiopic Cherokee Khmer Mongolian"
).split()


@dataclass(frozen=True)
class PieceFilter:
    """What the setting ``scripts`` allows."""

    character: regex.Pattern[str]
    "One character that a piece may be made for."
    whole: regex.Pattern[str]
    "A complete piece, a leading space included."

    def refuse(self, text: str) -> str | None:
        """Return why ``text`` (a leading space written as such) may not become a piece, or None if it may."""
        if len(text) > MAX_PIECE_CHARACTERS:
            return "long"
        if len(_DIGIT.findall(text)) > 1:
            return "digits"
        return None if self.whole.fullmatch(text) else "script"


def make_filter(scripts: Sequence[str]) -> PieceFilter:
    """Build the filter for the named scripts; none allows all.

    Raises:
        ConfigError: a name is no Unicode script.
    """
    if not scripts:
        return PieceFilter(regex.compile(r"\S"), regex.compile(r".*", regex.DOTALL))
    allowed = make_script_class(scripts, "tokenizer.scripts")
    with_marks = rf"[{allowed}\p{{Script=Inherited}}]*"
    return PieceFilter(regex.compile(rf"[{allowed}]"), regex.compile(rf" ?{with_marks}[{allowed}]{with_marks}"))


def find_prefixes(characters: Iterable[str], allowed: PieceFilter) -> frozenset[bytes]:
    """Return the beginnings of the characters' UTF-8 forms that begin no letter of a script outside ``allowed``.

    Half-width kana begin with the same two bytes as full-width Latin letters: a piece of these would change text that
    is not in the new language. One byte is always allowed, as byte-level tokenizers have a piece for it.
    """
    spelled = {character.encode() for character in characters}
    found = {data[:end] for data in spelled for end in range(1, len(data))}
    return frozenset(data for data in found if len(data) == 1 or not _begins_other_letter(data, allowed))


def _begins_other_letter(prefix: bytes, allowed: PieceFilter) -> bool:
    missing = {0xC: 2, 0xD: 2, 0xE: 3, 0xF: 4}[prefix[0] >> 4] - len(prefix)
    first = prefix + b"\x80" * missing
    # The second byte of E0 and F0 starts higher, or the character would be written with fewer bytes.
    start = max(_code_point(first), {3: 0x800, 4: 0x10000}.get(len(first), 0))
    last = min(_code_point(prefix + b"\xbf" * missing), 0x10FFFF)
    letters = map(chr, range(start, last + 1))
    return any(_LETTER.fullmatch(letter) and not allowed.character.fullmatch(letter) for letter in letters)


def _code_point(data: bytes) -> int:
    head = data[0] & (0x7F >> len(data))
    return int("".join([f"{head:b}", *(f"{byte & 0x3F:06b}" for byte in data[1:])]), 2)


def list_runs(marker: str) -> list[tuple[str, str]]:
    """Return for each kind of run of characters, the first that fits, which ones it begins with and goes on with.

    Both are written for use between the brackets of an expression; a run that goes on with none is one character.
    Digits stand alone, letters and marks go by script, what is left is one kind; ``marker``, white space and control
    characters are part of none.
    """
    marks = r"\p{M}\p{Script=Inherited}"
    scripts = [_JAPANESE, *(rf"\p{{{name}}}" for name in _CUT_AT)]
    letters, others = rf"\p{{L}}{marks}", rf"^\p{{L}}\p{{N}}\s\p{{Cc}}{marker}"
    runs = [(script, script + marks) for script in scripts]
    return [(r"\p{N}", ""), *runs, (letters, letters), (others, others)]


def make_word_pattern(marker: str) -> regex.Pattern[str]:
    """Return the expression that finds the words of text whose spaces are written as ``marker``.

    As SentencePiece's trainer does, a word ends at a space, at a change of script and around every digit; it takes
    one marker in front of it along. Line ends and other control characters belong to no word.
    """
    runs = [f"[{first}]" + (f"[{more}]*" if more else "") for first, more in list_runs(marker)]
    return regex.compile(rf"{marker}?(?:{'|'.join(runs)})")
