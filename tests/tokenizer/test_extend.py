import json
import logging
import shutil
from collections import Counter
from itertools import pairwise

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer

from megatron_adapt.config import BuildTokenizer, TokenizerSettings
from megatron_adapt.errors import ConfigError, DataError
from megatron_adapt.tokenizer import merges
from megatron_adapt.tokenizer.build import build_tokenizer
from megatron_adapt.tokenizer.extend import learn_pieces
from megatron_adapt.tokenizer.made import count_pieces
from megatron_adapt.tokenizer.model_proto import Piece, append_pieces, read_model, write_model
from megatron_adapt.tokenizer.pieces import copy_tokenizer, encode_texts, piece_bytes, read_tokenizer
from tests.tokenizer.bases import MIXED, SCRIPTS, edit_json, make_texts, write_corpus
from tests.tokenizer.guarantees import require_one_language_shorter

EXTENSIONS = {**SCRIPTS, "en": ()}


def extend(base_folder, output, texts, scripts=(), size="120", **options):
    corpus = write_corpus(output.parent / f"{output.name}.jsonl", texts)
    made = TokenizerSettings(size=size, scripts=scripts, **options)
    build_tokenizer(BuildTokenizer(base=base_folder, corpus=(corpus,), output=output, settings=made))
    return read_tokenizer(output)


@pytest.fixture(scope="module")
def extended(bases, tmp_path_factory):
    """Every base extended by every language."""
    root = tmp_path_factory.mktemp("extended")
    return {
        (kind, language): extend(base.folder, root / f"{kind}-{language}", make_texts(language), scripts)
        for kind, base in bases.items()
        for language, scripts in EXTENSIONS.items()
    }


def test_old_ids_never_move(bases, extended):
    for (kind, _), tokenizer in extended.items():
        old = bases[kind].tokenizer
        found = tokenizer.tokenizer.get_vocab(with_added_tokens=True)
        assert tokenizer.vocab_size == bases[kind].vocab_size + 120
        assert old.get_vocab(with_added_tokens=True).items() <= found.items()
        assert tokenizer.tokenizer.get_added_tokens_decoder() == old.get_added_tokens_decoder()
        assert piece_bytes(tokenizer)[: bases[kind].vocab_size] == piece_bytes(bases[kind])


def test_every_added_piece_is_one_token(bases, extended):
    for (kind, _), tokenizer in extended.items():
        spelled = piece_bytes(tokenizer)
        for index in range(bases[kind].vocab_size, tokenizer.vocab_size):
            try:
                text = spelled[index].decode()
            except UnicodeDecodeError:
                assert kind == "byte_level"
                continue
            # SentencePiece puts a space in front of a text, so the others go behind a line end.
            before = "\n" if kind == "sentencepiece" and not text.startswith(" ") else ""
            text = text[1:] if kind == "sentencepiece" and not before else text
            ids = tokenizer.tokenizer.encode(before + text, add_special_tokens=False).ids
            assert ids[2 * len(before) :] == [index]


def test_the_new_language_gets_shorter_and_others_stay_as_they_were(bases, extended):
    for (kind, language), tokenizer in extended.items():
        if language != "en":
            require_one_language_shorter(bases[kind], tokenizer, language)
            continue
        before, after = (encode_texts(each, make_texts("en", 30, seed=3)) for each in (bases[kind], tokenizer))
        assert sum(map(len, after)) < sum(map(len, before))


def test_no_text_is_lost(bases, extended):
    for (kind, _), tokenizer in extended.items():
        for text in MIXED:
            ids = tokenizer.tokenizer.encode(text).ids
            expected = text.replace("▁", " ") if kind == "sentencepiece" else text
            assert tokenizer.tokenizer.decode(ids) == expected


def test_tokenizers_sentencepiece_and_transformers_agree(extended):
    for (kind, _), tokenizer in extended.items():
        ids = encode_texts(tokenizer, MIXED)
        loaded = AutoTokenizer.from_pretrained(tokenizer.folder)
        assert [loaded(text)["input_ids"] for text in MIXED] == ids
        if kind == "sentencepiece":
            model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.folder / "tokenizer.model"))
            assert [[1, *model.encode(text)] for text in MIXED] == ids


def test_scores_fall_in_the_order_of_the_ids(bases, extended):
    for language in EXTENSIONS:
        pieces = read_model(extended["sentencepiece", language].folder / "tokenizer.model").pieces
        size = bases["sentencepiece"].vocab_size
        lowest = min(piece.score for piece in pieces[:size])
        scores = [lowest, *(piece.score for piece in pieces[size:])]
        assert all(later < earlier for earlier, later in pairwise(scores))


