import json
import logging
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from megatron_adapt.config import BuildTokenizer, TokenizerSettings
from megatron_adapt.errors import ConfigError, DataError
from megatron_adapt.tokenizer.build import build_tokenizer
from megatron_adapt.tokenizer.id_map import read_id_map
from megatron_adapt.tokenizer.learn import train_sentencepiece
from megatron_adapt.tokenizer.pieces import piece_bytes, read_tokenizer
from megatron_adapt.tokenizer.words import strip_tokenizer
from tests.tokenizer.bases import CHAT, MIXED, TEMPLATE, TOOL, make_texts, write_chat_base, write_corpus
from tests.tokenizer.guarantees import encode, encode_by_model, encode_by_transformers

MADE = [("byte_level", "bpe"), ("sentencepiece", "bpe"), ("sentencepiece", "unigram")]
SIZE = 640


def cut_in_twos(text):
    return (text[at : at + 2] for at in range(0, len(text), 2))


def replace(base_folder, output, new="ru", **changes):
    """Replace a base by a vocabulary for English and another language."""
    corpora = {
        name: write_corpus(output.parent / f"{output.name}.{name}.jsonl", texts)
        for name, texts in (
            ("new", make_texts(new) if isinstance(new, str) else new),
            ("old", changes.pop("old", None) or make_texts("en")),
        )
    }
    made = TokenizerSettings(method="replace", **{"size": str(SIZE), **changes})
    build_tokenizer(
        BuildTokenizer(
            base=base_folder, corpus=(corpora["new"],), old_corpus=(corpora["old"],), output=output, settings=made
        )
    )
    return read_tokenizer(output)


def count_tokens(tokenizer, language):
    return sum(map(len, encode(tokenizer, make_texts(language, 60, seed=5))))


def list_learned(tokenizer):
    """The text of every piece that is neither an added token nor a byte."""
    added = tokenizer.tokenizer.get_added_tokens_decoder()
    surfaces = piece_bytes(tokenizer)
    return {
        index: surfaces[index].decode(errors="replace")
        for text, index in tokenizer.tokenizer.get_vocab(with_added_tokens=True).items()
        if index not in added and not text.startswith("<0x") and (len(text) > 1 or tokenizer.kind == "sentencepiece")
    }


@pytest.fixture(scope="module")
def chat_bases(bases, tmp_path_factory):
    root = tmp_path_factory.mktemp("chat")
    return {kind: write_chat_base(base, root / kind) for kind, base in bases.items()}


@pytest.fixture(scope="module")
def replaced(chat_bases, tmp_path_factory):
    root = tmp_path_factory.mktemp("replaced")
    return {
        (kind, model): replace(chat_bases[kind].folder, root / f"{kind}-{model}", model=model) for kind, model in MADE
    }


@pytest.mark.parametrize("which", MADE, ids="-".join)
def test_all_readers_agree_and_no_text_is_lost(replaced, which):
    made = replaced[which]
    ids = encode(made, MIXED)
    assert encode_by_transformers(made, MIXED) == ids
    expected = MIXED
    if made.kind == "sentencepiece":
        assert encode_by_model(made, MIXED) == ids
        expected = [text.replace("▁", " ") for text in MIXED]
    assert made.tokenizer.decode_batch(ids, skip_special_tokens=False) == expected


@pytest.mark.parametrize("which", MADE, ids="-".join)
def test_special_tokens_and_the_chat_template_are_carried_over(chat_bases, replaced, which):
    base, made = chat_bases[which[0]], replaced[which]
    old, new = (tokenizer.tokenizer.get_added_tokens_decoder() for tokenizer in (base, made))
    assert list(map(str, new.values())) == list(map(str, old.values()))
    # Those in front of the pieces keep their ids, those behind them stay behind.
    assert [index for index in new if index < 256] == [index for index in old if index < 256]
    assert [index for index in new if index >= 256] == [made.vocab_size - 2, made.vocab_size - 1]
    assert (made.bos_id, made.eos_id, made.adds_bos) == (base.bos_id, base.eos_id, True)
    loaded = AutoTokenizer.from_pretrained(made.folder)
    assert (loaded.chat_template, loaded.eos_token_id) == (TEMPLATE, made.eos_id)
    ids = loaded.apply_chat_template([{"role": "user", "content": "the"}], return_dict=False)
    assert ids[:2] == [made.bos_id, made.tokenizer.token_to_id(CHAT)]
    text = f"the {CHAT}the {TOOL}"
    assert loaded(text)["input_ids"] == made.tokenizer.encode(text).ids
    assert made.tokenizer.token_to_id(TOOL) in made.tokenizer.encode(text).ids


