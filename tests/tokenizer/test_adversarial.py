"""Damaged and unusual input: a clear error and no output, or every guarantee; never a silent wrong result."""

import json
import shutil

import pytest
from tokenizers import AddedToken, Tokenizer, models

from megatron_adapt.config import BuildTokenizer, TokenizerSettings
from megatron_adapt.errors import ConfigError, DataError
from megatron_adapt.tokenizer.build import build_tokenizer
from megatron_adapt.tokenizer.pieces import read_tokenizer, to_letters
from tests.tokenizer.bases import KINDS, edit_json
from tests.tokenizer.guarantees import (
    PROBES,
    RU,
    added_token,
    encode,
    encode_by_transformers,
    extend,
    read_record,
    refuse,
    require_guarantees,
)

GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


# tokenizer.json: what is written, and why it is refused


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[: len(data) // 2], "tokenizer.json: no valid JSON"),
        (lambda data: b"", "tokenizer.json: no valid JSON"),
        (lambda data: b"not JSON", "tokenizer.json: no valid JSON"),
        (lambda data: data.replace(b"merges", b"mer\xffges"), "tokenizer.json: no valid JSON"),
        (lambda data: b"\xef\xbb\xbf" + data, "tokenizer.json: no valid JSON .*BOM"),
        (lambda data: b"null", "no 'model' in it"),
        (lambda data: b'{"model": []}', "no 'model' in it"),
    ],
)
def test_a_damaged_json_file_is_refused(copy, tmp_path, kind, damage, message):
    path = copy(kind) / "tokenizer.json"
    path.write_bytes(damage(path.read_bytes()))
    refuse(path.parent, tmp_path, message)


REFUSED = "the tokenizers library refuses it"
WRONG_CONTENT = {
    "vocabulary is a list": (lambda c: c["model"].update(vocab=[]), REFUSED),
    "no vocabulary": (lambda c: c["model"].pop("vocab"), REFUSED),
    "id is a text": (lambda c: c["model"]["vocab"].update(qq="1"), REFUSED),
    "id is a fraction": (lambda c: c["model"]["vocab"].update(qq=1.5), REFUSED),
    "id is negative": (lambda c: c["model"]["vocab"].update(qq=-1), REFUSED),
    "id of two pieces": (lambda c: c["model"]["vocab"].update(qq=300), "1 ids stand for several pieces"),
    "id is huge": (lambda c: c["model"]["vocab"].update(qq=4_000_000_000), "id 4000000000 in a vocabulary of 421"),
    "id is beyond 32 bits": (lambda c: c["model"]["vocab"].update(qq=1 << 33), "id 8589934592 in a vocabulary of 421"),
    "no merges": (lambda c: c["model"].pop("merges"), REFUSED),
    "merges are null": (lambda c: c["model"].update(merges=None), REFUSED),
    "merge of an unknown piece": (lambda c: c["model"]["merges"].append(["zzz", "qqq"]), REFUSED),
    "merge to an unknown piece": (lambda c: c["model"]["merges"].append(["the", "the"]), REFUSED),
    "merge of three": (lambda c: c["model"]["merges"].append(["t", "h", "e"]), REFUSED),
    "merge of three as a text": (lambda c: c["model"].update(merges=["t h e"]), REFUSED),
    "merge of one as a text": (lambda c: c["model"].update(merges=["the"]), REFUSED),
    "merges of both kinds": (lambda c: c["model"]["merges"].append("t h"), REFUSED),
    "added tokens are null": (lambda c: c.update(added_tokens=None), REFUSED),
    "added token without an id": (lambda c: c["added_tokens"][0].pop("id"), REFUSED),
    "added token under another id": (lambda c: c["added_tokens"][0].update(id=7), "has id 0 in the vocabulary, here 7"),
    "added token far behind": (
        lambda c: c["added_tokens"].append(added_token("<pad>", 430)),
        "'<pad>' has id 420 in the vocabulary, here 430",
    ),
    "added token with the text of a piece under another id": (
        lambda c: c["added_tokens"].append(added_token("in", 450)),
        r"'in' has id \d+ in the vocabulary, here 450",
    ),
    "empty added token": (lambda c: c["added_tokens"].append(added_token("", 420)), "'' has no id in the vocabulary"),
    "unknown normaliser": (lambda c: c.update(normalizer={"type": "None"}), REFUSED),
    "unknown decoder": (lambda c: c.update(decoder={"type": "None"}), REFUSED),
    "dropout": (lambda c: c["model"].update(dropout=0.1), "a BPE with dropout 0.1 is not supported"),
    "post-processor of a token that is not there": (
        lambda c: c.update(
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<z>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [],
                "special_tokens": {"<z>": {"id": "<z>", "ids": [425], "tokens": ["<z>"]}},
            }
        ),
        "the post_processor gives '<z>' the id 425, the vocabulary None",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", WRONG_CONTENT)
def test_wrong_content_of_the_json_file_is_refused(copy, tmp_path, kind, name):
    folder = copy(kind)
    edit, message = WRONG_CONTENT[name]
    edit_json(folder / "tokenizer.json", edit)
    refuse(folder, tmp_path, message)


def test_missing_bytes_are_refused(copy, tmp_path):
    folder = copy("sentencepiece", "tokenizer.model")
    edit_json(folder / "tokenizer.json", lambda c: c["model"]["vocab"].pop("<0xD0>"))
    refuse(folder, tmp_path, "1 of the 256 bytes have no piece")
    folder = copy("byte_level")
    edit_json(folder / "tokenizer.json", lambda c: c["model"]["vocab"].pop(to_letters(b"\xd0")))
    (folder / "tokenizer.model").unlink(missing_ok=True)
    refuse(folder, tmp_path, "1 of the 256 bytes have no piece")


# tokenizer.json: unusual and right


def as_strings(content):
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]


