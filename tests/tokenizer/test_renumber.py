import json
import shutil

import pytest
from tokenizers import AddedToken, Tokenizer

from megatron_adapt.tokenizer.model_proto import read_model
from megatron_adapt.tokenizer.pieces import copy_tokenizer, read_content, read_tokenizer
from megatron_adapt.tokenizer.renumber import list_fixed, write_renumbered
from tests.tokenizer.bases import edit_json

CHAT, TOOL = "<|chat|>", "[tool]"


@pytest.fixture
def crowded(base, tmp_path):
    """A base with added tokens behind its pieces, and files that name ids."""
    folder = tmp_path / "crowded"
    copy_tokenizer(base.folder, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(CHAT, normalized=False, special=True)])
    tokenizer.add_tokens([AddedToken(TOOL, normalized=False, lstrip=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {text: tokenizer.token_to_id(text) for text in (CHAT, TOOL)}
    (folder / "added_tokens.json").write_text(json.dumps(ids))
    listed = {str(index): {"content": text, "special": text == CHAT} for text, index in ids.items()}
    edit_json(folder / "tokenizer_config.json", lambda content: content.update(added_tokens_decoder=listed))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return read_tokenizer(folder)


def rotate(base):
    """The vocabulary of a base with every id moved by three places."""
    model = read_content(base)["model"]
    vocab = base.tokenizer.get_vocab(with_added_tokens=True)
    return {**model, "vocab": {text: (index + 3) % len(vocab) for text, index in vocab.items()}}


def test_every_file_names_the_new_ids(crowded, tmp_path):
    model = rotate(crowded)
    folder = tmp_path / "out"
    folder.mkdir()
    write_renumbered(crowded, model, None, folder)
    made = read_tokenizer(folder)
    assert made.tokenizer.get_vocab(with_added_tokens=True) == model["vocab"]
    for text in (crowded.tokenizer.id_to_token(crowded.bos_id), CHAT, TOOL):
        old = crowded.tokenizer.get_added_tokens_decoder()[crowded.tokenizer.token_to_id(text)]
        assert made.tokenizer.get_added_tokens_decoder()[model["vocab"][text]] == old
    assert made.tokenizer.encode("").ids == [made.bos_id] == [(crowded.bos_id + 3) % crowded.vocab_size]
    ids = {text: model["vocab"][text] for text in (CHAT, TOOL)}
    assert json.loads((folder / "added_tokens.json").read_text()) == ids
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    old = json.loads((crowded.folder / "tokenizer_config.json").read_text())
    listed = {int(index): token["content"] for index, token in settings.pop("added_tokens_decoder").items()}
    assert listed == {index: text for text, index in ids.items()}
    old.pop("added_tokens_decoder")
    assert settings == old
    assert (folder / "chat_template.jinja").read_text() == "{{ messages }}"
    assert not (folder / "tokenizer.model").exists()


def test_text_is_cut_as_before(crowded, tmp_path):
    write_renumbered(crowded, rotate(crowded), None, tmp_path)
    made = read_tokenizer(tmp_path)
    for text in ("the inter 2024", f"a{CHAT}b {TOOL} c", "日 é"):
        old, new = crowded.tokenizer.encode(text), made.tokenizer.encode(text)
        assert new.tokens == old.tokens
        assert new.ids == [(index + 3) % crowded.vocab_size for index in old.ids]


@pytest.mark.parametrize("kind", ["RobertaProcessing", "BertProcessing", "Sequence"])
def test_other_post_processors_are_renumbered_too(bases, tmp_path, kind):
    folder = tmp_path / "base"
    copy_tokenizer(bases["byte_level"].folder, folder)
    bos, eos = (bases["byte_level"].tokenizer.id_to_token(index) for index in (0, 1))
    ends = {"sep": [eos, 1], "cls": [bos, 0]}
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "B", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"B": {"id": "B", "ids": [0, 1], "tokens": [bos, eos]}},
    }
    letters = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    processor = {
        "RobertaProcessing": {"type": kind, **ends, "trim_offsets": True, "add_prefix_space": False},
        "BertProcessing": {"type": kind, **ends},
        "Sequence": {"type": kind, "processors": [letters, template]},
    }[kind]
    edit_json(folder / "tokenizer.json", lambda content: content.update(post_processor=processor))
    base = read_tokenizer(folder)
    out = tmp_path / "out"
    out.mkdir()
    write_renumbered(base, rotate(base), None, out)
    assert read_tokenizer(out).tokenizer.encode("").ids == [3, 4]


def test_fixed_tokens_are_those_with_a_role(crowded):
    special = ["<unk>", "<s>", "</s>"] if crowded.kind == "sentencepiece" else ["<|begin_of_text|>", "<|end_of_text|>"]
    assert list_fixed(crowded) == [*special, CHAT, TOOL]

    def forget(content):
        content["added_tokens"] = content["added_tokens"][-1:]

    # What only the post-processor, the settings or the model name is fixed all the same.
    edit_json(crowded.folder / "tokenizer.json", forget)
    assert list_fixed(read_tokenizer(crowded.folder)) == [*special, TOOL]


def test_a_model_that_stands_alone_comes_out_with_settings(bases, tmp_path):
    folder, out = tmp_path / "base", tmp_path / "out"
    folder.mkdir(), out.mkdir()
    shutil.copy(bases["sentencepiece"].folder / "tokenizer.model", folder)
    base = read_tokenizer(folder)
    model = read_model(folder / "tokenizer.model")
    write_renumbered(base, read_content(base)["model"], model, out)
    assert (out / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()
    assert read_tokenizer(out).fingerprint == base.fingerprint
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert (settings["bos_token"], settings["tokenizer_class"]) == ("<s>", "PreTrainedTokenizerFast")
