import json
import logging
import random
from collections import Counter
from itertools import pairwise

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer
from transformers.tokenization_utils_base import generate_merges

from megatron_adapt.config import BuildTokenizer, TokenizerSettings
from megatron_adapt.errors import ConfigError, DataError
from megatron_adapt.tokenizer import merge
from megatron_adapt.tokenizer.build import build_tokenizer
from megatron_adapt.tokenizer.filters import make_filter
from megatron_adapt.tokenizer.learn import learn_base_tokenizer, train_sentencepiece
from megatron_adapt.tokenizer.merge import learn_alone
from megatron_adapt.tokenizer.model_proto import list_by_score, read_model
from megatron_adapt.tokenizer.pieces import copy_tokenizer, encode_texts, from_letters, piece_bytes, read_tokenizer
from megatron_adapt.tokenizer.words import count_words, strip_tokenizer
from tests.tokenizer.bases import MIXED, ODD_TEXTS, SCRIPTS, make_texts, write_corpus
from tests.tokenizer.guarantees import require_one_language_shorter

SIZE = 100


def build(base_folder, output, texts, scripts=(), size=SIZE, **options):
    corpus = write_corpus(output.parent / f"{output.name}.jsonl", texts)
    made = TokenizerSettings(method="merge", size=str(size), scripts=scripts, **options)
    build_tokenizer(BuildTokenizer(base=base_folder, corpus=(corpus,), output=output, settings=made))
    return read_tokenizer(output)


def make_latin(num_texts=200):
    """Make a language in the script of the base, whose words the base cuts in many ways."""
    rng = random.Random("latin")
    words = ["".join(rng.choices("thir rein nic qua lit eau the mong inter ionst".split(), k=3)) for _ in range(150)]
    return [" ".join(rng.choices(words, k=20)) for _ in range(num_texts)]


def list_new(tokenizer, base):
    return piece_bytes(tokenizer)[base.vocab_size :]


def read_counts(tokenizer):
    return json.loads((tokenizer.folder / "stage.json").read_text())["counts"]


@pytest.fixture(scope="module")
def merged(bases, tmp_path_factory):
    """Every base merged with every language."""
    root = tmp_path_factory.mktemp("merged")
    return {
        (kind, language): build(base.folder, root / f"{kind}-{language}", make_texts(language), scripts)
        for kind, base in bases.items()
        for language, scripts in SCRIPTS.items()
    }


@pytest.fixture(scope="module")
def overlapping(bases, tmp_path_factory):
    """The SentencePiece base merged with a language in its own script, by every policy of scores."""
    root = tmp_path_factory.mktemp("overlapping")
    base = bases["sentencepiece"].folder
    policies = ("below", "zero", "learned")
    return {scores: build(base, root / scores, make_latin(), ("Latin",), scores=scores) for scores in policies}


def test_old_ids_never_move_and_the_size_is_the_one_asked_for(bases, merged, overlapping):
    made = [(kind, tokenizer) for (kind, _), tokenizer in merged.items()]
    for kind, tokenizer in [*made, *(("sentencepiece", tokenizer) for tokenizer in overlapping.values())]:
        old = bases[kind].tokenizer
        assert tokenizer.vocab_size == bases[kind].vocab_size + SIZE
        assert old.get_vocab(with_added_tokens=True).items() <= tokenizer.tokenizer.get_vocab().items()
        assert tokenizer.tokenizer.get_added_tokens_decoder() == old.get_added_tokens_decoder()


def test_every_added_piece_is_one_token(bases, merged, overlapping):
    made = [(kind, tokenizer) for (kind, _), tokenizer in merged.items()]
    for kind, tokenizer in [*made, ("sentencepiece", overlapping["below"])]:
        bare = strip_tokenizer(tokenizer)
        for index in range(bases[kind].vocab_size, tokenizer.vocab_size):
            assert bare.encode(tokenizer.tokenizer.id_to_token(index)).ids == [index]


def test_the_new_language_gets_shorter_and_others_stay_as_they_were(bases, merged):
    for (kind, language), tokenizer in merged.items():
        require_one_language_shorter(bases[kind], tokenizer, language)


