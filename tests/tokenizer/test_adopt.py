import json
import logging

import pytest
import sentencepiece
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer

from megatron_adapt.config import BuildTokenizer, TokenizerSettings
from megatron_adapt.errors import DataError
from megatron_adapt.tokenizer.build import build_tokenizer
from megatron_adapt.tokenizer.id_map import read_id_map
from megatron_adapt.tokenizer.learn import learn_base_tokenizer
from megatron_adapt.tokenizer.pieces import copy_tokenizer, encode_texts, piece_bytes, read_tokenizer
from tests.tokenizer.bases import KINDS, MIXED, edit_json, make_texts, write_corpus

TEMPLATE = "{{ bos_token }}{% for m in messages %}<|turn|>{{ m.content }}{% endfor %}"


def adopt(base_folder, donor_folder, output, texts=None):
    corpus = write_corpus(output.parent / f"{output.name}.jsonl", make_texts("ru", 50) if texts is None else texts)
    made = TokenizerSettings(method="transplant", donor=donor_folder, adopt=True)
    build_tokenizer(BuildTokenizer(base=base_folder, corpus=(corpus,), output=output, settings=made))
    return read_tokenizer(output)


@pytest.fixture(scope="module")
def donors(tmp_path_factory):
    """A tokenizer of each family, learned from English and Russian."""
    root = tmp_path_factory.mktemp("donors")
    for kind in KINDS:
        learn_base_tokenizer([*make_texts("ru", 200), *make_texts("en", 200)], 600, kind, root / kind)
    return {kind: read_tokenizer(root / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def adopted(bases, donors, tmp_path_factory):
    """Every donor in the place of every base."""
    root = tmp_path_factory.mktemp("adopted")
    return {
        (kind, donor): adopt(bases[kind].folder, donors[donor].folder, root / f"{kind}-{donor}")
        for kind in KINDS
        for donor in KINDS
    }


def test_text_gets_the_ids_of_the_donor_by_every_reader(donors, adopted):
    for (_, donor), made in adopted.items():
        ids = [made.tokenizer.encode(text, add_special_tokens=False).ids for text in MIXED]
        assert ids == [donors[donor].tokenizer.encode(text, add_special_tokens=False).ids for text in MIXED]
        loaded = AutoTokenizer.from_pretrained(made.folder)
        assert [loaded(text)["input_ids"] for text in MIXED] == encode_texts(made, MIXED)
        if donor == "sentencepiece":
            model = sentencepiece.SentencePieceProcessor(model_file=str(made.folder / "tokenizer.model"))
            assert model.encode(MIXED) == ids
            assert model.get_piece_size() == made.vocab_size


def test_special_tokens_of_the_base_keep_their_roles_behind_the_donors_ids(bases, donors, adopted):
    for (kind, donor), made in adopted.items():
        base, old = bases[kind], donors[donor]
        special = [token.content for token in base.tokenizer.get_added_tokens_decoder().values()]
        assert made.vocab_size == old.vocab_size + (0 if kind == donor else len(special))
        decoder = made.tokenizer.get_added_tokens_decoder()
        assert all(decoder[made.tokenizer.token_to_id(text)].special for text in special)
        for name in ("bos_id", "eos_id"):
            named = base.tokenizer.id_to_token(getattr(base, name))
            assert made.tokenizer.id_to_token(getattr(made, name)) == named
        assert made.adds_bos
        assert made.tokenizer.encode("the").ids[0] == made.bos_id
        loaded = AutoTokenizer.from_pretrained(made.folder)
        assert (loaded.bos_token_id, loaded.eos_token_id) == (made.bos_id, made.eos_id)


def test_ids_are_mapped_by_the_bytes_they_stand_for(bases, adopted):
    for (kind, _), made in adopted.items():
        base, id_map = bases[kind], read_id_map(made)
        old, new = piece_bytes(base), piece_bytes(made)
        kept = {index: id_map.old_id(index) for index in range(made.vocab_size) if id_map.old_id(index) is not None}
        assert len(kept) > 256
        for index, old_id in kept.items():
            assert new[index] == old[old_id]
            if not new[index]:
                assert made.tokenizer.id_to_token(index) == base.tokenizer.id_to_token(old_id)
        assert id_map.old_id(made.bos_id) == base.bos_id
        assert not {new[index] for index in id_map.pieces if new[index]} & set(old)
        for index, olds in id_map.pieces.items():
            assert b"".join(old[part] for part in olds) == new[index]


def make_chat_base(bases, folder, *, special):
    """A base with a chat token, special or not, and a template that names it."""
    copy_tokenizer(bases["byte_level"].folder, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([AddedToken("<|turn|>", normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def test_the_chat_template_of_the_base_stays_where_its_tokens_do(bases, donors, tmp_path, caplog):
    donor = tmp_path / "donor"
    copy_tokenizer(donors["sentencepiece"].folder, donor)
    edit_json(donor / "tokenizer_config.json", lambda content: content.update(chat_template="donor"))
    with caplog.at_level(logging.INFO):
        made = adopt(make_chat_base(bases, tmp_path / "base", special=True), donor, tmp_path / "out")
    loaded = AutoTokenizer.from_pretrained(made.folder)
    assert loaded.chat_template == TEMPLATE
    ids = loaded.apply_chat_template([{"role": "user", "content": "the"}], return_dict=False)
    assert ids[:2] == [made.bos_id, made.tokenizer.token_to_id("<|turn|>")]
    assert "chat template: the base's" in caplog.text
    assert read_id_map(made).old_id(ids[1]) == 420


def test_a_chat_template_that_names_a_lost_token_gives_way_to_the_donors(bases, donors, tmp_path, caplog):
    donor = tmp_path / "donor"
    copy_tokenizer(donors["byte_level"].folder, donor)
    (donor / "chat_template.jinja").write_text("donor")
    with caplog.at_level(logging.INFO):
        made = adopt(make_chat_base(bases, tmp_path / "base", special=False), donor, tmp_path / "out")
    assert (made.folder / "chat_template.jinja").read_text() == "donor"
    assert "chat template: the donor's; the base's names tokens that it lacks: <|turn|>" in caplog.text


def test_a_piece_of_the_donor_becomes_special_where_the_base_has_it_so(bases, donors, tmp_path):
    base = tmp_path / "base"
    copy_tokenizer(bases["byte_level"].folder, base)
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("in", normalized=False)])
    tokenizer.save(str(base / "tokenizer.json"))
    made = adopt(base, donors["byte_level"].folder, tmp_path / "out")
    index = donors["byte_level"].tokenizer.token_to_id("in")
    assert made.vocab_size == donors["byte_level"].vocab_size
    assert made.tokenizer.get_added_tokens_decoder()[index].special


def test_files_that_restate_the_tokens_follow(bases, donors, tmp_path):
    donor = tmp_path / "donor"
    copy_tokenizer(donors["sentencepiece"].folder, donor)
    (donor / "special_tokens_map.json").write_text('{"bos_token": "<s>"}')
    (donor / "added_tokens.json").write_text('{"<s>": 1}')
    token = {"content": "<s>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    listed = {"1": {**token, "special": True}}
    edit_json(donor / "tokenizer_config.json", lambda content: content.update(added_tokens_decoder=listed))
    made = adopt(bases["byte_level"].folder, donor, tmp_path / "out")
    written = json.loads((made.folder / "tokenizer_config.json").read_text())
    assert written["bos_token"] == "<|begin_of_text|>"
    assert {index: token["content"] for index, token in written["added_tokens_decoder"].items()} == {
        "1": "<s>",
        "600": "<|begin_of_text|>",
        "601": "<|end_of_text|>",
    }
    assert not {"special_tokens_map.json", "added_tokens.json"} & {path.name for path in made.folder.iterdir()}
    assert AutoTokenizer.from_pretrained(made.folder)("the")["input_ids"] == made.tokenizer.encode("the").ids


def test_a_base_of_a_model_file_alone_keeps_its_tokens(bases, donors, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "tokenizer.model").write_bytes((bases["sentencepiece"].folder / "tokenizer.model").read_bytes())
    made = adopt(base, donors["byte_level"].folder, tmp_path / "out")
    assert [made.tokenizer.id_to_token(index) for index in (made.bos_id, made.eos_id)] == ["<s>", "</s>"]
    assert made.tokenizer.encode("the").tokens[0] == "<s>"


def test_a_donor_that_changes_text_is_refused(bases, donors, tmp_path):
    donor = tmp_path / "donor"
    copy_tokenizer(donors["byte_level"].folder, donor)
    edit_json(donor / "tokenizer.json", lambda content: content.update(normalizer={"type": "Lowercase"}))
    with pytest.raises(
        DataError, match=r"--donor: .* gives 'The cat' back as 'the cat'; a tokenizer that changes text"
    ):
        adopt(bases["byte_level"].folder, donor, tmp_path / "out", ["one", "The cat"])
    assert not (tmp_path / "out").exists()


def test_a_donor_whose_files_contradict_one_another_is_refused(bases, donors, tmp_path):
    donor = tmp_path / "donor"
    copy_tokenizer(donors["byte_level"].folder, donor)
    edit_json(donor / "tokenizer_config.json", lambda content: content.update(pad_token="<|pad|>"))
    with pytest.raises(DataError, match=r"token '<\|pad\|>' has no id in the vocabulary"):
        adopt(bases["byte_level"].folder, donor, tmp_path / "out")