def test_every_split_of_a_new_piece_is_a_merge_and_old_merges_keep_their_order(bases, extended):
    num_pieces = num_splits = num_inserted = 0
    for (kind, _), tokenizer in extended.items():
        size = bases[kind].vocab_size
        model = json.loads((tokenizer.folder / "tokenizer.json").read_text())["model"]
        vocab, merges = model["vocab"], [tuple(merge) for merge in model["merges"]]
        old = json.loads((bases[kind].folder / "tokenizer.json").read_text())["model"]["merges"]
        assert [merge for merge in merges if max(vocab[part] for part in (*merge, "".join(merge))) < size] == [
            tuple(merge) for merge in old
        ]
        new = [piece for piece, index in vocab.items() if index >= size]
        splits = [(piece[:at], piece[at:]) for piece in new for at in range(1, len(piece))]
        splits = [pair for pair in splits if pair[0] in vocab and pair[1] in vocab]
        assert merges[-len(splits) :] == splits
        num_pieces += sum(len(piece) > 1 for piece in new)
        num_splits += len(splits)
        num_inserted += len(merges) - len(splits) - len(old)
    assert num_splits > num_pieces
    assert num_inserted > 0


def test_added_pieces_name_the_old_ids_of_their_surface(bases, extended):
    for (kind, _), tokenizer in extended.items():
        record = json.loads((tokenizer.folder / "added_pieces.json").read_text())
        old, new = piece_bytes(bases[kind]), piece_bytes(tokenizer)
        assert record["base_vocab_size"] == len(old)
        assert [int(index) for index in record["pieces"]] == list(range(len(old), len(new)))
        for index, ids in record["pieces"].items():
            assert len(ids) > 1
            assert b"".join(old[part] for part in ids) == new[int(index)]


def test_no_piece_crosses_words_or_holds_two_digits(bases, extended):
    for (kind, _), tokenizer in extended.items():
        for data in piece_bytes(tokenizer)[bases[kind].vocab_size :]:
            text = data.decode(errors="ignore")
            assert " " not in text[1:]
            assert sum(letter.isdigit() for letter in text) < 2


def test_the_record_says_what_was_done(extended):
    record = json.loads((extended["sentencepiece", "ja"].folder / "stage.json").read_text())
    counts = record["counts"]
    assert (counts["pieces_asked"], counts["pieces_added"], counts["documents"]) == (120, 120, 150)
    assert counts["checked_against_model"] == counts["checked_texts"] == 150
    assert counts["tokens_per_byte"] < counts["base_tokens_per_byte"]
    assert counts["candidates"]["accepted"] == 120


def test_building_twice_and_without_the_extension_gives_the_same_files(bases, extended, tmp_path, monkeypatch):
    monkeypatch.setattr(merges, "_csrc", None)
    for kind, base in bases.items():
        again = extend(base.folder, tmp_path / kind, make_texts("ja"), SCRIPTS["ja"])
        for name in ("tokenizer.json", "added_pieces.json"):
            assert (again.folder / name).read_bytes() == (extended[kind, "ja"].folder / name).read_bytes()


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=60), max_size=12), st.sampled_from([1, 2]))
def test_any_text_gives_a_right_extension_or_a_clear_error(bases, tmp_path_factory, texts, min_frequency):
    # Repeated, so that there is something to learn; the build itself checks ids, reachability, round trip, agreement.
    for kind, base in bases.items():
        output = tmp_path_factory.mktemp("any") / kind
        try:
            tokenizer = extend(base.folder, output, texts * 2, size="30", min_frequency=min_frequency)
        except DataError as error:
            if "no new piece" not in str(error):
                raise
            continue
        for text in texts:
            expected = text.replace("▁", " ") if kind == "sentencepiece" else text
            specials = tokenizer.tokenizer.encode(text, add_special_tokens=False)
            assert tokenizer.tokenizer.decode(specials.ids, skip_special_tokens=False) == expected


