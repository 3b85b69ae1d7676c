"""What every extension must keep, checked from outside by the three readers of its files."""

import json
from pathlib import Path

import pytest
import regex
import sentencepiece
from transformers import AutoTokenizer

from megatron_adapt.config import BuildTokenizer, TokenizerSettings
from megatron_adapt.errors import ConfigError, DataError
from megatron_adapt.scripts import make_script_class
from megatron_adapt.tokenizer.build import build_tokenizer
from megatron_adapt.tokenizer.pieces import SPACE, LoadedTokenizer, encode_texts, piece_bytes, read_tokenizer
from tests.tokenizer.bases import ODD_TEXTS, SCRIPTS, make_texts, write_corpus

RU = make_texts("ru", 40)
PROBES = [*ODD_TEXTS, *make_texts("en", 10, seed=3), *make_texts("ru", 10, seed=3), *make_texts("ja", 5, seed=3)]


def extend(base_folder: Path, output: Path, texts, scripts=(), size=40, options=None, **settings) -> LoadedTokenizer:
    """Extend a base by method ``continue``; ``options`` are other fields of ``BuildTokenizer``."""
    corpus = write_corpus(output.parent / f"{output.name}.jsonl", texts)
    made = TokenizerSettings(size=str(size), scripts=scripts, **settings)
    build_tokenizer(BuildTokenizer(base=base_folder, corpus=(corpus,), output=output, settings=made, **(options or {})))
    return read_tokenizer(output)


def refuse(folder, tmp_path, message, texts=RU, **options):
    """Require an error of one line, and that nothing is written."""
    output = tmp_path / "refused"
    with pytest.raises((DataError, ConfigError), match=message) as caught:
        extend(folder, output, texts, **options)
    assert "\n" not in str(caught.value)
    assert "this should not happen" not in str(caught.value)
    assert not output.exists()
    assert not list(tmp_path.glob(".*partial"))


def added_token(text, index, **changes):
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": index, "content": text, **flags, **changes}


def encode(tokenizer: LoadedTokenizer, texts) -> list[list[int]]:
    return [item.ids for item in tokenizer.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def encode_by_model(tokenizer: LoadedTokenizer, texts) -> list[list[int]]:
    path = tokenizer.folder / "tokenizer.model"
    return sentencepiece.SentencePieceProcessor(model_file=str(path)).encode(texts)


def encode_by_transformers(tokenizer: LoadedTokenizer, texts) -> list[list[int]]:
    loaded = AutoTokenizer.from_pretrained(tokenizer.folder)
    return [loaded(text, add_special_tokens=False)["input_ids"] for text in texts]


def require_guarantees(base: LoadedTokenizer, made: LoadedTokenizer, texts, scripts=()) -> int:
    """Check the promises of ``continue`` on texts; return on how many the base's two files agree, if it has two."""
    old_vocab, vocab = (tokenizer.tokenizer.get_vocab(with_added_tokens=True) for tokenizer in (base, made))
    assert old_vocab.items() <= vocab.items()
    assert sorted(vocab.values())[len(old_vocab) :] == list(range(base.vocab_size, made.vocab_size))
    assert made.tokenizer.get_added_tokens_decoder() == base.tokenizer.get_added_tokens_decoder()
    require_reachable(base, made)
    before, after = encode(base, texts), encode(made, texts)
    for text, old, new in zip(texts, before, after, strict=True):
        expected = text.replace(SPACE, " ") if base.kind == "sentencepiece" else text
        kept = base.tokenizer.decode(old, skip_special_tokens=False)
        assert made.tokenizer.decode(new, skip_special_tokens=False) == (expected if kept == expected else kept)
    if scripts:
        new_script = regex.compile(f"[{make_script_class(scripts, 'scripts')}]")
        same = [new_script.search(text) is None for text in texts]
        assert [ids for ids, keep in zip(after, same, strict=True) if keep] == [
            ids for ids, keep in zip(before, same, strict=True) if keep
        ]
    if not (made.folder / "tokenizer.model").is_file():
        return 0
    agreed = before
    if (base.folder / "tokenizer.json").is_file():
        agreed = encode_by_model(base, texts)
    by_model = encode_by_model(made, texts)
    compared = [at for at in range(len(texts)) if agreed[at] == before[at]]
    assert [by_model[at] for at in compared] == [after[at] for at in compared]
    return len(compared)


def require_reachable(base: LoadedTokenizer, made: LoadedTokenizer) -> None:
    """Check that every new piece comes out as one token when its text is all there is."""
    surfaces = piece_bytes(made)
    for index in range(base.vocab_size, made.vocab_size):
        try:
            text = surfaces[index].decode()
        except UnicodeDecodeError:
            assert base.kind == "byte_level"
            continue
        # SentencePiece puts a space in front of a text, and nothing behind a line end.
        before = ["\n", "\n" + text] if base.kind == "sentencepiece" else ["", text]
        first, whole = encode(made, before)
        assert whole == [*first, index], (text, whole)


def read_record(made: LoadedTokenizer) -> dict:
    return json.loads((made.folder / "stage.json").read_text())["counts"]


def require_one_language_shorter(base: LoadedTokenizer, extended: LoadedTokenizer, language: str) -> None:
    """Require that texts of a language are cut into fewer pieces, and those of others into the same."""
    for other in (*SCRIPTS, "en"):
        texts = make_texts(other, 30, seed=3)
        before, after = encode_texts(base, texts), encode_texts(extended, texts)
        if other == language:
            assert sum(map(len, after)) < 0.6 * sum(map(len, before))
        else:
            assert after == before
