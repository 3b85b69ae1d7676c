import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

from megatron_adapt.errors import DataError
from megatron_adapt.tokenizer.base import check_base
from megatron_adapt.tokenizer.pieces import (
    copy_tokenizer,
    encode_texts,
    from_letters,
    piece_bytes,
    read_tokenizer,
    require_bpe,
    to_byte_piece,
    to_letters,
)
from megatron_adapt.tokenizer.words import strip_tokenizer
from tests.tokenizer.bases import ODD_TEXTS, edit_json, make_texts


@given(st.binary())
def test_letters_and_bytes_are_inverses(data):
    assert from_letters(to_letters(data)) == data
    assert to_letters(data).isprintable()


def test_letters_are_those_of_the_tokenizers_library():
    assert set(to_letters(bytes(range(256)))) == set(pre_tokenizers.ByteLevel.alphabet())


def test_a_piece_in_other_characters_stands_for_itself():
    assert from_letters("日本") == "日本".encode()
    assert from_letters("a b\x80") == "a b\x80".encode()


def test_bytes_of_the_pieces_spell_the_text(base):
    spelled = piece_bytes(base)
    assert len(spelled) == base.vocab_size
    for text in [*ODD_TEXTS, *make_texts("ja", 5), *make_texts("en", 5)]:
        expected = text.encode()
        if base.kind == "sentencepiece":
            expected = (" " + text if text else text).replace("▁", " ").encode()
        assert b"".join(spelled[index] for index in encode_texts(base, [text])[0]) == expected


def test_special_tokens_stand_for_no_bytes(base):
    spelled = piece_bytes(base)
    assert spelled[base.bos_id] == spelled[base.eos_id] == b""


def test_texts_get_the_ids_that_transformers_gives(base):
    texts = [*ODD_TEXTS, *make_texts("ru", 5)]
    reference = AutoTokenizer.from_pretrained(base.folder)
    assert encode_texts(base, texts) == [reference(text)["input_ids"] for text in texts]
    assert base.adds_bos
    assert (base.bos_id, base.eos_id) == (reference.bos_token_id, reference.eos_token_id)


def test_a_model_file_alone_reads_the_same(bases, tmp_path):
    base = bases["sentencepiece"]
    shutil.copy(base.folder / "tokenizer.model", tmp_path)
    alone = read_tokenizer(tmp_path)
    assert alone.fingerprint == base.fingerprint
    assert (alone.bos_id, alone.eos_id, alone.adds_bos) == (1, 2, True)
    assert encode_texts(alone, ODD_TEXTS) == encode_texts(base, ODD_TEXTS)
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert not read_tokenizer(tmp_path).adds_bos


def test_merges_as_strings_and_as_pairs_are_the_same_tokenizer(base, tmp_path):
    copy_tokenizer(base.folder, tmp_path)

    def write_strings(content):
        assert isinstance(content["model"]["merges"][0], list)
        content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]

    edit_json(tmp_path / "tokenizer.json", write_strings)
    assert read_tokenizer(tmp_path).fingerprint == base.fingerprint


def test_fingerprint_tells_merges_apart(base, tmp_path):
    copy_tokenizer(base.folder, tmp_path)
    edit_json(tmp_path / "tokenizer.json", lambda content: content["model"]["merges"].pop())
    assert read_tokenizer(tmp_path).fingerprint != base.fingerprint


def test_truncation_and_padding_are_switched_off(base, tmp_path):
    copy_tokenizer(base.folder, tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    texts = ["in the inter", "a"]
    assert encode_texts(read_tokenizer(tmp_path), texts) == encode_texts(base, texts)


def save(tokenizer, folder):
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0), "Unigram tokenizer without byte fallback is not"),
        (models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"), "WordPiece tokenizer is not supported"),
        (models.WordLevel({"a": 0}, unk_token="a"), "WordLevel tokenizer is not supported"),
        (models.BPE({"a": 0}, []), "neither a byte-level pre-tokenizer nor byte fallback"),
        (models.BPE({"a": 0}, [], end_of_word_suffix="</w>"), "BPE with end_of_word_suffix '</w>'"),
        (models.BPE({"a": 0}, [], dropout=0.5), "BPE with dropout 0.5"),
    ],
)
def test_other_families_are_refused_by_name(tmp_path, model, found):
    with pytest.raises(DataError, match=found):
        read_tokenizer(save(Tokenizer(model), tmp_path))