def put_tokens_in_the_middle(content):
    vocab = content["model"]["vocab"]
    for piece in [piece for piece, index in vocab.items() if index >= 410]:
        vocab[piece] += 3
    tokens = [
        added_token("<|middle|>", 410, special=True),
        added_token("[tool]", 411),
        added_token("<|right|>", 412, special=True, rstrip=True),
    ]
    content["added_tokens"] += tokens
    vocab.update({token["content"]: token["id"] for token in tokens})


def leave_holes(content):
    content["model"]["vocab"].update({"qq": 430, "<pad>": 440})
    content["added_tokens"].append(added_token("<pad>", 440, special=True))


def name_a_piece(content):
    content["added_tokens"].append(added_token("in", content["model"]["vocab"]["in"]))


def prefer_whole_words(content):
    content["model"]["ignore_merges"] = True
    content["model"]["vocab"]["zqzq"] = 420


UNUSUAL = {
    "merges as strings": as_strings,
    "no key added_tokens": lambda c: c.pop("added_tokens"),
    "added tokens in the middle": put_tokens_in_the_middle,
    "ids without a piece": leave_holes,
    "added token that is a piece": name_a_piece,
    "whole words": prefer_whole_words,
    "piece with a space": lambda c: c["model"]["vocab"].update({"a b": 420}),
    "empty piece": lambda c: c["model"]["vocab"].update({"": 420}),
    "piece that no merge makes": lambda c: c["model"]["vocab"].update({"zqzq": 420}),
    "merge that occurs twice": lambda c: c["model"]["merges"].append(c["model"]["merges"][0]),
    "no type": lambda c: c["model"].pop("type"),
    "no unk": lambda c: c["model"].update(unk_token=None),
    "unk that is not there": lambda c: c["model"].update(unk_token="<none>"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", UNUSUAL)
def test_an_unusual_json_file_is_extended_right(copy, tmp_path, kind, name):
    folder = copy(kind, *(["tokenizer.model"] if kind == "sentencepiece" else []))
    edit_json(folder / "tokenizer.json", UNUSUAL[name])
    base, made = read_tokenizer(folder), extend(folder, tmp_path / "out", RU, ("Cyrillic",))
    assert made.vocab_size == base.vocab_size + 40
    require_guarantees(base, made, PROBES, ("Cyrillic",))
    if name != "no key added_tokens":  # transformers 5 does not read such a file
        assert encode_by_transformers(made, PROBES) == encode(made, PROBES)


def test_tokens_in_the_middle_keep_ids_and_properties(copy, tmp_path):
    for kind in KINDS:
        folder = copy(kind, *(["tokenizer.model"] if kind == "sentencepiece" else []))
        edit_json(folder / "tokenizer.json", put_tokens_in_the_middle)
        texts = ["the<|middle|>in", "the [tool] кот", "<|right|>  кот", "<|mid dle|>"]
        base, made = read_tokenizer(folder), extend(folder, tmp_path / f"out-{kind}", RU, ("Cyrillic",))
        for text, index in zip(texts, (410, 411, 412), strict=False):
            assert encode(made, [text])[0].count(index) == 1
        assert encode(made, texts[:1] + texts[3:]) == encode(base, texts[:1] + texts[3:])
        shutil.rmtree(folder)


def test_merges_of_pieces_with_spaces_are_pairs(copy, tmp_path):
    def edit(content):
        content["model"]["vocab"].update({" ": 420, " b": 421, "a b": 422})
        content["model"]["merges"] += [[" ", "b"], ["a", " b"]]

    folder = copy("sentencepiece", "tokenizer.model")
    edit_json(folder / "tokenizer.json", edit)
    made = extend(folder, tmp_path / "out", RU, ("Cyrillic",))
    written = json.loads((made.folder / "tokenizer.json").read_text())["model"]["merges"]
    assert [" ", "b"] in written
    assert ["a", " b"] in written
    require_guarantees(read_tokenizer(folder), made, PROBES, ("Cyrillic",))


@pytest.mark.parametrize(
    "changes",
    [
        {"pre_tokenizer": GPT2},
        {"pre_tokenizer": GPT2 | {"add_prefix_space": True}},
        {"normalizer": {"type": "NFC"}},
        {"normalizer": {"type": "NFKC"}, "pre_tokenizer": GPT2},
        {"post_processor": GPT2},
    ],
    ids=["gpt2", "space in front", "NFC", "NFKC", "byte-level post-processor"],
)
def test_byte_level_variants_are_extended_right(copy, tmp_path, changes):
    folder = copy("byte_level")
    edit_json(folder / "tokenizer.json", lambda content: content.update(changes))
    base, texts = read_tokenizer(folder), [*RU, "ｶﾀ か\u3099 й и\u0306"]
    made = extend(folder, tmp_path / "out", texts)
    before, after = encode(base, PROBES), encode(made, PROBES)
    decoded = [made.tokenizer.decode(ids) for ids in after]
    assert decoded == [base.tokenizer.decode(ids) for ids in before]
    assert base.tokenizer.get_vocab().items() <= made.tokenizer.get_vocab().items()
    assert sum(map(len, after)) < sum(map(len, before))
    assert encode_by_transformers(made, PROBES) == after


def test_pieces_that_cannot_come_out_of_text_are_not_made(copy, tmp_path):
    # An added token is cut out of text before merges are asked, and so is what the pre-tokenizer cuts.
    for kind in KINDS:
        folder = copy(kind, *(["tokenizer.model"] if kind == "sentencepiece" else []))

        def edit(content):
            tokens = [added_token("本語", 420), added_token("ра", 421, single_word=True)]
            content["added_tokens"] += tokens
            content["model"]["vocab"].update({token["content"]: token["id"] for token in tokens})

        edit_json(folder / "tokenizer.json", edit)
        made = extend(folder, tmp_path / f"out-{kind}", ["日本語 本語日 край й"] * 5)
        assert read_record(made)["candidates"]["cut by an added token"] > 0
        require_guarantees(read_tokenizer(folder), made, [*PROBES, "日本語 本語日 край"])
        shutil.rmtree(folder)
    folder = copy("sentencepiece", "tokenizer.model")
    split = {"type": "Split", "pattern": {"Regex": r"\p{Han}"}, "behavior": "Isolated", "invert": False}
    edit_json(folder / "tokenizer.json", lambda content: content.update(pre_tokenizer=split))
    made = extend(folder, tmp_path / "out", ["日本語 語日 край"] * 5)
    assert read_record(made)["candidates"]["cut by the pre-tokenizer"] > 0
    require_guarantees(read_tokenizer(folder), made, [*PROBES, "日本語 本語日 край"])


# other families and folders


OTHERS = {
    "Unigram": (models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0), "Unigram tokenizer without byte fallback is not"),
    "Unigram with bytes": (
        models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0, byte_fallback=True),
        "Unigram has no merges to build on",
    ),
    "WordPiece": (models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"), "a WordPiece tokenizer is not supported"),
    "WordLevel": (models.WordLevel({"a": 0}, unk_token="a"), "a WordLevel tokenizer is not supported"),
    "BPE without bytes": (models.BPE({"a": 0}, []), "a BPE with neither a byte-level pre-tokenizer nor byte fallback"),
    "BPE of CLIP": (models.BPE({"a": 0}, [], end_of_word_suffix="</w>"), "a BPE with end_of_word_suffix '</w>'"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_are_refused_by_name(tmp_path, name):
    folder = tmp_path / "base"
    folder.mkdir()
    model, message = OTHERS[name]
    Tokenizer(model).save(str(folder / "tokenizer.json"))
    refuse(folder, tmp_path, message)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"holds no tokenizer.json and no tokenizer.model \(\)"),
        ({"tekken.json": "{}"}, r"holds no tokenizer.json and no tokenizer.model \(tekken.json\)"),
        ({"vocab.json": "{}", "merges.txt": ""}, r"\(merges.txt, vocab.json\); name a tokenizer folder"),
        ({"tokenizer.model": "IQ== 0\nIg== 1\n"}, "tokenizer.model: no SentencePiece model"),  # as Llama 3 ships
        ({"tokenizer.model": ""}, "tokenizer.model: no SentencePiece model"),
    ],
)
def test_a_folder_without_a_known_file_is_refused_with_what_is_there(tmp_path, files, message):
    folder = tmp_path / "base"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(content)
    refuse(folder, tmp_path, message)


