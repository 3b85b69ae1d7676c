"""A base whose files contradict one another: refused, or each file goes on as it was and the difference is told."""

import json
import logging
import random
import shutil
import struct
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_adapt.errors import DataError
from megatron_adapt.tokenizer.learn import learn_base_tokenizer
from megatron_adapt.tokenizer.model_proto import (
    CONTROL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Piece,
    append_pieces,
    read_model,
    write_model,
)
from megatron_adapt.tokenizer.pieces import copy_tokenizer, read_tokenizer
from tests.tokenizer.bases import KINDS, edit_json, make_texts
from tests.tokenizer.guarantees import (
    PROBES,
    RU,
    added_token,
    encode,
    encode_by_model,
    extend,
    refuse,
    require_guarantees,
)

# settings files


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config.json", "[]", "tokenizer_config.json: a JSON list, not an object"),
        ("tokenizer_config.json", "{", "tokenizer_config.json: no valid JSON"),
        ("special_tokens_map.json", "[]", "special_tokens_map.json: a JSON list, not an object"),
        ("added_tokens.json", "[]", "added_tokens.json: a JSON list, not an object"),
        ("tokenizer_config.json", '{"eos_token": 5}', "eos_token is 5, not a token"),
        ("tokenizer_config.json", '{"eos_token": {}}', "eos_token is {}, not a token"),
        ("tokenizer_config.json", '{"bos_token": "<none>"}', "bos_token '<none>' is not in the vocabulary"),
    ],
)
def test_damaged_settings_are_refused(copy, tmp_path, kind, file, content, message):
    folder = copy(kind)
    (folder / file).write_text(content)
    refuse(folder, tmp_path, message)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", {"pad_token": "<pad>"}),
        ("tokenizer_config.json", {"pad_token": added_token("<pad>", 0)}),
        ("tokenizer_config.json", {"additional_special_tokens": ["<pad>"]}),
        ("tokenizer_config.json", {"extra_special_tokens": {"image_token": "<pad>"}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"420": added_token("<pad>", 420)}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"7": added_token("in", 7)}}),
        ("special_tokens_map.json", {"pad_token": {"content": "<pad>"}}),
        ("added_tokens.json", {"<pad>": 420}),
    ],
)
def test_a_token_that_only_settings_name_is_refused(copy, tmp_path, kind, file, content):
    # transformers gives such a token the id behind the highest one: after an extension that is another.
    folder = copy(kind)
    (folder / file).write_text(json.dumps(content))
    refuse(
        folder, tmp_path, rf"{file}: token '(<pad>|in)' has (no )?id .*load the tokenizer with transformers, save it"
    )


def test_added_tokens_beside_a_model_alone_are_refused(copy, tmp_path):
    folder = copy("sentencepiece", "tokenizer.json")
    (folder / "added_tokens.json").write_text('{"<pad>": 420}')
    refuse(folder, tmp_path, "'<pad>' has no id in the vocabulary, here 420")


# tokenizer.model


def rewrite(folder, edit):
    """Change a ``tokenizer.model`` and take the JSON away."""
    model = read_model(folder / "tokenizer.model")
    write_model(edit(model), folder / "tokenizer.model")
    (folder / "tokenizer.json").unlink()


def change(index, **changes):
    return lambda model: replace(
        model, pieces=tuple(replace(p, **changes) if at == index else p for at, p in enumerate(model.pieces))
    )


WRONG_MODELS = {
    "piece twice": (lambda m: append_pieces(m, [Piece("in", -1e6)]), "1 pieces occur twice"),
    "empty piece": (lambda m: append_pieces(m, [Piece("", -1e6)]), "SentencePiece refuses it"),
    "no number": (change(300, score=float("nan")), "piece 300 .* score nan; the file is damaged"),
    "endless score": (change(300, score=float("-inf")), "piece 300 .* score -inf; the file is damaged"),
    "score that cannot fall": (change(300, score=-3e38), "piece 300 .* score -3.* the file is damaged"),
    "unknown kind": (change(300, kind=7), "piece 300 .* has kind 7"),
    "unused piece": (change(300, kind=UNUSED), "has an unused piece"),
    "two unknowns": (change(1, kind=UNKNOWN), "SentencePiece refuses it"),
    "byte under another name": (change(100, text="<0x4a>"), "1 of the 256 bytes have no piece"),
    "no byte": (change(100, kind=CONTROL), "without byte fallback"),
    "ties": (
        lambda m: replace(m, pieces=tuple(replace(p, score=0.0) for p in m.pieces)),
        "have the same score; use a folder with a tokenizer.json",
    ),
    "piece whose letters are none": (
        lambda m: append_pieces(m, [Piece("жэ", -1e6)]),
        "a tokenizer.json made from it would cut '\\\\nжэe' otherwise",
    ),
}