def test_added_tokens_keep_their_ids_wherever_they_are(base, tmp_path):
    folder = tmp_path / "base"
    copy_tokenizer(base.folder, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<|chat|>", normalized=False, special=True)])
    tokenizer.add_tokens([AddedToken("[tool]", normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    first = extend(folder, tmp_path / "first", make_texts("ru"), SCRIPTS["ru"], size="50")
    # Extended again, the added tokens stand in the middle.
    second = extend(first.folder, tmp_path / "second", make_texts("ar"), SCRIPTS["ar"], size="50")
    for made in (first, second):
        loaded = AutoTokenizer.from_pretrained(made.folder)
        for text, index in (("<|chat|>", 420), ("[tool]", 421)):
            assert made.tokenizer.token_to_id(text) == loaded.convert_tokens_to_ids(text) == index
            assert made.tokenizer.encode(f"the{text}the", add_special_tokens=False).ids.count(index) == 1
    assert (first.vocab_size, second.vocab_size) == (472, 522)
    if base.kind == "sentencepiece":
        pieces = read_model(second.folder / "tokenizer.model").pieces
        assert [(pieces[index].text, pieces[index].kind) for index in (420, 421)] == [("<|chat|>", 3), ("[tool]", 4)]


def test_an_unused_id_stays_unused(bases, tmp_path):
    folder = tmp_path / "base"
    copy_tokenizer(bases["sentencepiece"].folder, folder)

    def add(content):
        content["model"]["vocab"]["<pad>"] = 430
        content["added_tokens"].append({**content["added_tokens"][0], "id": 430, "content": "<pad>"})

    edit_json(folder / "tokenizer.json", add)
    tokenizer = extend(folder, tmp_path / "out", make_texts("ru"), SCRIPTS["ru"], size="20")
    assert tokenizer.vocab_size == 451
    assert tokenizer.tokenizer.id_to_token(425) is None
    assert read_model(tokenizer.folder / "tokenizer.model").pieces[425].text == "<unused_425>"


def test_merges_written_as_strings_stay_strings(base, extended, tmp_path):
    folder = tmp_path / "base"
    copy_tokenizer(base.folder, folder)
    edit_json(
        folder / "tokenizer.json",
        lambda content: content["model"].update(merges=[" ".join(pair) for pair in content["model"]["merges"]]),
    )
    made = extend(folder, tmp_path / "out", make_texts("ru"), SCRIPTS["ru"])
    written = json.loads((made.folder / "tokenizer.json").read_text())["model"]["merges"]
    assert all(isinstance(merge, str) for merge in written)
    assert made.fingerprint == extended[base.kind, "ru"].fingerprint


def test_a_model_file_alone_is_extended_to_both_files(bases, extended, tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    shutil.copy(bases["sentencepiece"].folder / "tokenizer.model", folder)
    made = extend(folder, tmp_path / "out", make_texts("ja"), SCRIPTS["ja"])
    assert made.fingerprint == extended["sentencepiece", "ja"].fingerprint
    loaded = AutoTokenizer.from_pretrained(made.folder)
    assert [loaded(text)["input_ids"] for text in MIXED] == encode_texts(made, MIXED)


def test_chat_template_and_settings_are_kept_and_stale_files_are_not(bases, tmp_path):
    folder = tmp_path / "base"
    copy_tokenizer(bases["byte_level"].folder, folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "vocab.json").write_text("{}")
    (folder / "tokenizer.model").write_text("IQ== 0")  # Llama 3 ships its tiktoken file under this name
    made = extend(folder, tmp_path / "out", make_texts("ru"), SCRIPTS["ru"], size="5").folder
    assert (made / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (made / "tokenizer_config.json").read_bytes() == (folder / "tokenizer_config.json").read_bytes()
    assert not (made / "vocab.json").exists()
    assert not (made / "tokenizer.model").exists()


def test_pieces_are_learned_from_text_as_the_base_normalises_it(bases, tmp_path):
    folder = tmp_path / "base"
    copy_tokenizer(bases["byte_level"].folder, folder)
    edit_json(folder / "tokenizer.json", lambda content: content.update(normalizer={"type": "NFC"}))
    made = extend(folder, tmp_path / "out", ["か\u3099か\u3099"] * 9, SCRIPTS["ja"], size="9")
    composed, decomposed = (made.tokenizer.encode(text).ids for text in ("がが", "か\u3099か\u3099"))
    assert composed == decomposed == [made.bos_id, made.tokenizer.encode("がが").ids[-1]]


def test_words_in_the_vocabulary_are_reachable_by_merges_too(bases, tmp_path):
    folder = tmp_path / "base"
    copy_tokenizer(bases["byte_level"].folder, folder)
    edit_json(folder / "tokenizer.json", lambda content: content["model"].update(ignore_merges=True))
    made = extend(folder, tmp_path / "out", make_texts("ru"), SCRIPTS["ru"])
    assert json.loads((made.folder / "tokenizer.json").read_text())["model"]["ignore_merges"]


def orphan_base(bases, folder):
    """A base with the piece abc that none of its other pieces can spell."""
    folder.mkdir()
    model = read_model(bases["sentencepiece"].folder / "tokenizer.model")
    text = "\u3042\u3044\u3046"
    low = min(piece.score for piece in model.pieces)
    letters = [Piece(letter, low - 1 - at) for at, letter in enumerate("\u3042\u3044\u3046\u3048\u304a")]
    write_model(append_pieces(model, [*letters, Piece(text, low - 9)]), folder / "tokenizer.model")
    return folder


def test_an_old_piece_completed_by_a_new_one_merges_in_both_files(bases, tmp_path, caplog):
    folder = orphan_base(bases, tmp_path / "base")
    a, b, c, y, z = "\u3042\u3044\u3046\u3048\u304a"
    # Behind a digit a word has no space in front.
    texts = [*[b + c] * 90, *[b + c + z] * 60, *[y + a] * 40, *[y + a + b + c + z] * 20, *[f"1{a + b + c}"] * 15]
    with caplog.at_level(logging.INFO):
        made = extend(folder, tmp_path / "out", texts, size="10")
    assert "pieces came out unreachable; choosing again without them" in caplog.text
    old = read_tokenizer(folder)
    model = sentencepiece.SentencePieceProcessor(model_file=str(made.folder / "tokenizer.model"))
    for text in [*texts, a + b + c]:
        assert made.tokenizer.encode(text, add_special_tokens=False).ids == model.encode(text)
    assert model.encode(y + a + b + c, out_type=str)[-1] == a + b + c
    assert a + b + c not in old.tokenizer.encode(a + b + c).tokens


def test_size_is_a_number_or_a_share_of_the_base():
    for size, base, count in (("2000", 32000, 2000), ("extend25", 32000, 8000), ("extend100", 32001, 32001)):
        assert count_pieces(TokenizerSettings(size=size), base, base) == count
    assert count_pieces(TokenizerSettings(size="extend1"), 20, 20) == 1
    rounded = TokenizerSettings(size="2000", size_multiple=1024)
    assert 32000 + count_pieces(rounded, 32000, 32000) == 34 * 1024 > 32000 + 2000


def test_frequencies_bound_what_is_learned(base):
    pieces, reasons = learn_pieces(base, Counter({"жж": 3}), 9, TokenizerSettings(min_frequency=7))
    assert not pieces
    assert not reasons
    if base.kind == "sentencepiece":
        pieces, reasons = learn_pieces(base, Counter({"жж": 3}), 9, TokenizerSettings(min_frequency=2))
        assert pieces == [("ж".encode(), 6), ("жж".encode(), 3)]


def test_a_small_corpus_gives_fewer_pieces_and_a_warning(base, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        made = extend(base.folder, tmp_path / "out", ["кот кот кот"], SCRIPTS["ru"], size="5000")
    added = made.vocab_size - base.vocab_size
    assert 0 < added < 10
    assert f"the corpus gives {added} pieces, not 5,000" in caplog.text


def test_a_corpus_without_the_script_is_refused(base, tmp_path):
    with pytest.raises(DataError, match=r"150 documents hold no new piece in Cyrillic 2 times \(no such text\)"):
        extend(base.folder, tmp_path / "out", make_texts("en"), SCRIPTS["ru"])
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_two_tokenizers_in_one_folder_are_refused(bases, tmp_path):
    folder = tmp_path / "base"
    copy_tokenizer(bases["sentencepiece"].folder, folder)

    def swap(content):
        vocab = content["model"]["vocab"]
        vocab["in"], vocab["er"] = vocab["er"], vocab["in"]

    edit_json(folder / "tokenizer.json", swap)
    with pytest.raises(DataError, match=r"the files are of two tokenizers"):
        extend(folder, tmp_path / "out", make_texts("ru"))


def test_an_added_token_with_two_ids_is_refused(bases, tmp_path):
    folder = tmp_path / "base"
    copy_tokenizer(bases["sentencepiece"].folder, folder)
    model = read_model(folder / "tokenizer.model")

    def move(content):
        for token in content["added_tokens"]:
            if token["content"] == "<unk>":
                token["id"] = 420
        content["model"]["vocab"]["<unk>"] = 420

    edit_json(folder / "tokenizer.json", move)
    assert model.pieces[0].text == "<unk>"
    with pytest.raises(DataError, match="'<unk>' has an id of its own and id 420"):
        extend(folder, tmp_path / "out", make_texts("ru"))


def test_wrong_input_is_refused_before_anything_is_written(base, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious").touch()
    with pytest.raises(ConfigError, match="exists already"):
        extend(base.folder, output, make_texts("ru"))
    with pytest.raises(ConfigError, match="is no Unicode script"):
        extend(base.folder, tmp_path / "new", make_texts("ru"), ("Cyrilic",))
    config = BuildTokenizer(base=base.folder, corpus=(tmp_path / "none.jsonl",), output=tmp_path / "new")
    with pytest.raises(DataError, match=r"--corpus: .* is not a file"):
        build_tokenizer(config)
    assert not (tmp_path / "new").exists()
    assert [path.name for path in output.iterdir()] == ["precious"]