def test_no_folder_and_a_file_for_a_folder_are_refused(bases, tmp_path):
    refuse(tmp_path / "none", tmp_path, "no such folder")
    refuse(bases["byte_level"].folder / "tokenizer.json", tmp_path, "no such folder")


def test_a_tiktoken_file_beside_a_byte_level_json_is_left_behind(copy, tmp_path):
    folder = copy("byte_level")
    (folder / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    made = extend(folder, tmp_path / "out", RU, ("Cyrillic",))
    assert not (made.folder / "tokenizer.model").exists()
    require_guarantees(read_tokenizer(folder), made, PROBES, ("Cyrillic",))


# corpora


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "--corpus: 0 documents hold no new piece in Cyrillic"),
        (b"\n\n  \n", "--corpus: 0 documents hold no new piece"),
        (b'{"text": ""}\n', r"--corpus: 1 documents hold no new piece in Cyrillic 2 times \(no such text\)"),
        (b'{"text": "   \\n\\n"}\n', "--corpus: 1 documents hold no new piece"),
        (b'{"text": "the inter"}\n' * 9, r"--corpus: 9 documents hold no new piece in Cyrillic .*\(no such text\)"),
        (b'{"txt": "a"}\n', r"jsonl:1: no key 'text' \(keys: txt\)"),
        (b'{"text": "a"}\n{"text": 5}\n', "jsonl:2: 'text' is int, not a string"),
        (b'{"text": null}\n', "jsonl:1: 'text' is NoneType, not a string"),
        (b'{"text": ["a"]}\n', "jsonl:1: 'text' is list, not a string"),
        (b'["text"]\n', "jsonl:1: a JSON list, not an object"),
        (b'{"text": "a"\n', "jsonl:1: no valid JSON"),
        (b'{"text": "\xff"}\n', "jsonl:1: no valid JSON"),
        (b'{"text": "\\ud800"}\n', "jsonl:1: no valid JSON .*surrogate"),
        (b'{"text": "\xed\xa0\x80"}\n', "jsonl:1: no valid JSON"),
        (b'\xef\xbb\xbf{"text": "a"}\n', "jsonl:1: no valid JSON"),
    ],
)
def test_a_corpus_that_gives_nothing_is_refused_with_its_place(bases, tmp_path, kind, content, message):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_bytes(content)
    made = TokenizerSettings(size="40", scripts=("Cyrillic",))
    with pytest.raises(DataError, match=message) as caught:
        build_tokenizer(
            BuildTokenizer(base=bases[kind].folder, corpus=(corpus,), output=tmp_path / "out", settings=made)
        )
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