@pytest.mark.parametrize("name", WRONG_MODELS)
def test_a_wrong_model_is_refused(copy, tmp_path, name):
    folder = copy("sentencepiece")
    edit, message = WRONG_MODELS[name]
    rewrite(folder, edit)
    refuse(folder, tmp_path, message)


@pytest.mark.parametrize("has_json", [False, True])
@pytest.mark.parametrize("part", [0.0, 0.001, 0.1, 0.5, 0.9, 0.99, 0.999])
def test_a_cut_model_is_refused(copy, tmp_path, part, has_json):
    folder = copy("sentencepiece", *([] if has_json else ["tokenizer.json"]))
    path = folder / "tokenizer.model"
    data = path.read_bytes()
    path.write_bytes(data[: int(part * len(data))])
    refuse(folder, tmp_path, "tokenizer.model: ")


def damage_bytes(data: bytes, seed: int) -> bytes:
    rng, damaged = random.Random(seed), bytearray(data)
    at = rng.randrange(len(data))
    how = rng.choice(["bit", "bit", "settings", "byte", "lost", "swapped"])
    if how == "bit":
        damaged[at] ^= 1 << rng.randrange(8)
    elif how == "settings":
        damaged[-rng.randint(1, 60)] ^= 1 << rng.randrange(8)
    elif how == "byte":
        damaged[at] = rng.randrange(256)
    elif how == "lost":
        del damaged[at : at + rng.randint(1, 20)]
    else:
        other = rng.randrange(len(data))
        damaged[at : at + 9], damaged[other : other + 9] = damaged[other : other + 9], damaged[at : at + 9]
    return bytes(damaged)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 32), has_json=st.booleans())
def test_a_damaged_model_is_refused_or_extended_right(bases, tmp_path_factory, seed, has_json):
    # A flipped bit of a score or of a piece's text leaves a model of another language, which is as good as any.
    root = tmp_path_factory.mktemp("damaged")
    folder = root / "base"
    copy_tokenizer(bases["sentencepiece"].folder, folder)
    if not has_json:
        (folder / "tokenizer.json").unlink()
    path = folder / "tokenizer.model"
    path.write_bytes(damage_bytes(path.read_bytes(), seed))
    try:
        made = extend(folder, root / "out", RU, ("Cyrillic",), size=15)
    except DataError as error:
        require_blame_on_the_base(error, root)
        return
    agreed = require_guarantees(read_tokenizer(folder), made, PROBES, ("Cyrillic",))
    assert has_json or agreed == len(PROBES)


def require_blame_on_the_base(error: DataError, root) -> None:
    assert "this should not happen" not in str(error)
    assert not (root / "out").exists()


def test_equal_scores_of_runs_of_spaces_are_no_tie(copy, tmp_path):
    # Llama 2 and Mistral give all of them -1e9.
    folder = copy("sentencepiece")
    rewrite(folder, lambda m: append_pieces(m, [Piece("▁" * length, -1e9) for length in (2, 4, 3, 8, 7, 16)]))
    base, made = read_tokenizer(folder), extend(folder, tmp_path / "out", RU, ("Cyrillic",))
    texts = [*PROBES, *("a" + " " * length + "b" for length in range(40)), *(" " * length for length in range(20))]
    assert require_guarantees(base, made, texts, ("Cyrillic",)) == len(texts)
    scores = [piece.score for piece in read_model(made.folder / "tokenizer.model").pieces[base.vocab_size :]]
    assert struct.pack("<40f", *scores) == struct.pack("<40f", *sorted(set(scores), reverse=True))
    assert scores[0] < -1e9