def test_no_text_is_lost(merged, overlapping):
    for tokenizer in (*merged.values(), *overlapping.values()):
        for text in MIXED:
            expected = text.replace("▁", " ") if tokenizer.kind == "sentencepiece" else text
            assert tokenizer.tokenizer.decode(tokenizer.tokenizer.encode(text).ids) == expected


def test_below_makes_all_readers_agree(merged, overlapping):
    for tokenizer in (*merged.values(), overlapping["below"]):
        texts = [*MIXED, *make_latin(30)]
        ids = encode_texts(tokenizer, texts)
        loaded = AutoTokenizer.from_pretrained(tokenizer.folder)
        assert [loaded(text)["input_ids"] for text in texts] == ids
        if tokenizer.kind == "sentencepiece":
            model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.folder / "tokenizer.model"))
            assert [[1, *model.encode(text)] for text in texts] == ids


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_learning_from_words_is_learning_from_the_text(kind, bases, tmp_path):
    base, texts = bases[kind], make_texts("ru", 400)
    words = count_words(base, texts, make_filter(()))
    learned = [*learn_alone(kind, words.counts, 60, 1).scores]
    if kind == "sentencepiece":
        (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece(texts, len(learned) + 259))
        alone = [piece.encode() for piece in list_by_score(read_model(tmp_path / "tokenizer.model"))]
    else:
        learn_base_tokenizer(texts, len(learned) + 258, kind, tmp_path)
        alone = [from_letters(read_tokenizer(tmp_path).tokenizer.id_to_token(258 + at)) for at in range(len(learned))]
    assert learned == alone
    assert len(learned) >= 60


def test_pieces_come_in_the_order_learned(bases, merged):
    for (kind, language), tokenizer in merged.items():
        words = count_words(bases[kind], make_texts(language), make_filter(SCRIPTS[language]))
        places = {piece: at for at, piece in enumerate(learn_alone(kind, words.counts, 2 * SIZE, 2).scores)}
        spelled = list_new(tokenizer, bases[kind])
        if kind == "sentencepiece":
            spelled = [piece.replace(b" ", "▁".encode()) for piece in spelled]
        joints = read_counts(tokenizer)["candidates"].get("joint", 0)
        taken = spelled[: SIZE - joints]
        assert len(taken) > SIZE / 2
        assert all(places[left] < places[right] for left, right in pairwise(taken))
        assert not joints or kind == "byte_level"


def cut_in_pairs(text):
    return [text[at : at + 2] for at in range(0, len(text), 2)]


def test_no_piece_crosses_the_words_of_a_segmenter(bases, tmp_path):
    for kind, base in bases.items():
        made = build(
            base.folder, tmp_path / kind, make_texts("ru"), SCRIPTS["ru"], segmenter=f"{__name__}:cut_in_pairs"
        )
        lengths = [len(piece.decode(errors="ignore").strip()) for piece in list_new(made, base)]
        assert len(lengths) > 40
        assert max(lengths) == 2


def test_what_is_cut_off_is_the_last_merges_and_no_character(bases, tmp_path):
    base, texts = bases["sentencepiece"], make_texts("ru")
    characters = {letter for letter in "".join(texts) if "а" <= letter <= "я"}
    made = build(base.folder, tmp_path / "out", texts, SCRIPTS["ru"], size=len(characters) + 5)
    spelled = [piece.decode() for piece in list_new(made, base)]
    assert {piece for piece in spelled if len(piece) == 1} == characters
    words = count_words(base, texts, make_filter(SCRIPTS["ru"]))
    learned = [piece.decode() for piece in learn_alone("sentencepiece", words.counts, 300, 2).scores]
    first = [piece.replace("▁", " ") for piece in learned if len(piece) > 1][:5]
    assert [piece for piece in spelled if len(piece) > 1] == first