def test_a_pair_of_surrogates_is_one_character(bases, tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_bytes(b'{"text": "\\ud83d\\ude00\\ud83d\\ude00 "}\n' * 4)
    for kind in KINDS:
        output = tmp_path / kind
        build_tokenizer(BuildTokenizer(base=bases[kind].folder, corpus=(corpus,), output=output))
        made = read_tokenizer(output)
        require_guarantees(bases[kind], made, ["😀😀", "😀 😀😀😀"])
        assert len(encode(made, ["😀😀"])[0]) < len(encode(bases[kind], ["😀😀"])[0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_may_not_hold_what_is_read(bases, tmp_path, kind):
    (tmp_path / "made").mkdir()
    first = extend(bases[kind].folder, tmp_path / "made" / "first", RU, ("Cyrillic",))
    before = {path: path.read_bytes() for path in first.folder.iterdir()}
    for output in (first.folder, tmp_path / "made"):
        config = BuildTokenizer(
            base=first.folder, corpus=(tmp_path / "made" / "first.jsonl",), output=output, overwrite=True
        )
        with pytest.raises(ConfigError, match=r"--output: .* holds .*, which is read; name another output"):
            build_tokenizer(config)
    assert {path: path.read_bytes() for path in first.folder.iterdir()} == before


def test_added_tokens_of_the_library_are_those_of_the_file(copy, tmp_path):
    folder = copy("byte_level")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken("кот", normalized=False), AddedToken("  ", normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    base, made = read_tokenizer(folder), extend(folder, tmp_path / "out", ["кот  котик  кот"] * 9)
    require_guarantees(base, made, [*PROBES, "кот  котик  кот"])
    assert encode(made, ["кот"]) == encode(base, ["кот"])