@pytest.mark.parametrize("which", MADE, ids="-".join)
def test_every_piece_comes_out_and_the_size_is_the_whole_vocabulary(replaced, which):
    made = replaced[which]
    bare = strip_tokenizer(made)
    for index in list_learned(made):
        assert bare.encode(made.tokenizer.id_to_token(index)).ids == [index]
    assert made.vocab_size == SIZE == made.tokenizer.get_vocab_size()


@pytest.mark.parametrize("which", MADE, ids="-".join)
def test_the_new_language_gets_short_and_the_old_one_stays_so(chat_bases, replaced, which):
    base, made = chat_bases[which[0]], replaced[which]
    assert count_tokens(made, "ru") < 0.5 * count_tokens(base, "ru")
    assert count_tokens(made, "en") < 1.2 * count_tokens(base, "en")


@pytest.mark.parametrize("which", MADE, ids="-".join)
def test_the_map_finds_every_old_token_that_is_still_there(chat_bases, replaced, which):
    base, made = chat_bases[which[0]], replaced[which]
    id_map = read_id_map(made)
    old, new = (tokenizer.tokenizer.get_vocab(with_added_tokens=True) for tokenizer in (base, made))
    for text, index in new.items():
        # The letter that had only its byte's piece is that byte's piece.
        assert id_map.old_id(index) == old.get(text, old.get(f"<0x{ord(text[0]):02X}>" if len(text) == 1 else ""))
    assert id_map.old_id(made.tokenizer.token_to_id(CHAT)) == 420 != made.tokenizer.token_to_id(CHAT)


def test_a_larger_share_of_a_language_cuts_it_shorter(bases, tmp_path):
    for kind, model in MADE:
        made = [
            replace(bases[kind].folder, tmp_path / f"{kind}-{model}-{share}", model=model, old_share=share)
            for share in (0.05, 0.95)
        ]
        few, many = made
        assert count_tokens(few, "ru") < count_tokens(many, "ru")
        assert count_tokens(few, "en") > count_tokens(many, "en")


def test_no_piece_crosses_the_words_of_a_segmenter(base, tmp_path):
    texts = make_texts("ja")
    longest = {}
    for name in ("", f"{__name__}:cut_in_twos"):
        made = replace(base.folder, tmp_path / f"out{bool(name)}", texts, segmenter=name, old_share=0.2)
        japanese = [text for text in list_learned(made).values() if any(letter > "\u3000" for letter in text)]
        longest[bool(name)] = max(len(text.lstrip(" ")) for text in japanese if "\ufffd" not in text)
    assert longest[True] == 2 < longest[False]


def test_scripts_and_digits_bind_new_pieces_and_old_ones_may_stay(base, tmp_path):
    made = replace(base.folder, tmp_path / "out", ["вода 2024 вода 2025 mixedда"] * 60, scripts=("Cyrillic",))
    old = set(piece_bytes(base))
    learned = list_learned(made)
    new = [text for index, text in learned.items() if piece_bytes(made)[index] not in old and "\ufffd" not in text]
    assert new
    assert all(set(text.strip(" ")) <= set("вода") for text in new)
    assert len(new) < len(learned)
    assert not any(text.count("2") + text.count("0") > 1 for text in new)
    candidates = json.loads((made.folder / "report.json").read_text())["candidates"]
    # The trainer does not learn what would be refused.
    assert base.kind == "byte_level" or "digits" not in candidates


def test_numbers_stay_whole_where_the_base_holds_them(tmp_path):
    texts = make_texts("en") + ["in 2024 and 2025"] * 90
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(train_sentencepiece(texts, 420, split_digits=False))
    made = replace(folder, tmp_path / "out", old=texts)
    assert len(encode(made, ["2024"])[0]) < 4
    assert encode_by_model(made, texts) == encode(made, texts)


