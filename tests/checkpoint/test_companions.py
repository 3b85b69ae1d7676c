import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_adapt.checkpoint.companions import (
    change_config,
    check_export_vocab,
    check_import_vocab,
    find_tokenizer,
    write_companions,
)
from megatron_adapt.checkpoint.root import Description
from megatron_adapt.errors import CheckpointError
from megatron_adapt.shape import LlamaShape
from megatron_adapt.tokenizer.pieces import read_tokenizer
from tests.helpers.tiny import write_byte_tokenizer


def _describe(true_vocab_size: int, fingerprint: str | None) -> Description:
    shape = LlamaShape(
        num_layers=1,
        hidden_size=8,
        ffn_hidden_size=12,
        num_attention_heads=2,
        num_query_groups=2,
        kv_channels=4,
        vocab_size=true_vocab_size,
        max_position_embeddings=16,
        layernorm_epsilon=1e-5,
        rotary_base=1e4,
        rope_scaling=None,
        tied=False,
    )
    return Description(
        shape=shape,
        true_vocab_size=true_vocab_size,
        padded_vocab_size=1024,
        tokenizer_fingerprint=fingerprint,
        step=0,
        dtype="float32",
    )


@pytest.fixture
def tokenizer(tmp_path):
    return read_tokenizer(write_byte_tokenizer(tmp_path / "tokenizer", 300))


def test_a_model_with_too_few_rows_is_refused_with_both_numbers_and_the_remedy(tokenizer):
    with pytest.raises(CheckpointError, match=r"has 300 tokens, the model only 299 rows; .* tools/resize_vocab\.py"):
        check_import_vocab(tokenizer, 299, Path("model"))


def test_rows_beyond_the_tokenizer_are_kept_and_logged(tokenizer, caplog):
    with caplog.at_level(logging.INFO):
        check_import_vocab(tokenizer, 320, Path("model"))
    assert "20 rows beyond the 300 tokens are kept" in caplog.text


def test_a_model_without_tokenizer_is_taken_with_a_warning(caplog):
    check_import_vocab(None, 320, Path("model"))
    assert "no tokenizer, so its 320 vocabulary rows are taken unchecked" in caplog.text


def test_the_checkpoints_own_tokenizer_is_accepted(tokenizer):
    check_export_vocab(tokenizer, _describe(300, tokenizer.fingerprint), Path("ckpt"))
    check_export_vocab(None, _describe(300, None), Path("ckpt"))


def test_spare_rows_are_accepted_on_export_only_for_the_tokenizer_that_came_with_them(tokenizer):
    check_export_vocab(tokenizer, _describe(320, tokenizer.fingerprint), Path("ckpt"))
    with pytest.raises(CheckpointError, match="has 300 tokens, the checkpoint's vocabulary has 320"):
        check_export_vocab(tokenizer, _describe(320, "another"), Path("ckpt"))


@pytest.mark.parametrize("true_vocab_size", [290, 310])
def test_an_export_with_another_number_of_tokens_is_refused(tokenizer, true_vocab_size):
    description = _describe(true_vocab_size, "another")
    with pytest.raises(CheckpointError, match=f"has 300 tokens, the checkpoint's .* has {true_vocab_size};"):
        check_export_vocab(tokenizer, description, Path("ckpt"))


def test_a_matrix_smaller_than_its_own_tokenizer_is_refused_on_export(tokenizer):
    with pytest.raises(CheckpointError, match="has 300 tokens, the checkpoint's vocabulary has 290"):
        check_export_vocab(tokenizer, _describe(290, tokenizer.fingerprint), Path("ckpt"))


def test_another_tokenizer_of_the_same_size_is_refused(tokenizer):
    with pytest.raises(CheckpointError, match="is not the one of the checkpoint, though both have 300 tokens"):
        check_export_vocab(tokenizer, _describe(300, "another"), Path("ckpt"))


def test_a_tokenizer_that_got_lost_is_asked_for(tokenizer):
    with pytest.raises(CheckpointError, match="its tokenizer is missing from the hf folder beside it"):
        check_export_vocab(None, _describe(300, tokenizer.fingerprint), Path("ckpt"))


def test_a_named_tokenizer_goes_before_the_one_beside_the_weights(tmp_path, tokenizer):
    other = write_byte_tokenizer(tmp_path / "other", 310)
    found = find_tokenizer(other, tokenizer.folder)
    assert found is not None
    assert found.vocab_size == 310
    assert find_tokenizer(None, tokenizer.folder) is not None
    assert find_tokenizer(None, tmp_path) is None


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_config_changes_only_in_vocabulary_and_type(key):
    config = {"rope_scaling": {"type": "llama3"}, "vocab_size": 10, key: "float32", "x": None}
    assert change_config(config, vocab_size=12, dtype="bfloat16") == {**config, "vocab_size": 12, key: "bfloat16"}


def test_a_config_that_is_silent_about_the_type_stays_so():
    assert change_config({"vocab_size": 10}, vocab_size=12, dtype="bfloat16") == {"vocab_size": 12}


def test_generation_config_chat_template_and_map_of_new_tokens_travel(tmp_path, tokenizer):
    (tokenizer.folder / "chat_template.jinja").write_text("{{ messages }}")
    (tokenizer.folder / "added_pieces.json").write_text("{}")
    source = tmp_path / "source"
    source.mkdir()
    (source / "generation_config.json").write_text('{"top_p": 0.9}')
    target = tmp_path / "target"
    write_companions(target, config={"a": 1}, source=source, tokenizer=replace(tokenizer))
    assert json.loads((target / "config.json").read_text()) == {"a": 1}
    assert (target / "generation_config.json").read_text() == '{"top_p": 0.9}'
    assert (target / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (target / "added_pieces.json").read_text() == "{}"
    assert read_tokenizer(target).fingerprint == tokenizer.fingerprint
