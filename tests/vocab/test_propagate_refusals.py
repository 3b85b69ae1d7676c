"""Models that do not belong together or are damaged are refused by name, and nothing is left behind."""

import json

import pytest
import torch

from megatron_adapt.checkpoint.hf import HFFolder
from megatron_adapt.config import PropagateSettings
from megatron_adapt.errors import CheckpointError, ConfigError, DataError
from megatron_adapt.tokenizer.pieces import copy_tokenizer, read_tokenizer
from tests.helpers.tiny import write_byte_tokenizer, write_extended_tokenizer, write_llama
from tests.vocab.trios import EMBEDDING, HEAD, WIDTH, change_model, draw, make_trio


def damage(folder, name, row, value=torch.nan):
    source = HFFolder(folder)
    rows = {other: source.read(other) for other in source.names}
    rows[name][row] = value
    tokenizer = read_tokenizer(folder)
    copy_tokenizer(folder, folder.with_name("kept"))
    change_model(folder, folder.with_name("damaged"), tokenizer, rows)
    return folder.with_name("damaged")


@pytest.mark.parametrize(
    ("role", "name", "row", "message"),
    [
        ("base", EMBEDDING, 7, r"row 7 \(.*\) of model\.embed_tokens\.weight holds NaN or infinity; use an earlier"),
        ("adapted", HEAD, 425, r"row 425 \(.*\) of lm_head\.weight holds NaN"),
        ("instruct", HEAD, 421, r"row 421 \('\[tool\]'\) of lm_head\.weight holds NaN"),
        ("instruct", "model.norm.weight", 3, r"model\.norm\.weight holds NaN or infinity in rows 0 to 31; fetch it"),
    ],
)
def test_values_that_are_not_finite_are_refused_by_name(byte_trio, tmp_path, role, name, row, message):
    (tmp_path / "kept").mkdir()
    setattr(byte_trio, role, damage(getattr(byte_trio, role), name, row))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=message):
        byte_trio.propagate(tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_a_training_that_diverged_in_the_body_is_refused(byte_trio, tmp_path):
    (tmp_path / "kept").mkdir()
    byte_trio.adapted = damage(byte_trio.adapted, "model.norm.weight", 3)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight minus the base's is not finite in rows 0 to 31"):
        byte_trio.propagate(tmp_path / "out", body_delta=1.0)


def test_rows_too_large_for_the_type_are_refused(bases, tmp_path):
    maps = dict.fromkeys((EMBEDDING, HEAD), 3000 * torch.eye(WIDTH))
    trio = make_trio(tmp_path, bases["byte_level"], dtype=torch.float16, maps=maps)
    rows = {name: 100 * HFFolder(trio.adapted).read(name) for name in trio.names}
    trio.adapted = change_model(trio.adapted, tmp_path / "large", read_tokenizer(trio.adapted), rows)
    with pytest.raises(CheckpointError, match=r"mapped rows exceed torch\.float16; give the instruct model another"):
        trio.propagate(tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 64}, r"model\.\S+ is \(.*64.*\), in the base .* \(.*32.*\); name models made from this base"),
        ({"num_hidden_layers": 3}, r"model\.layers\.2\.\S+ is \(.*\), in the base .* missing; name models"),
        ({"num_hidden_layers": 1}, r"model\.layers\.1\.\S+ is missing, in the base .* \(.*\); name models"),
        ({"tie_word_embeddings": True}, r"has one matrix for input and head, the base .* two matrices"),
    ],
)
@pytest.mark.parametrize("role", ["adapted", "instruct"])
def test_models_of_another_shape_are_refused(byte_trio, tmp_path, settings, message, role):
    tokenizer = read_tokenizer(getattr(byte_trio, role))
    other = write_llama(tmp_path / "wrong", vocab_size=tokenizer.vocab_size, tokenizer=False, **settings)
    copy_tokenizer(tokenizer.folder, other)
    setattr(byte_trio, role, other)
    with pytest.raises(CheckpointError, match=message):
        byte_trio.propagate(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("role", ["base", "adapted", "instruct"])
def test_a_tokenizer_without_rows_is_refused(byte_trio, tmp_path, role):
    folder = getattr(byte_trio, role)
    rows = {name: HFFolder(folder).read(name)[:-1] for name in byte_trio.names}
    change_model(folder, tmp_path / "short", read_tokenizer(folder), rows)
    setattr(byte_trio, role, tmp_path / "short")
    size = read_tokenizer(folder).vocab_size
    with pytest.raises(CheckpointError, match=f"has {size} tokens, the model only {size - 1} rows"):
        byte_trio.propagate(tmp_path / "out")


def test_a_folder_without_a_tokenizer_is_refused(byte_trio, tmp_path):
    (byte_trio.base / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"base: holds no tokenizer\.json"):
        byte_trio.propagate(tmp_path / "out")


def test_added_tokens_without_a_description_are_refused(bases, tmp_path):
    trio = make_trio(tmp_path, bases["sentencepiece"])
    (trio.instruct / "tokenizer.json").unlink()
    (trio.instruct / "added_tokens.json").write_text("{}")
    assert (trio.instruct / "tokenizer.model").is_file()
    with pytest.raises(DataError, match=r"instruct: has no tokenizer\.json, and added_tokens\.json alone does not say"):
        trio.propagate(tmp_path / "out")


def test_an_adapted_tokenizer_of_another_base_is_refused(byte_trio, tmp_path):
    other = write_extended_tokenizer(write_byte_tokenizer(tmp_path / "x", 420), tmp_path / "y", [("aa", "ab")])
    rows = {name: draw(421, 3) for name in byte_trio.names}
    byte_trio.adapted = change_model(byte_trio.base, tmp_path / "wrong", read_tokenizer(other), rows)
    (byte_trio.adapted / "added_pieces.json").write_bytes((other / "added_pieces.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"id \d+ is .*, in the model's tokenizer .*; build the tokenizer from"):
        byte_trio.propagate(tmp_path / "out")


def test_a_token_that_the_configs_name_and_that_is_gone_is_refused(byte_trio, tmp_path):
    index = read_tokenizer(byte_trio.base).tokenizer.token_to_id("the")
    byte_trio.adapted = change_model(
        byte_trio.adapted, tmp_path / "small", read_tokenizer(write_byte_tokenizer(tmp_path / "bytes", 258)), {}
    )
    (byte_trio.instruct / "generation_config.json").write_text(json.dumps({"bos_token_id": index}))
    with pytest.raises(CheckpointError, match=f"bos_token_id {index} is a token that the new tokenizer lacks"):
        byte_trio.propagate(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_overlap_without_shared_tokens_is_refused(byte_trio, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_adapt.vocab.propagate.list_equations", lambda *_, **__: [])
    with pytest.raises(CheckpointError, match="no token of its tokenizer is known to the base's; --method swap needs"):
        byte_trio.propagate(tmp_path / "out", "overlap")


@pytest.mark.parametrize("value", [3.0, float("nan")])
def test_a_body_delta_out_of_range_is_refused(value):
    with pytest.raises(ConfigError, match=r"propagate\.body_delta: \S+ is not between -2 and 2; 0\.3 to 1 are usual"):
        PropagateSettings(body_delta=value)
