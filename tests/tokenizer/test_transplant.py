import json
import random
from collections import Counter

import pytest
import sentencepiece
from transformers import AutoTokenizer

from megatron_adapt.config import BuildTokenizer, TokenizerSettings
from megatron_adapt.errors import DataError
from megatron_adapt.tokenizer.build import build_tokenizer
from megatron_adapt.tokenizer.filters import make_filter
from megatron_adapt.tokenizer.learn import learn_base_tokenizer
from megatron_adapt.tokenizer.pieces import encode_texts, piece_bytes, read_tokenizer
from megatron_adapt.tokenizer.transplant import rank_pieces
from megatron_adapt.tokenizer.words import count_words, strip_tokenizer
from tests.tokenizer.bases import KINDS, MIXED, SCRIPTS, make_texts, write_corpus
from tests.tokenizer.guarantees import require_one_language_shorter

SIZE = 60


def transplant(base_folder, donor_folder, output, texts, scripts=(), size=SIZE, **options):
    corpus = write_corpus(output.parent / f"{output.name}.jsonl", texts)
    made = TokenizerSettings(method="transplant", donor=donor_folder, size=str(size), scripts=scripts, **options)
    config = BuildTokenizer(base=base_folder, corpus=(corpus,), output=output, settings=made)
    build_tokenizer(config)
    return read_tokenizer(output)


def list_new(tokenizer, base):
    return piece_bytes(tokenizer)[base.vocab_size :]


def read_candidates(tokenizer):
    return json.loads((tokenizer.folder / "stage.json").read_text())["counts"]["candidates"]


@pytest.fixture(scope="module")
def donors(tmp_path_factory):
    """A tokenizer of each family, learned from every language but English."""
    root = tmp_path_factory.mktemp("donors")
    texts = [text for language in SCRIPTS for text in make_texts(language, 200)]
    for kind in KINDS:
        learn_base_tokenizer(texts, 700, kind, root / kind)
    return {kind: read_tokenizer(root / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def transplanted(bases, donors, tmp_path_factory):
    """Pieces of every donor in every base, for every language."""
    root = tmp_path_factory.mktemp("transplanted")
    return {
        (kind, donor, language): transplant(
            base.folder, donors[donor].folder, root / f"{kind}-{donor}-{language}", make_texts(language), scripts
        )
        for kind, base in bases.items()
        for donor in KINDS
        for language, scripts in SCRIPTS.items()
    }


def test_old_ids_never_move_and_the_size_is_the_one_asked_for(bases, transplanted):
    for (kind, _, _), tokenizer in transplanted.items():
        old = bases[kind].tokenizer
        assert tokenizer.vocab_size == bases[kind].vocab_size + SIZE
        assert old.get_vocab(with_added_tokens=True).items() <= tokenizer.tokenizer.get_vocab().items()
        assert tokenizer.tokenizer.get_added_tokens_decoder() == old.get_added_tokens_decoder()


def test_every_added_piece_is_one_token(bases, transplanted):
    for (kind, _, _), tokenizer in transplanted.items():
        bare = strip_tokenizer(tokenizer)
        for index in range(bases[kind].vocab_size, tokenizer.vocab_size):
            assert bare.encode(tokenizer.tokenizer.id_to_token(index)).ids == [index]


def test_the_new_language_gets_shorter_and_others_stay_as_they_were(bases, transplanted):
    for (kind, _, language), tokenizer in transplanted.items():
        require_one_language_shorter(bases[kind], tokenizer, language)


def test_all_readers_agree_and_no_text_is_lost(transplanted):
    for (kind, _, _), tokenizer in transplanted.items():
        ids = encode_texts(tokenizer, MIXED)
        loaded = AutoTokenizer.from_pretrained(tokenizer.folder)
        assert [loaded(text)["input_ids"] for text in MIXED] == ids
        expected = [text.replace("▁", " ") if kind == "sentencepiece" else text for text in MIXED]
        assert tokenizer.tokenizer.decode_batch(ids) == expected
        if kind == "sentencepiece":
            model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.folder / "tokenizer.model"))
            assert [[1, *model.encode(text)] for text in MIXED] == ids


def test_added_pieces_are_the_donors_whatever_its_family_and_joints_come_last(bases, donors, transplanted):
    num_spaced = 0
    for (kind, donor, _), tokenizer in transplanted.items():
        own = set(piece_bytes(donors[donor]))
        new = list_new(tokenizer, bases[kind])
        joints = read_candidates(tokenizer).get("joint", 0)
        assert set(new[: SIZE - joints]) <= own
        num_spaced += sum(piece.startswith(b" ") for piece in new)
    assert num_spaced > 100


def test_the_most_frequent_pieces_are_taken(bases, donors, transplanted):
    for (kind, donor, language), tokenizer in transplanted.items():
        base = bases[kind]
        words = count_words(base, make_texts(language), make_filter(SCRIPTS[language]))
        frequency = rank_pieces(base, donors[donor], words.counts)
        new = [
            piece.replace(b" ", "▁".encode() if kind == "sentencepiece" else b" ")
            for piece in list_new(tokenizer, base)
        ]
        joints = read_candidates(tokenizer).get("joint", 0)
        rarest = min(frequency[piece] for piece in new[: SIZE - joints])
        old = {piece.replace(b" ", "▁".encode()) if kind == "sentencepiece" else piece for piece in piece_bytes(base)}
        for piece in [piece for piece, count in frequency.items() if count > rarest and piece not in {*new, *old}]:
            # What was passed over is no text of its own, or would have taken more joints than there was room for.
            text = piece.decode(errors="replace")
            assert "\ufffd" in text or "no room for its joints" in read_candidates(tokenizer)


