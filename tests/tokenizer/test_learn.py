import pytest
import sentencepiece
from transformers import AutoTokenizer

from megatron_adapt.errors import DataError
from megatron_adapt.tokenizer.learn import learn_base_tokenizer
from megatron_adapt.tokenizer.pieces import read_tokenizer
from tests.tokenizer.bases import ODD_TEXTS, make_texts


def test_a_learned_base_has_the_size_and_the_kind_asked_for(bases):
    for kind, base in bases.items():
        assert (base.kind, base.vocab_size) == (kind, 420)
        assert (
            base.tokenizer.encode("the").tokens[0] == {"byte_level": "<|begin_of_text|>", "sentencepiece": "<s>"}[kind]
        )


@pytest.mark.parametrize("model_type", [None, "llama"])
def test_transformers_loads_a_learned_base_and_loses_no_text(base, tmp_path, model_type):
    folder = base.folder
    if model_type:
        folder = tmp_path
        for path in base.folder.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        (folder / "config.json").write_text('{"model_type": "llama"}')
    loaded = AutoTokenizer.from_pretrained(folder)
    for text in [*ODD_TEXTS, *make_texts("ja", 3)]:
        ids = loaded(text)["input_ids"]
        assert ids == base.tokenizer.encode(text).ids
        expected = text.replace("▁", " ") if base.kind == "sentencepiece" else text
        assert loaded.decode(ids, skip_special_tokens=True) == expected


def test_both_sentencepiece_files_give_the_same_ids(bases):
    base = bases["sentencepiece"]
    model = sentencepiece.SentencePieceProcessor(model_file=str(base.folder / "tokenizer.model"))
    for text in [*ODD_TEXTS, *make_texts("en", 50, seed=1), *make_texts("ru", 5)]:
        assert base.tokenizer.encode(text, add_special_tokens=False).ids == model.encode(text)


def test_learning_twice_gives_the_same_tokenizer(base, tmp_path):
    learn_base_tokenizer(make_texts("en", 400), 420, base.kind, tmp_path)
    assert read_tokenizer(tmp_path).fingerprint == base.fingerprint


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_too_little_text_is_refused_with_the_number(tmp_path, kind):
    with pytest.raises(DataError, match="no text to learn a tokenizer from"):
        learn_base_tokenizer(["", " \n"], 300, kind, tmp_path)
    with pytest.raises(DataError, match="vocab_size: 5000 pieces cannot be learned from this text"):
        learn_base_tokenizer(["hello hello"], 5000, kind, tmp_path)
