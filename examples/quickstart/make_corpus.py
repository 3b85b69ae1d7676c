"""Make the two synthetic corpora of the quickstart: simple English, and the invented language "qx" (see qx.py).

All text is made by this program; nothing is downloaded, nothing is real. A story is planned once, as events
without words, and told by ``tell_english`` or ``tell_qx``. A quarter of the English stories are told in qx too,
under the same id; as many again are told in qx only.

What there is to learn beyond spelling: a story keeps its topic, people, things and tense; a thing is introduced
("a warm loaf") before it is "the loaf"; pronouns agree with people, verbs with tense; sums are right; questions ask
about what was told.

``python examples/quickstart/make_corpus.py --output data --documents 9000 --seed 1``
"""

import argparse
import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

from qx import LEXICON, attach, spell_name
from words import (
    DAYS,
    FEELINGS,
    GIVING,
    MANNERS,
    MEN,
    MONTHS,
    NUMBERS,
    PARTS,
    TOPICS,
    TOWN_HEADS,
    TOWN_TAILS,
    WEATHERS,
    WOMEN,
)

TENSES = ("past", "present", "future")
KINDS = "act act act act give want say state exist because move sum when ask feel".split()
COUNTS = (1, 1, 1, 2, 3, 4, 6, 10)


# ---------------------------------------------------------------- the plan of a story


@dataclass(frozen=True)
class Person:
    """One of the two people of a story."""

    name: str
    is_woman: bool
    role: str


@dataclass(frozen=True)
class Thing:
    """Something people act on: ``count`` of it; ``known`` once the story has mentioned it."""

    noun: str
    adjective: str
    count: int
    known: bool = False


@dataclass(frozen=True)
class Opening:
    """Where, when and with whom a story begins."""

    who: Person
    partner: Person
    place: str
    tense: str
    day: str
    part: str
    month: str
    weather: str
    town: tuple[str, str]


@dataclass(frozen=True)
class Event:
    """One sentence without words; the tellers show which fields a ``kind`` uses."""

    kind: str
    tense: str
    who: Person
    same: bool
    other: Person
    what: Thing
    place: str
    verb: str
    second_verb: str
    giving: str
    manner: str
    feeling: str
    numbers: tuple[int, int]
    negated: bool


def plan_story(rng: random.Random) -> tuple[Opening, list[Event]]:
    """Plan an opening and four to ten events about two people and three things of one topic."""
    roles, places, nouns, verbs, adjectives = (part.split() for part in TOPICS[rng.choice(list(TOPICS))].split("/"))
    people = _choose_people(rng, roles)
    things = [Thing(noun, rng.choice(adjectives), rng.choice(COUNTS)) for noun in rng.sample(nouns, 3)]
    opening = Opening(
        who=people[0],
        partner=people[1],
        place=rng.choice(places),
        tense=rng.choices(TENSES, (6, 2, 2))[0],
        day=rng.choice(DAYS),
        part=rng.choice(PARTS),
        month=rng.choice(MONTHS),
        weather=rng.choice(WEATHERS),
        town=(rng.choice(TOWN_HEADS), rng.choice(TOWN_TAILS)),
    )
    events: list[Event] = []
    for _ in range(rng.randint(4, 10)):
        who, other = rng.sample(people, 2)
        at = rng.randrange(len(things))
        event = Event(
            kind=rng.choice(KINDS),
            tense=opening.tense,
            who=who,
            same=who == (events[-1] if events else opening).who,
            other=other,
            what=things[at],
            place=rng.choice(places),
            verb=rng.choice(verbs),
            second_verb=rng.choice(verbs),
            giving=rng.choice(GIVING),
            manner=rng.choice(MANNERS),
            feeling=rng.choice(FEELINGS),
            numbers=(rng.randint(1, 6), rng.randint(1, 6)),
            negated=rng.random() < 0.1,
        )
        if event.kind == "ask":
            event = _ask_about(events, event)
        if event.kind not in ("move", "feel", "sum", "ask"):
            things[at] = replace(things[at], known=True)
        events.append(event)
    return opening, events


def _choose_people(rng: random.Random, roles: list[str]) -> list[Person]:
    """Return a man and a woman, so that a pronoun names one of them, in either order."""
    first, second = rng.sample(roles, 2)
    people = [Person(rng.choice(MEN), False, first), Person(rng.choice(WOMEN), True, second)]
    return rng.sample(people, 2)


def _ask_about(told: list[Event], event: Event) -> Event:
    """Turn a question into one about the last act told, or into a feeling where there is none."""
    acts = [item for item in told if item.kind == "act" and not item.negated]
    return replace(acts[-1], kind="ask", same=False) if acts else replace(event, kind="feel")


# ---------------------------------------------------------------- English