def test_replacing_twice_gives_the_same_files(chat_bases, replaced, tmp_path):
    for (kind, model), made in replaced.items():
        again = replace(chat_bases[kind].folder, tmp_path / f"{kind}-{model}", model=model)
        for name in ("tokenizer.json", "tokenizer_config.json", "added_pieces.json"):
            assert (again.folder / name).read_bytes() == (made.folder / name).read_bytes()


@pytest.mark.parametrize("model", ["bpe", "unigram"])
def test_a_model_that_stands_alone_is_replaced_by_both_files(bases, tmp_path, model):
    folder = tmp_path / "base"
    folder.mkdir()
    shutil.copy(bases["sentencepiece"].folder / "tokenizer.model", folder)
    made = replace(folder, tmp_path / "out", model=model)
    assert encode_by_transformers(made, MIXED) == encode_by_model(made, MIXED) == encode(made, MIXED)
    assert json.loads((made.folder / "tokenizer_config.json").read_text())["eos_token"] == "</s>"


def test_too_little_text_gives_fewer_pieces_and_a_warning(bases, tmp_path, caplog):
    for kind, model in MADE:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            made = replace(bases[kind].folder, tmp_path / f"{kind}-{model}", model=model, size="9000")
        assert 260 < made.vocab_size < 9000
        assert f"the corpus gives {made.vocab_size:,} pieces, not 9,000" in caplog.text


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), min_size=1, max_size=10))
def test_any_text_beside_real_words_comes_back_and_is_cut_alike(bases, tmp_path_factory, texts):
    for kind, model in MADE:
        output = tmp_path_factory.mktemp("any") / "out"
        made = replace(bases[kind].folder, output, texts * 2 + make_texts("ru", 40), model=model, size="600")
        ids = encode(made, texts)
        expected = [text.replace("▁", " ") for text in texts] if kind == "sentencepiece" else texts
        assert made.tokenizer.decode_batch(ids, skip_special_tokens=False) == expected
        assert kind != "sentencepiece" or encode_by_model(made, texts) == ids


@pytest.mark.parametrize(
    ("kind", "changes", "error", "message"),
    [
        (
            "byte_level",
            {"model": "unigram"},
            ConfigError,
            r"tokenizer\.model: 'unigram' is for a SentencePiece base, .*",
        ),
        (
            "byte_level",
            {"size": "258"},
            ConfigError,
            r"size: 258 ids leave no room beside the 258 special tokens and b",
        ),
        ("sentencepiece", {"size": "extend20"}, ConfigError, r"size: 84 ids leave no room beside the 259 special"),
        ("sentencepiece", {"size": "262"}, ConfigError, r"size: 3 pieces are fewer than the characters of the corpora"),
        ("sentencepiece", {"size": "262", "model": "unigram"}, ConfigError, r"3 pieces are fewer than the characters"),
        ("byte_level", {"scripts": ("Cyrilic",)}, ConfigError, r"'Cyrilic' is no Unicode script"),
        ("byte_level", {"min_frequency": 10**6}, DataError, r"documents hold no new piece 1000000 times"),
        ("sentencepiece", {"min_frequency": 10**6}, DataError, r"documents hold no new piece 1000000 times"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(bases, tmp_path, kind, changes, error, message):
    with pytest.raises(error, match=message) as caught:
        replace(bases[kind].folder, tmp_path / "out", **changes)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_unigram_is_no_base_and_a_missing_old_corpus_is_named(bases, replaced, tmp_path):
    with pytest.raises(DataError, match="a SentencePiece Unigram has no merges to build on"):
        replace(replaced["sentencepiece", "unigram"].folder, tmp_path / "out")
    corpus = write_corpus(tmp_path / "ru.jsonl", make_texts("ru"))
    made = TokenizerSettings(method="replace", size=str(SIZE))
    config = BuildTokenizer(base=bases["byte_level"].folder, corpus=(corpus,), output=tmp_path / "out", settings=made)
    with pytest.raises(ConfigError, match="--old-corpus: missing; method replace counts the old language too"):
        build_tokenizer(config)
