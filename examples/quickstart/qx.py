"""The invented language "qx": its words, its endings and its word order.

Nobody speaks qx. It borrows the letters of the Georgian alphabet, so that an English tokenizer knows none of it;
nothing can be concluded from it about Georgian or any other real language.

A sentence runs time, place, subject, recipient, object, manner, verb; adjective and number follow the noun and
agree with it; endings mark number, definiteness, case, tense, negation. The vowel of every ending follows the last
vowel of the word (vowel harmony). Names are spelled letter by letter; towns are compounds of qx words.
"""

import random

from words import (
    DAYS,
    FEELINGS,
    GIVING,
    MANNERS,
    MONTHS,
    NUMBERS,
    PARTS,
    TOPICS,
    TOWN_HEADS,
    TOWN_TAILS,
    WEATHERS,
)

LETTERS = dict(zip("abgdevztiklmnoprsufqcjhwxy", "აბგდევზტიკლმნოპრსუფქცჯჰვხი", strict=True))
FRONT, BACK, CONSONANTS = "ეი", "აოუ", "ბგდვზთკლმნპჟრსტფქღყშჩცძწჭხჯ"
SMALL_WORDS = "he she it and all that because when who be have say want walk visit feel".split()

# What stands before and after the vowel of an ending.
ENDINGS = {
    "plural": ("ბ", ""),
    "definite": ("ლ", ""),
    "object": ("", "მ"),
    "to": ("დ", ""),
    "in": ("შ", ""),
    "with": ("თ", "ნ"),
    "like": ("ნ", ""),
    "past": ("რ", ""),
    "present": ("ს", ""),
    "future": ("ვ", "ხ"),
    "not": ("ყ", ""),
    "wish": ("ჯ", ""),
}


def make_lexicon() -> dict[str, str]:
    """Return the qx stem of every English word; the same whatever the seed of the corpus."""
    rng = random.Random("the words of qx")
    short = [*SMALL_WORDS, *NUMBERS]
    lists = [DAYS, PARTS, MONTHS, MANNERS, FEELINGS, WEATHERS, GIVING, TOWN_HEADS, TOWN_TAILS]
    topics = (topic.replace("/", " ").split() for topic in TOPICS.values())
    words = dict.fromkeys([*short, *(word for group in (*lists, *topics) for word in group)])
    lexicon: dict[str, str] = {}
    taken: set[str] = set()
    for at, word in enumerate(words):
        stem = ""
        while not stem or stem in taken:
            vowels = rng.choice((FRONT, BACK))
            num_syllables = 1 if at < len(short) else rng.choices((1, 2, 3), (2, 6, 1))[0]
            stem = "".join(rng.choice(CONSONANTS) + rng.choice(vowels) for _ in range(num_syllables))
            stem += rng.choice(CONSONANTS) if rng.random() < 0.6 else ""
        taken.add(stem)
        lexicon[word] = stem
    return lexicon


LEXICON = make_lexicon()


def attach(stem: str, *endings: str) -> str:
    """Add endings to a word, each with the vowel that the word's last vowel asks for."""
    last = next(letter for letter in reversed(stem) if letter in FRONT + BACK)
    vowel = "ე" if last in FRONT else "ა"
    return stem + "".join(before + vowel + after for before, after in map(ENDINGS.__getitem__, endings))


def spell_name(name: str) -> str:
    """Write a name in the letters of qx."""
    return "".join(LETTERS[letter] for letter in name.lower())