BE = {"past": ("was", "were"), "present": ("is", "are"), "future": ("will be", "will be")}
HAVE = {"past": "had", "present": "has", "future": "will have"}
PAST = {"feed": "fed", "choose": "chose", "hang": "hung", "say": "said"} | {
    verb: f"{verb}{verb[-1]}ed" for verb in ("wrap", "trim", "stop")
}
PLURAL = {"deer": "deer", "loaf": "loaves", "shelf": "shelves", "tomato": "tomatoes"}


def inflect(verb: str, tense: str, *, negated: bool = False) -> str:
    """Return the third person singular of a verb, with its auxiliary where it has one."""
    if tense == "future":
        return f"will not {verb}" if negated else f"will {verb}"
    if negated:
        return f"{'did' if tense == 'past' else 'does'} not {verb}"
    stem = verb[:-1] + "i" if verb.endswith("y") and verb[-2] not in "aeiou" else verb
    if tense == "present":
        return stem + ("es" if stem != verb or verb.endswith(("s", "x", "ch", "sh")) else "s")
    return PAST.get(verb) or stem + ("d" if verb.endswith("e") else "ed")


def pluralise(noun: str) -> str:
    """Return the plural of a noun."""
    if noun in PLURAL:
        return PLURAL[noun]
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


def count_nouns(number: int, noun: str) -> str:
    """Return "one box", "two boxes"."""
    return f"{NUMBERS[number]} {noun if number == 1 else pluralise(noun)}"


def name_thing(thing: Thing) -> str:
    """Return the English noun phrase: with its adjective when new, with "the" when known."""
    noun = thing.noun if thing.count == 1 else pluralise(thing.noun)
    if thing.known:
        return f"the {noun}"
    article = NUMBERS[thing.count] if thing.count > 1 else "an" if thing.adjective[0] in "aeiou" else "a"
    return f"{article} {thing.adjective} {noun}"


def open_english(opening: Opening) -> str:
    """Say the opening in English."""
    who, partner = opening.who, opening.partner
    return (
        f"On a {opening.weather} {opening.day} {opening.part} in {opening.month}, {who.name} the {who.role} "
        f"{inflect('visit', opening.tense)} the {opening.place} in {''.join(opening.town).capitalize()} "
        f"with {partner.name} the {partner.role}."
    )


def say_english(event: Event) -> str:
    """Say an event in English."""
    tense, noun, other, thing = event.tense, event.what.noun, event.other.name, name_thing(event.what)
    subject = ("she" if event.who.is_woman else "he") if event.same else event.who.name
    did, was = inflect(event.verb, tense, negated=event.negated), BE[tense][0]
    known, were = name_thing(replace(event.what, known=True)), BE[tense][event.what.count > 1]
    them = "them" if event.what.count > 1 else "it"
    left, right = event.numbers
    sentence = {
        "act": f"{subject} {did} {thing} {event.manner}",
        "give": f"{subject} {inflect(event.giving, tense)} {thing} to {other}",
        "want": f"{subject} {inflect('want', tense)} to {event.verb} {thing}",
        "say": f"{subject} {inflect('say', tense)} that {other} {did} {thing}",
        "state": f"{known} {were} {event.what.adjective}",
        "exist": f"there {were} {thing} in the {event.place}",
        "because": f"{subject} {did} {thing} because {other} {was} {event.feeling}",
        "move": f"{subject} {inflect('walk', tense)} to the {event.place} {event.manner}",
        "sum": f"{subject} {HAVE[tense]} {count_nouns(left, noun)} and {other} {HAVE[tense]} {NUMBERS[right]}, "
        f"{count_nouns(left + right, noun)} in all",
        "when": f"when {subject} {did} {thing}, {other} {inflect(event.second_verb, tense)} {them}",
        "ask": f"who {inflect(event.verb, tense)} {known}? It {was} {subject}",
        "feel": f"{subject} {was} {event.feeling}",
    }[event.kind]
    return sentence[0].upper() + sentence[1:] + "."


# ---------------------------------------------------------------- qx


def name_thing_qx(thing: Thing, *endings: str) -> str:
    """Return the qx noun phrase: noun, then adjective and number when the thing is new."""
    number = ("plural",) if thing.count > 1 else ()
    if thing.known:
        return attach(LEXICON[thing.noun], *number, "definite", *endings)
    words = [attach(LEXICON[thing.noun], *number, *endings), attach(LEXICON[thing.adjective], *number)]
    return " ".join([*words, LEXICON[NUMBERS[thing.count]]] if thing.count > 1 else words)


def count_nouns_qx(number: int, noun: str) -> str:
    """Return noun and number, the noun in agreement."""
    return f"{attach(LEXICON[noun], *['plural'] * (number > 1))} {LEXICON[NUMBERS[number]]}"