def test_scores_are_those_of_the_policy(bases, overlapping):
    size = bases["sentencepiece"].vocab_size
    found = {name: read_model(made.folder / "tokenizer.model").pieces for name, made in overlapping.items()}
    lowest = min(piece.score for piece in found["below"][:size])
    below = [lowest, *(piece.score for piece in found["below"][size:])]
    assert all(later < earlier for earlier, later in pairwise(below))
    assert {piece.score for piece in found["zero"][size:]} == {0.0}
    words = count_words(bases["sentencepiece"], make_latin(), make_filter(("Latin",)))
    learned = learn_alone("sentencepiece", words.counts, 300, 2).scores
    assert [piece.score for piece in found["learned"][size:]] == [
        learned[piece.text.encode()] for piece in found["learned"][size:]
    ]
    assert max(piece.score for piece in found["learned"][size:]) > lowest


@pytest.mark.parametrize("scores", ["zero", "learned"])
def test_the_json_of_an_unsafe_policy_is_what_transformers_5_makes_of_the_model(scores, overlapping):
    made = overlapping[scores]
    vocab = {piece.text: at for at, piece in enumerate(read_model(made.folder / "tokenizer.model").pieces)}
    converted = Tokenizer(models.BPE(vocab, generate_merges(vocab), byte_fallback=True, fuse_unk=True))
    bare = strip_tokenizer(made)
    texts = ["▁" + text.replace(" ", "▁") for text in [*MIXED, *make_latin(), *make_texts("en", 200, seed=5)]]
    assert [bare.encode(text).ids for text in texts] == [converted.encode(text).ids for text in texts]


@pytest.mark.parametrize("scores", ["zero", "learned"])
def test_disagreement_of_an_unsafe_policy_is_measured_and_logged(scores, bases, tmp_path, caplog):
    base = bases["sentencepiece"]
    with caplog.at_level(logging.WARNING):
        made = build(base.folder, tmp_path / "out", make_latin(), ("Latin",), scores=scores)
    model = sentencepiece.SentencePieceProcessor(model_file=str(made.folder / "tokenizer.model"))
    texts = make_latin()
    differing = sum(made.tokenizer.encode(text, add_special_tokens=False).ids != model.encode(text) for text in texts)
    new = [made.tokenizer.id_to_token(index) for index in range(base.vocab_size, made.vocab_size)]
    lost = sum(model.encode(f"\n{piece}", out_type=str)[2:] != [piece] for piece in new)
    bare = strip_tokenizer(made)
    lost_json = sum(bare.encode(piece).tokens != [piece] for piece in new)
    counts = read_counts(made)
    assert counts["differing_from_model"] == differing > 0
    assert (counts["unreachable_by_model"], counts["unreachable_by_json"]) == (lost, lost_json)
    assert lost + lost_json > 0
    said = (
        f"{lost_json} of {SIZE} new pieces are unreachable by tokenizer.json, {lost} by tokenizer.model, and they cut "
    )
    assert f"{said}{differing} of {len(texts)} texts differently" in caplog.text
    # The base's own language is cut otherwise too, in the file where scores are priorities.
    english = make_texts("en", 100, seed=9)
    old = sentencepiece.SentencePieceProcessor(model_file=str(base.folder / "tokenizer.model"))
    assert model.encode(english) != old.encode(english)


def test_a_safe_policy_completes_what_the_merges_of_the_base_keep_from_coming_out(bases, tmp_path, caplog):
    for kind, base in bases.items():
        with caplog.at_level(logging.INFO):
            made = build(base.folder, tmp_path / kind, make_latin())
        counts = read_counts(made)
        assert counts["candidates"]["joint"] > 0
        assert counts["candidates"]["accepted"] + counts["candidates"]["joint"] == SIZE
        assert "differing_from_model" not in counts
        assert "all new pieces reachable" in caplog.text


def test_a_base_that_knows_the_language_takes_a_second_round(bases, tmp_path, monkeypatch):
    rounds = []

    def learn(*args):
        rounds.append(args[2])
        return learn_alone(*args)

    monkeypatch.setattr(merge, "learn_alone", learn)
    for kind, base in bases.items():
        rounds.clear()
        first = build(base.folder, tmp_path / f"{kind}-1", make_texts("ru"), SCRIPTS["ru"], size=150)
        assert len(rounds) == 1
        second = build(first.folder, tmp_path / f"{kind}-2", make_texts("ru"), SCRIPTS["ru"], size=60)
        assert second.vocab_size == first.vocab_size + 60
        assert len(rounds) == 3
        assert rounds[2] > rounds[1]
        assert read_counts(second)["candidates"]["old piece"] > 60