def write_unigram(folder, *scores):
    pieces = [("<unk>", 0.0), *((to_byte_piece(byte), -99.0) for byte in range(256)), *scores]
    tokenizer = Tokenizer(models.Unigram(pieces, 0, byte_fallback=True))
    tokenizer.add_special_tokens([AddedToken("<s>", special=True, normalized=False)])
    folder.mkdir()
    return read_tokenizer(save(tokenizer, folder))


def test_a_unigram_with_bytes_is_read_as_sentencepiece(tmp_path):
    tokenizer = write_unigram(tmp_path / "a", ("a", -3.0), ("b", -3.0), ("▁ab", -4.0))
    assert (tokenizer.kind, tokenizer.algorithm, tokenizer.vocab_size) == ("sentencepiece", "Unigram", 261)
    spelled = piece_bytes(tokenizer)
    assert [spelled[index] for index in encode_texts(tokenizer, ["ba▁abé"])[0]] == [
        b"b",
        b"a",
        b" ab",
        b"\xc3",
        b"\xa9",
    ]
    assert strip_tokenizer(tokenizer).encode("▁ab").ids == [259]


def test_fingerprint_tells_scores_of_a_unigram_apart(tmp_path):
    scores = ("a", -3.0), ("b", -3.0)
    first = write_unigram(tmp_path / "a", *scores).fingerprint
    assert write_unigram(tmp_path / "b", *scores).fingerprint == first
    assert write_unigram(tmp_path / "c", ("a", -3.0), ("b", -3.5)).fingerprint != first


def test_a_unigram_is_no_base_and_no_donor_of_pieces(bases, tmp_path):
    unigram = write_unigram(tmp_path / "a", ("a", -3.0))
    require_bpe(bases["sentencepiece"])
    for method in (require_bpe, check_base):
        with pytest.raises(DataError, match="a SentencePiece Unigram has no merges to build on"):
            method(unigram)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    (tmp_path / "vocab.txt").touch()
    with pytest.raises(DataError, match=r"holds no tokenizer.json and no tokenizer.model \(vocab.txt\)"):
        read_tokenizer(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        read_tokenizer(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"holds no tokenizer\.json"):
        copy_tokenizer(tmp_path, tmp_path / "to")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no valid JSON"),
        ("[]", "no 'model' in it"),
        ('{"model": {"type": "BPE", "byte_fallback": true, "vocab": 3}}', "the tokenizers library refuses it"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, content, message):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=message):
        read_tokenizer(tmp_path)


def test_an_id_for_two_pieces_is_refused(base, tmp_path):
    copy_tokenizer(base.folder, tmp_path)
    edit_json(tmp_path / "tokenizer.json", lambda content: content["model"]["vocab"].update(twice=300))
    with pytest.raises(DataError, match="1 ids stand for several pieces"):
        read_tokenizer(tmp_path)


def test_a_special_token_without_an_id_is_refused(base, tmp_path):
    copy_tokenizer(base.folder, tmp_path)
    edit_json(tmp_path / "tokenizer_config.json", lambda content: content.update(eos_token={"content": "<none>"}))
    with pytest.raises(DataError, match="eos_token '<none>' is not in the vocabulary"):
        read_tokenizer(tmp_path)


def test_copy_takes_every_tokenizer_file_and_nothing_else(base, tmp_path):
    source = tmp_path / "source"
    copy_tokenizer(base.folder, source)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>"}))
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("x")
    (source / "model.safetensors").write_text("weights")
    copied = copy_tokenizer(source, tmp_path / "target")
    names = {str(path.relative_to(tmp_path / "target")) for path in copied}
    assert {"chat_template.jinja", "special_tokens_map.json", "additional_chat_templates/tools.jinja"} < names
    assert "model.safetensors" not in names
    for path in copied:
        assert path.read_bytes() == (source / path.relative_to(tmp_path / "target")).read_bytes()