def open_qx(opening: Opening) -> str:
    """Say the opening in qx."""
    who, partner, word = opening.who, opening.partner, LEXICON
    head, tail = opening.town
    return (
        f"{attach(word[opening.month], 'in')} {word[opening.day]} {word[opening.part]} "
        f"{attach(word[opening.weather], 'like')} {attach(word[head] + word[tail], 'in')} "
        f"{spell_name(who.name)} {word[who.role]} {attach(spell_name(partner.name), 'with')} {word[partner.role]} "
        f"{attach(word[opening.place], 'definite', 'object')} {attach(word['visit'], opening.tense)}."
    )


def say_qx(event: Event) -> str:
    """Say an event in qx."""
    word, tense, noun, other = LEXICON, event.tense, event.what.noun, spell_name(event.other.name)
    subject = word["she" if event.who.is_woman else "he"] if event.same else spell_name(event.who.name)
    thing, known = name_thing_qx(event.what, "object"), replace(event.what, known=True)
    number = ("plural",) if event.what.count > 1 else ()
    did = attach(word[event.verb], tense, *(("not",) if event.negated else ()))
    was, have = attach(word["be"], tense), attach(word["have"], tense)
    left, right = event.numbers
    sentence = {
        "act": f"{subject} {thing} {word[event.manner]} {did}",
        "give": f"{subject} {attach(other, 'to')} {thing} {attach(word[event.giving], tense)}",
        "want": f"{subject} {thing} {attach(word[event.verb], 'wish')} {attach(word['want'], tense)}",
        "say": f"{subject} {other} {thing} {did} {word['that']} {attach(word['say'], tense)}",
        "state": f"{name_thing_qx(known)} {attach(word[event.what.adjective], *number)} {was}",
        "exist": f"{attach(word[event.place], 'in')} {name_thing_qx(event.what)} {was}",
        "because": f"{other} {word[event.feeling]} {was} {word['because']} {subject} {thing} {did}",
        "move": f"{attach(word[event.place], 'to')} {subject} {word[event.manner]} {attach(word['walk'], tense)}",
        "sum": f"{subject} {count_nouns_qx(left, noun)} {word['and']} {other} {word[NUMBERS[right]]} {have}, "
        f"{word['all']} {count_nouns_qx(left + right, noun)}",
        "when": f"{subject} {thing} {did} {word['when']}, "
        f"{other} {attach(word['it'], *number, 'object')} {attach(word[event.second_verb], tense)}",
        "ask": f"{word['who']} {name_thing_qx(known, 'object')} {did}? {subject} {was}",
        "feel": f"{subject} {word[event.feeling]} {was}",
    }[event.kind]
    return sentence + "."


# ---------------------------------------------------------------- the files


def tell_english(opening: Opening, events: list[Event]) -> str:
    """Tell a story in English."""
    return join_paragraphs([open_english(opening), *map(say_english, events)])


def tell_qx(opening: Opening, events: list[Event]) -> str:
    """Tell a story in qx."""
    return join_paragraphs([open_qx(opening), *map(say_qx, events)])


def join_paragraphs(sentences: list[str]) -> str:
    """Join sentences, five to a paragraph."""
    return "\n".join(" ".join(sentences[at : at + 5]) for at in range(0, len(sentences), 5))


def make_corpus(output: Path, documents: int, seed: int) -> None:
    """Write ``en.jsonl`` with ``documents`` stories and ``qx.jsonl`` with half as many."""
    output.mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[str]] = {"en": [], "qx": []}
    for number in range(documents):
        name = f"story-{number:06d}"
        story = plan_story(random.Random(f"{seed} {name}"))
        lines["en"].append(json.dumps({"id": name, "text": tell_english(*story)}))
        if number % 4 == 1:
            name = f"qx-{number:06d}"
            story = plan_story(random.Random(f"{seed} {name}"))
        if number % 4 <= 1:
            lines["qx"].append(json.dumps({"id": name, "text": tell_qx(*story)}, ensure_ascii=False))
    for language, rows in lines.items():
        (output / f"{language}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def main() -> None:
    """Read the flags and write the files."""
    parser = argparse.ArgumentParser(description="Make the synthetic English and qx corpora of the quickstart.")
    parser.add_argument("--output", type=Path, required=True, help="folder for en.jsonl and qx.jsonl")
    parser.add_argument("--documents", type=int, default=9000, help="English stories; half as many are told in qx")
    parser.add_argument("--seed", type=int, default=1, help="another seed tells other stories in the same languages")
    args = parser.parse_args()
    make_corpus(args.output, args.documents, args.seed)
    sizes = [f"{name} {(args.output / name).stat().st_size / 1e6:.1f} MB" for name in ("en.jsonl", "qx.jsonl")]
    print(f"synthetic text in {args.output}: {', '.join(sizes)}")


if __name__ == "__main__":
    main()
