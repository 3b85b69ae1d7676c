from dataclasses import replace

import pytest

from megatron_adapt.checkpoint.root import (
    Description,
    find_checkpoint,
    is_megatron_checkpoint,
    name_iteration,
    read_description,
    write_description,
    write_latest,
)
from megatron_adapt.errors import CheckpointError
from megatron_adapt.shape import RopeScaling
from tests.helpers.shapes import SMALL_SHAPE


def _description() -> Description:
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=2048)
    shape = replace(SMALL_SHAPE, rope_scaling=scaling, tied=True)
    return Description(
        shape=shape, true_vocab_size=11, padded_vocab_size=16, tokenizer_fingerprint="ab", step=7, dtype="bfloat16"
    )


def _make_iteration(root, name):
    (root / name).mkdir(parents=True)
    (root / name / ".metadata").write_bytes(b"")
    return root / name


def test_a_description_comes_back_as_it_was_written(tmp_path):
    write_description(tmp_path, _description())
    assert read_description(tmp_path) == _description()


@pytest.mark.parametrize("step", [None, 10])
def test_the_latest_checkpoint_of_a_root_is_found(tmp_path, step):
    _make_iteration(tmp_path, "iter_0000005")
    expected = _make_iteration(tmp_path, "release" if step is None else name_iteration(step))
    write_latest(tmp_path, step)
    assert find_checkpoint(tmp_path) == expected
    assert find_checkpoint(expected) == expected
    assert is_megatron_checkpoint(tmp_path)
    assert is_megatron_checkpoint(expected)


def test_names_are_those_of_megatron_lm():
    assert name_iteration(10) == "iter_0000010"


def test_a_folder_without_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no Megatron checkpoint"):
        find_checkpoint(tmp_path)


def test_a_latest_that_is_gone_is_named(tmp_path):
    write_latest(tmp_path, 10)
    with pytest.raises(CheckpointError, match="names iter_0000010, which is no checkpoint; there is no other"):
        find_checkpoint(tmp_path)
    for step in (3, 5):
        _make_iteration(tmp_path, name_iteration(step))
    (tmp_path / "iter_0000007").mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint; write 5 into it to take iter_0000005"):
        find_checkpoint(tmp_path)


def test_a_latest_that_is_neither_step_nor_release_is_refused(tmp_path):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("ten")
    with pytest.raises(CheckpointError, match="'ten' is neither a step nor 'release'"):
        find_checkpoint(tmp_path)


def test_a_checkpoint_that_says_nothing_of_itself_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no adapt\.json, so its true vocabulary is unknown"):
        read_description(tmp_path)


@pytest.mark.parametrize("raw", ["{}", "[", '{"shape": 3}'])
def test_a_damaged_description_is_refused(tmp_path, raw):
    (tmp_path / "adapt.json").write_text(raw)
    with pytest.raises(CheckpointError, match=r"adapt\.json: damaged"):
        read_description(tmp_path)
