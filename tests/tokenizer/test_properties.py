"""Method ``continue`` on text of any script, odd characters included, and on bases with any pieces."""

from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_adapt.errors import DataError
from megatron_adapt.tokenizer import merges
from megatron_adapt.tokenizer.accept import make_acceptance
from megatron_adapt.tokenizer.filters import make_filter
from megatron_adapt.tokenizer.merges import learn_merges, learn_merges_python
from megatron_adapt.tokenizer.model_proto import Piece, append_pieces, read_model, write_model
from megatron_adapt.tokenizer.pieces import piece_bytes, read_tokenizer
from megatron_adapt.tokenizer.words import count_words, segment_words
from tests.tokenizer.bases import ODD_TEXTS
from tests.tokenizer.guarantees import encode, encode_by_transformers, extend, read_record, require_guarantees

ALPHABETS = {
    "Latin": "abceñéß",
    "Cyrillic": "абвгдёй",
    "Arabic": "ابتة\u064e\u0640\u200cهی",
    "Devanagari": "कखग्िां\u200d",
    "Thai": "กขคาิ้",
    "Hangul": "한국어\u1112\u1161\u11ab",
    "Hiragana": "あいのか\u3099ー",
    "Han": "日本語𠮷々",
    "emoji": "👩\u200d👧🏽🏳\ufe0f🌈",
    "decomposed": "e\u0301o\u0308n\u0303",
    "private use": "\ue000\uf8ff\U000f0000",
    "digits": "0123９٣",
    "direction": "\u200f\u200e\u061c",
    "punctuation": ".,!?「」。",
}
SEPARATORS = [" ", "  ", "\n", "\r\n", "\t", "\u3000", "\x00", "\ufeff", "▁", "\u00a0", "\u2028", "", "the "]
SCRIPTS = [(), ("Cyrillic",), ("Han", "Hiragana", "Katakana"), ("Arabic", "Devanagari", "Thai", "Hangul")]
# One corpus each: what every reader must get right.
CASES = {
    "emoji": ["😀😀 😀👍 👍😀"],
    "joined emoji": ["👩‍👩‍👧 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽"],
    "combining marks": ["a\u0300\u0301\u0302 и\u0306и\u0306 क\u094dष"],
    "composed": ["\u00e9t\u00e9 \u304c\u304e \ud55c\uad6d"],
    "decomposed": ["e\u0301te\u0301 \u304b\u3099\u304d\u3099 \u1112\u1161\u11ab"],
    "composed and decomposed": ["\u00e9 e\u0301 \u00e9 e\u0301", "\u0439\u0438\u0306"],
    "characters the base has in bytes only": ["𠮷𠮷 𠮷野家 ℵℵ"],
    "the mark for a space": ["▁кот▁ ▁▁кот кот▁▁▁кот", "▁", "▁▁▁"],
    "empty lines": ["", "\n\n\nкот\n\n\n\nкот\n", "\n"],
    "line ends": ["кот\r\nкот\rкот\n\rкот\r\n"],
    "spaces in front, behind and between": ["  кот", "кот  ", " кот   кот    кот "],
    "only spaces and a word elsewhere": ["   ", " ", "\t \t", "кот кот"],
    "null characters": ["\x00кот\x00кот\x00\x00кот"],
    "byte order marks": ["\ufeffкот \ufeffкот", "кот\ufeff"],
    "private use": ["\ue000\uf8ff \ue000\uf8ff \U000f0000\U000f0000 \U0010fffd"],
    "marks of direction": ["\u200fכלב\u200e \u202bכלב\u202c \u2067כלב\u2069 \u061cكلب"],
    "joiners": ["می\u200cخواهم می\u200dخ \u200c\u200d \u2060кот"],
    "noncharacters": ["\uffff\ufffe кот\uffff \ufffd\ufffd"],
    "control characters": ["\x01кот\x02\x7f\x80\x85кот\x1b"],
    "spaces of other kinds": ["кот\u00a0кот\u3000кот\u2003кот\u200bкот"],
}
quick = settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def require_nothing_to_learn(error: DataError) -> None:
    """Any other refusal of right input is a defect."""
    assert "hold no new piece" in str(error)


@st.composite
def draw_letters(draw):
    """Draw a few letters of one to three alphabets."""
    names = draw(st.lists(st.sampled_from(sorted(ALPHABETS)), min_size=1, max_size=3, unique=True))
    return draw(st.lists(st.sampled_from("".join(ALPHABETS[name] for name in names)), min_size=1, max_size=6))


@st.composite
def draw_texts(draw, letters=None):
    """Draw texts of few words, so that there is something to learn, between separators of all kinds."""
    letters = letters or draw(draw_letters())
    words = draw(st.lists(st.text(letters, min_size=1, max_size=6), min_size=1, max_size=5))
    parts = st.tuples(st.sampled_from(words), st.sampled_from(SEPARATORS))
    texts = draw(st.lists(st.lists(parts, max_size=8), min_size=1, max_size=6))
    return ["".join(word + separator for word, separator in text) for text in texts] * 2