def test_rare_pieces_are_not_taken(bases, tmp_path, caplog):
    for kind, base in bases.items():
        words = count_words(base, make_texts("ru", 60), make_filter(SCRIPTS["ru"])).counts
        with caplog.at_level(logging.WARNING):
            made = build(base.folder, tmp_path / kind, make_texts("ru", 60), SCRIPTS["ru"], size=5000, min_frequency=20)
        added = made.vocab_size - base.vocab_size
        assert 20 < added < 500
        assert (
            f"the corpus gives {added} pieces, not 5,000; add text or lower tokenizer.min_frequency (20)" in caplog.text
        )
        found = Counter()
        for word, count in words.items():
            text = from_letters(word) if kind == "byte_level" else word.replace("▁", " ").encode()
            for piece in list_new(made, base):
                found[piece] += count * text.count(piece)
        assert min(found.values()) >= 20


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=60), max_size=12), st.sampled_from([1, 2]))
def test_any_text_gives_a_right_extension_or_a_clear_error(bases, tmp_path_factory, texts, min_frequency):
    # The build itself checks ids, reachability, round trip and agreement.
    for kind, scores in (("byte_level", "below"), ("sentencepiece", "below"), ("sentencepiece", "zero")):
        output = tmp_path_factory.mktemp("any") / kind
        try:
            made = build(bases[kind].folder, output, texts * 2, size=30, scores=scores, min_frequency=min_frequency)
        except DataError as error:
            if "no new piece" not in str(error):
                raise
            continue
        for text in texts:
            expected = text.replace("▁", " ") if kind == "sentencepiece" else text
            ids = made.tokenizer.encode(text, add_special_tokens=False).ids
            assert made.tokenizer.decode(ids, skip_special_tokens=False) == expected


@pytest.mark.parametrize("text", [*ODD_TEXTS, "▅▅ ▅a▅", "a▅b", "⁇ x", "<unk>a <s>b</s>", "􏿿" * 3])
def test_odd_text_is_learned_from_without_an_error(bases, tmp_path, text):
    for kind, base in bases.items():
        made = build(base.folder, tmp_path / kind, [text, "кот кот"] * 3, size=20)
        assert " кот".encode() in list_new(made, base)


def test_building_twice_gives_the_same_files(bases, merged, tmp_path):
    for kind, base in bases.items():
        again = build(base.folder, tmp_path / kind, make_texts("ja"), SCRIPTS["ja"])
        for name in ("tokenizer.json", "added_pieces.json"):
            assert (again.folder / name).read_bytes() == (merged[kind, "ja"].folder / name).read_bytes()


def test_scores_where_there_are_none_are_refused(bases, tmp_path):
    byte_level, folder = bases["byte_level"].folder, tmp_path / "json"
    copy_tokenizer(bases["sentencepiece"].folder, folder)
    (folder / "tokenizer.model").unlink()
    for base in (byte_level, folder):
        with pytest.raises(ConfigError, match=r"tokenizer\.scores: 'zero' is for a base with .* has none; leave"):
            build(base, tmp_path / "out", make_texts("ru"), SCRIPTS["ru"], scores="zero")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scores", ["below", "zero"])
def test_a_corpus_without_the_script_is_refused(bases, tmp_path, scores):
    with pytest.raises(DataError, match=r"150 documents hold no new piece in Cyrillic 2 times \(no such text\)"):
        build(bases["sentencepiece"].folder, tmp_path / "out", make_texts("en"), SCRIPTS["ru"], scores=scores)
    with pytest.raises(DataError, match=r"1 documents hold no new piece in Cyrillic 9 times \(\d+ rare\)"):
        build(bases["sentencepiece"].folder, tmp_path / "out", ["кот"], SCRIPTS["ru"], scores=scores, min_frequency=9)