def test_a_character_counts_wherever_the_text_holds_it_and_spaces_are_the_bases(bases, donors):
    text = " ".join(make_texts("ru"))
    for base in bases.values():
        words = count_words(base, [text], make_filter(SCRIPTS["ru"]))
        frequency = rank_pieces(base, donors["sentencepiece"], words.counts)
        letters = {letter for letter in text if "а" <= letter <= "я"}
        assert {letter: frequency[letter.encode()] for letter in letters} == {
            letter: text.count(letter) for letter in letters
        }
        space = "▁" if base.kind == "sentencepiece" else " "
        assert frequency[space.encode()] == sum(
            word.startswith(("▁", "Ġ")) * count for word, count in words.counts.items()
        )
        assert any(piece.startswith(space.encode()) for piece in frequency if len(piece) > 3)


def test_text_is_cut_as_the_donor_cuts_it_where_the_base_has_no_merges(bases, donors, tmp_path):
    base, donor = bases["sentencepiece"], donors["sentencepiece"]
    made = transplant(
        base.folder, donor.folder, tmp_path / "out", make_texts("ru", 200), SCRIPTS["ru"], 500, min_frequency=1
    )
    own, new = piece_bytes(donor), piece_bytes(made)
    for text in make_texts("ru", 200):
        for word in text.rstrip("!。. 024\n").split():
            ids = made.tokenizer.encode(word, add_special_tokens=False).ids
            as_donor = donor.tokenizer.encode(word, add_special_tokens=False).ids
            assert [new[index] for index in ids] == [own[index] for index in as_donor]


def test_pieces_the_base_cuts_otherwise_are_completed_within_the_size(bases, tmp_path):
    # The donor's parts of these words are not those that the base's merges leave.
    rng = random.Random("joints")
    words = ["".join(rng.choices("thir rein nic qua lit eau the mong inter ionst".split(), k=4)) for _ in range(60)]
    texts = [" ".join(rng.choices(words, k=20)) for _ in range(100)]
    for kind, base in bases.items():
        learn_base_tokenizer(texts, 450, kind, tmp_path / f"donor-{kind}")
        donor = read_tokenizer(tmp_path / f"donor-{kind}")
        made = transplant(base.folder, donor.folder, tmp_path / kind, texts, size=70)
        found, own = read_candidates(made), set(piece_bytes(donor))
        assert made.vocab_size == base.vocab_size + 70
        assert found["accepted"] + found["joint"] == 70
        assert found["joint"] > 0
        new = list_new(made, base)
        assert set(new[: found["accepted"]]) <= own
        assert not set(new[found["accepted"] :]) <= own
        # A joint stands in front of a piece that needs it.
        assert all(
            any(piece != joint and piece.startswith(joint) for piece in new) for joint in new[found["accepted"] :]
        )


def test_parts_of_characters_are_no_sentencepiece_pieces(bases, transplanted):
    found = Counter()
    for (kind, donor, _), tokenizer in transplanted.items():
        found[kind, donor] += read_candidates(tokenizer).get("part of a character", 0)
        if kind == "sentencepiece":
            assert all(piece.decode() for piece in list_new(tokenizer, bases[kind]))
    assert found["sentencepiece", "byte_level"] > 0
    assert found["sentencepiece", "sentencepiece"] == 0


def test_rare_pieces_are_left_and_a_small_donor_gives_a_warning(bases, donors, tmp_path, caplog):
    for kind, base in bases.items():
        made = transplant(
            base.folder, donors[kind].folder, tmp_path / kind, make_texts("ru"), SCRIPTS["ru"], 5000, min_frequency=30
        )
        added = made.vocab_size - base.vocab_size
        assert 10 < added < 300
        assert (
            f"the donor gives {added} pieces, not 5,000; add text or lower tokenizer.min_frequency (30)" in caplog.text
        )
        assert read_candidates(made)["rare"] > 0
        texts = "".join(make_texts("ru")).encode()
        joints = read_candidates(made).get("joint", 0)
        assert min(texts.count(piece.strip()) for piece in list_new(made, base)[: added - joints]) >= 30


def test_a_donor_without_the_language_is_refused(bases, tmp_path):
    donor = bases["byte_level"].folder
    with pytest.raises(DataError, match=r"150 documents hold no new piece in Cyrillic 2 times \(.*old piece.*\)"):
        transplant(bases["byte_level"].folder, donor, tmp_path / "out", make_texts("ru"), SCRIPTS["ru"])
    assert not (tmp_path / "out").exists()


def test_a_donor_of_an_unknown_family_is_refused(bases, tmp_path):
    donor = tmp_path / "donor"
    donor.mkdir()
    (donor / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordPiece", "vocab": {}}}))
    with pytest.raises(DataError, match="a WordPiece tokenizer is not supported"):
        transplant(bases["byte_level"].folder, donor, tmp_path / "out", make_texts("ru"))
    with pytest.raises(DataError, match=r"holds no tokenizer\.json and no tokenizer\.model \(no such folder\)"):
        transplant(bases["byte_level"].folder, tmp_path / "none", tmp_path / "out", make_texts("ru"))