@pytest.mark.skipif(merges._csrc is None, reason="the C++ extension is not built")
@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
@settings(quick, max_examples=40)
@given(
    texts=draw_texts(),
    scripts=st.sampled_from(SCRIPTS),
    num_pieces=st.integers(1, 80),
    min_frequency=st.integers(1, 4),
    weights=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    refused=st.integers(0, 9),
)
def test_the_compiled_learner_is_its_twin(bases, kind, texts, scripts, num_pieces, min_frequency, weights, refused):
    base, allowed = bases[kind], make_filter(scripts)
    counts = count_words(base, texts, allowed).counts
    counts = Counter({word: count * weights[at % len(weights)] for at, (word, count) in enumerate(counts.items())})
    words = segment_words(base, counts)
    asked = {}

    def learn(learner, kind_of_filter):
        order = asked[learner, kind_of_filter] = []
        real = make_acceptance(base, counts, allowed, frozenset())

        def accept(piece):
            order.append(piece)
            return real(piece) if kind_of_filter == "real" else sum(piece) % 10 != refused

        return learner(words, num_pieces, min_frequency, accept)

    for kind_of_filter in ("real", "any"):
        assert learn(learn_merges, kind_of_filter) == learn(learn_merges_python, kind_of_filter)
        assert asked[learn_merges, kind_of_filter] == asked[learn_merges_python, kind_of_filter]


@pytest.mark.skipif(merges._csrc is None, reason="the C++ extension is not built")
@pytest.mark.parametrize("learner", [learn_merges, learn_merges_python])
def test_an_error_while_learning_comes_through(bases, learner):
    words = segment_words(bases["byte_level"], Counter({"abab": 3}))

    def accept(_):
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        learner(words, 9, 1, accept)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
@pytest.mark.parametrize("name", CASES)
def test_odd_text_is_learned_and_kept(bases, tmp_path, kind, name):
    base, texts = bases[kind], CASES[name]
    made = extend(base.folder, tmp_path / "out", texts * 3)
    probes = [*texts, *ODD_TEXTS, *(text for odd in CASES.values() for text in odd)]
    agreed = require_guarantees(base, made, probes)
    assert agreed == (len(probes) if kind == "sentencepiece" else 0)
    assert encode_by_transformers(made, probes) == encode(made, probes)
    assert sum(map(len, encode(made, texts))) < sum(map(len, encode(base, texts)))


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_rare_characters_stay_bytes(bases, tmp_path, kind):
    base = bases[kind]
    made = extend(base.folder, tmp_path / "out", ["кот " * 9, "\U00020bb7"], min_frequency=3)
    assert encode(made, ["\U00020bb7"]) == encode(base, ["\U00020bb7"])
    assert "\U00020bb7".encode() not in piece_bytes(made)
    require_guarantees(base, made, ["\U00020bb7", "кот\U00020bb7кот"])


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_a_word_of_a_hundred_thousand_characters_is_learned_and_kept(bases, tmp_path, kind):
    texts = ["кот" * 34_000, "日" * 100_000, "👍" * 5_000]
    made = extend(bases[kind].folder, tmp_path / "out", texts)
    assert require_guarantees(bases[kind], made, texts) == (3 if kind == "sentencepiece" else 0)
    # Whole pieces of sixteen characters, the longest there may be.
    assert len(encode(made, ["日" * 100_000])[0]) <= 100_000 // 16 + 5


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
@quick
@given(letters=draw_letters(), data=st.data(), scripts=st.sampled_from(SCRIPTS))
def test_an_extension_of_an_extension_keeps_every_promise(bases, tmp_path_factory, kind, letters, data, scripts):
    folder, base = tmp_path_factory.mktemp("twice"), bases[kind]
    probes = list(ODD_TEXTS)
    for at in range(2):
        texts = data.draw(draw_texts(letters))
        probes += texts
        try:
            made = extend(base.folder, folder / str(at), texts, scripts if at else (), size=25, min_frequency=1 + at)
        except DataError as error:
            require_nothing_to_learn(error)
            continue
        agreed = require_guarantees(base, made, probes, scripts if at else ())
        assert agreed == (len(probes) if kind == "sentencepiece" else 0)
        assert read_record(made)["pieces_added"] == made.vocab_size - base.vocab_size
        base = made


@quick
@given(
    letters=draw_letters(),
    pieces=st.lists(st.lists(st.integers(0, 9), min_size=2, max_size=4), max_size=20),
    data=st.data(),
    has_json=st.booleans(),
)
def test_old_pieces_in_any_order_of_scores_keep_their_merges(bases, tmp_path_factory, letters, pieces, data, has_json):
    # Pieces that other pieces do not build, and that new ones complete, are among them.
    root = tmp_path_factory.mktemp("any")
    folder = root / "base"
    folder.mkdir()
    model = read_model(bases["sentencepiece"].folder / "tokenizer.model")
    low, known = min(piece.score for piece in model.pieces), {piece.text for piece in model.pieces}
    letters = [letter for letter in dict.fromkeys(letters) if letter.isprintable()] or ["ж"]
    half = len(letters) // 2
    usable = [*letters[half:], "a", "b"]
    texts = [*usable, *("".join(usable[at % len(usable)] for at in piece) for piece in pieces)]
    added = [text for text in dict.fromkeys([*texts, *(f"▁{text}" for text in texts[::3])]) if text not in known]
    write_model(
        append_pieces(model, [Piece(text, low - 1 - at) for at, text in enumerate(added)]), folder / "tokenizer.model"
    )
    base = read_tokenizer(folder)
    if has_json:
        base.tokenizer.save(str(folder / "tokenizer.json"))
    texts = data.draw(draw_texts(letters))
    try:
        made = extend(folder, root / "out", texts, size=25)
    except DataError as error:
        require_nothing_to_learn(error)
        return
    probes = [*texts, *ODD_TEXTS, *added]
    assert require_guarantees(base, made, probes) == len(probes)
