"""Ids of the instruct model's tokens in the result, and the files of its tokenizer."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, processors

from megatron_adapt.errors import CheckpointError
from megatron_adapt.tokenizer.id_map import map_ids
from megatron_adapt.tokenizer.pieces import copy_tokenizer, read_tokenizer
from megatron_adapt.vocab.propagate_tokens import plan_vocab, write_vocab
from tests.tokenizer.bases import CHAT, TEMPLATE, TOOL, edit_json, write_chat_base
from tests.vocab.trios import extend, list_pieces


def change(tokenizer, folder, edit):
    """Copy a tokenizer with its library object changed."""
    folder.mkdir(parents=True)
    copy_tokenizer(tokenizer.folder, folder)
    loaded = Tokenizer.from_file(str(folder / "tokenizer.json"))
    edit(loaded)
    loaded.save(str(folder / "tokenizer.json"))
    return read_tokenizer(folder)


def add(*contents, special=True):
    return lambda loaded: loaded.add_tokens([AddedToken(text, special=special, normalized=False) for text in contents])


@pytest.fixture
def chat(own, tmp_path):
    (tmp_path / "chat").mkdir()
    return write_chat_base(own, tmp_path / "chat")


def merge(own, made, chat, folder):
    vocab = plan_vocab(own, made, chat, map_ids(own, made))
    folder.mkdir()
    write_vocab(vocab, made, chat, folder)
    return vocab, read_tokenizer(folder)


def test_tokens_that_the_adapted_tokenizer_lacks_are_appended_in_order(own, chat, tmp_path):
    made = extend(own, tmp_path / "made")
    vocab, found = merge(own, made, chat, tmp_path / "out")
    assert [found.tokenizer.token_to_id(text) for text in (CHAT, TOOL)] == [made.vocab_size, made.vocab_size + 1]
    assert vocab.vocab_size == found.vocab_size == made.vocab_size + 2
    for index in range(made.vocab_size):
        assert found.tokenizer.id_to_token(index) == made.tokenizer.id_to_token(index)
    added = found.tokenizer.get_added_tokens_decoder()
    theirs = chat.tokenizer.get_added_tokens_decoder()
    for new, old in vocab.kept.items():
        for flag in ("content", "special", "normalized", "lstrip", "rstrip", "single_word"):
            assert getattr(added[new], flag) == getattr(theirs[old], flag)


def test_tokens_that_the_adapted_tokenizer_has_stay_where_it_has_them(own, chat, tmp_path):
    wider = change(own, tmp_path / "wider", add(TOOL, "<|other|>"))
    made = extend(wider, tmp_path / "made")
    vocab, found = merge(own, made, chat, tmp_path / "out")
    assert found.tokenizer.token_to_id(TOOL) == wider.tokenizer.token_to_id(TOOL)
    assert found.tokenizer.token_to_id("<|other|>") == wider.tokenizer.token_to_id("<|other|>")
    assert found.tokenizer.token_to_id(CHAT) == made.vocab_size == vocab.vocab_size - 1
    assert vocab.map_to_instruct().old_id(made.vocab_size) == chat.tokenizer.token_to_id(CHAT)


def test_the_map_to_the_instruct_model_names_the_same_tokens(own, chat, tmp_path):
    made = extend(own, tmp_path / "made")
    vocab, found = merge(own, made, chat, tmp_path / "out")
    id_map = vocab.map_to_instruct()
    assert (id_map.base_vocab_size, id_map.vocab_size) == (chat.vocab_size, found.vocab_size)
    names = [id_map.old_id(index) for index in range(found.vocab_size)]
    assert names.count(None) == len(list_pieces(own.kind))
    for index, old in enumerate(names):
        if old is not None:
            assert chat.tokenizer.id_to_token(old) == found.tokenizer.id_to_token(index)


def test_a_token_that_takes_the_place_of_a_reserved_one_elsewhere_known_leaves_that_one_alone(own, tmp_path):
    base = change(own, tmp_path / "base", add("<|a|>", "<|b|>"))
    used = change(own, tmp_path / "used", add("<|b|>", "<|new|>"))  # <|b|> moved down, <|new|> is where it was
    made = extend(base, tmp_path / "made")
    vocab, found = merge(base, made, used, tmp_path / "out")
    size = own.vocab_size
    assert vocab.changed == {size, size + 1}
    assert vocab.renamed == {}
    assert found.tokenizer.token_to_id("<|b|>") == size + 1
    assert found.tokenizer.token_to_id("<|new|>") == made.vocab_size
    id_map = vocab.map_to_instruct()
    assert [id_map.old_id(index) for index in (size, size + 1, made.vocab_size)] == [None, size, size + 1]


def test_template_and_roles_are_the_instruct_models_and_the_class_is_the_adapted_ones(own, chat, tmp_path):
    made = extend(own, tmp_path / "made")
    path = chat.folder / "tokenizer_config.json"
    edit_json(
        path,
        lambda content: content.update(
            pad_token=CHAT, legacy=True, added_tokens_decoder={"9": {"content": "x"}}, tokenizer_class="Wrong"
        ),
    )
    (made.folder / "chat_template.jinja").write_text("another")
    (made.folder / "vocab.json").write_text("{}")
    (chat.folder / "added_tokens.json").write_text("{}")
    _, found = merge(own, made, chat, tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["pad_token"] == CHAT
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "legacy" not in settings
    assert settings["added_tokens_decoder"][str(made.vocab_size)]["content"] == CHAT
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TEMPLATE
    assert not [name for name in ("vocab.json", "added_tokens.json") if (tmp_path / "out" / name).exists()]
    assert (found.bos_id, found.eos_id) == (made.bos_id, made.eos_id)


def test_what_stands_around_a_text_is_the_instruct_models(own, tmp_path):
    def frame(loaded):
        add(CHAT)(loaded)
        index = loaded.token_to_id(CHAT)
        template = processors.TemplateProcessing(single=f"{CHAT} $A", special_tokens=[(CHAT, index)])
        parts = [processors.ByteLevel(trim_offsets=False), template] if own.kind == "byte_level" else [template]
        loaded.post_processor = processors.Sequence(parts)

    chat = change(own, tmp_path / "chat", frame)
    made = extend(own, tmp_path / "made")
    _, found = merge(own, made, chat, tmp_path / "out")
    plain = made.tokenizer.encode("the 日本", add_special_tokens=False).ids
    assert found.tokenizer.encode("the 日本").ids == [made.vocab_size, *plain]


def test_both_files_of_a_sentencepiece_result_agree(bases, tmp_path):
    import sentencepiece

    own = bases["sentencepiece"]
    (tmp_path / "chat").mkdir()
    chat = write_chat_base(own, tmp_path / "chat")
    _, found = merge(own, extend(own, tmp_path / "made"), chat, tmp_path / "out")
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "out" / "tokenizer.model"))
    assert model.get_piece_size() == found.vocab_size
    for text in ("the ker lo", "日本語学 пре во"):
        assert model.encode(text) == found.tokenizer.encode(text, add_special_tokens=False).ids
    assert model.piece_to_id(CHAT) == found.tokenizer.token_to_id(CHAT)


def swap_two(path):
    def edit(content):
        vocab = content["model"]["vocab"]
        low, high = sorted(vocab, key=vocab.get)[-2:]
        vocab[low], vocab[high] = vocab[high], vocab[low]

    edit_json(path / "tokenizer.json", edit)


def test_an_instruct_tokenizer_of_another_base_is_refused_with_the_first_differing_id(own, chat, tmp_path):
    made = extend(own, tmp_path / "made")
    size = own.vocab_size
    low, high = (own.tokenizer.id_to_token(size - at) for at in (2, 1))
    swap_two(chat.folder)
    with pytest.raises(CheckpointError) as caught:
        plan_vocab(own, made, read_tokenizer(chat.folder), map_ids(own, made))
    assert f"chat: id {size - 2} is {high!r}, in the base's tokenizer" in str(caught.value)
    assert f"{low!r}; name an instruct model that has the tokenizer of its base" in str(caught.value)


def test_an_instruct_tokenizer_with_more_pieces_or_fewer_tokens_is_refused(own, tmp_path):
    made = extend(own, tmp_path / "made")
    with pytest.raises(
        CheckpointError, match=rf"made: id {own.vocab_size} is .*, in the base's tokenizer .* None; name"
    ):
        plan_vocab(own, made, made, map_ids(own, made))
    wider = change(own, tmp_path / "wider", add("<|lost|>"))
    with pytest.raises(CheckpointError, match=rf"id {own.vocab_size} is None, in the base's .* '<\|lost\|>'; name"):
        plan_vocab(wider, made, own, map_ids(wider, made))