def test_user_defined_pieces_of_a_model_alone_stay_and_the_difference_is_told(copy, tmp_path, caplog):
    folder = copy("sentencepiece")
    rewrite(folder, lambda m: append_pieces(m, [Piece("[REF]", 0.0, USER_DEFINED)]))
    with caplog.at_level(logging.WARNING):
        made = extend(folder, tmp_path / "out", RU, ("Cyrillic",))
    assert (
        r"tokenizer.model: cuts 1 of the pieces' texts otherwise than tokenizer.json, such as '\n[REF]e'" in caplog.text
    )
    assert require_guarantees(read_tokenizer(folder), made, PROBES, ("Cyrillic",)) == len(PROBES)
    assert encode_by_model(made, ["a[REF]"]) == encode(made, ["a[REF]"])
    assert encode(made, ["a[REF]"])[0][-1] == 420


# two files of two tokenizers


def test_files_of_two_tokenizers_are_refused(copy, tmp_path):
    folder = copy("sentencepiece")
    learn_base_tokenizer(make_texts("en", 400, seed=5) + make_texts("ar", 40), 420, "sentencepiece", tmp_path / "other")
    shutil.copy(tmp_path / "other" / "tokenizer.model", folder)
    refuse(folder, tmp_path, "the files are of two tokenizers, remove the wrong one")


def test_a_sentencepiece_model_beside_a_byte_level_json_is_refused(bases, copy, tmp_path):
    folder = copy("byte_level")
    shutil.copy(bases["sentencepiece"].folder / "tokenizer.model", folder)
    refuse(folder, tmp_path, "a SentencePiece model beside a byte-level tokenizer.json; the files are of two")


def test_a_model_of_other_merges_is_refused(copy, tmp_path):
    folder = copy("sentencepiece")
    edit_json(folder / "tokenizer.json", lambda content: content["model"].update(merges=[]))
    refuse(folder, tmp_path, r"cuts \d+ of \d+ texts otherwise than tokenizer.json, .* of two tokenizers")


def test_a_piece_that_only_the_model_cuts_out_is_refused(copy, tmp_path):
    folder = copy("sentencepiece")
    path = folder / "tokenizer.model"
    write_model(append_pieces(read_model(path), [Piece("ко", 0.0, USER_DEFINED)]), path)
    refuse(folder, tmp_path, "piece 'ко' has id 420, but None in tokenizer.json")


def test_files_that_disagree_a_little_each_stay_as_they_are_and_it_is_told(copy, tmp_path, caplog):
    # Swallow's and Chinese-LLaMA's scores are such a case.
    folder = copy("sentencepiece")
    edit_json(folder / "tokenizer.json", lambda content: content["model"]["merges"].reverse())
    with caplog.at_level(logging.WARNING):
        made = extend(folder, tmp_path / "out", RU, ("Cyrillic",))
    assert "of the pieces' texts otherwise than tokenizer.json" in caplog.text
    base = read_tokenizer(folder)
    agreed = require_guarantees(base, made, PROBES, ("Cyrillic",))
    assert 0 < agreed < len(PROBES)
    english = make_texts("en", 10, seed=3)
    assert encode_by_model(made, english) == encode_by_model(base, english)


@pytest.mark.parametrize("flags", [{"single_word": True}, {"normalized": True}, {"special": True}, {}])
def test_an_added_token_behind_the_model_is_cut_out_as_it_was(copy, tmp_path, flags):
    folder = copy("sentencepiece")

    def add(content):
        content["added_tokens"].append(added_token("[tool]", 420, **flags))
        content["model"]["vocab"]["[tool]"] = 420

    edit_json(folder / "tokenizer.json", add)
    base, made = read_tokenizer(folder), extend(folder, tmp_path / "out", RU, ("Cyrillic",))
    texts = ["the[tool]the", "the [tool] the", "[tool]", "кот[tool]кот"]
    require_guarantees(base, made, [*PROBES, *texts[:1]], ("Cyrillic",))
    assert encode(made, texts[:3]) == encode(base, texts[:3])
