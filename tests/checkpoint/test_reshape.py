"""Weights alone, averaged, and with blocks that change nothing."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_adapt.checkpoint import slices
from megatron_adapt.checkpoint.convert import convert_checkpoint
from megatron_adapt.checkpoint.dist import DistReader, DistWriter
from megatron_adapt.checkpoint.reshape import average_checkpoints, expand_blocks, list_blocks, strip_checkpoint
from megatron_adapt.checkpoint.root import find_checkpoint, read_description
from megatron_adapt.checkpoint.values import TensorSpec
from megatron_adapt.config import (
    AverageCheckpoints,
    CheckpointSettings,
    ConvertCheckpoint,
    ExpandBlocks,
    StripCheckpoint,
)
from megatron_adapt.errors import CheckpointError, ConfigError
from tests.helpers.kills import check_kills
from tests.helpers.tiny import write_llama


def make_checkpoint(folder, **model):
    hf = write_llama(folder / "hf", **model)
    settings = CheckpointSettings(vocab_pad_multiple=128)
    convert_checkpoint(ConvertCheckpoint(source=hf, to="megatron", output=folder / "root", settings=settings))
    return folder / "root"


def change(root, edit, *, with_optimizer=False):
    """Write the weights again, edited."""
    folder = find_checkpoint(root)
    source = DistReader(folder)
    tensors = {key: edit(source.read(key)) for key in source.keys}
    if with_optimizer:
        tensors |= {f"optimizer.state.exp_avg.{key}": torch.rand(item.shape) for key, item in tensors.items()}
    common = source.read_common()
    for path in folder.glob("*.distcp"):
        path.unlink()
    specs = {key: TensorSpec(tuple(item.shape), item.dtype) for key, item in tensors.items()}
    with DistWriter(folder, specs) as writer:
        for key, item in tensors.items():
            writer.write(key, (0,) * item.dim(), item)
        writer.write_common(common)
    return tensors


def read_all(root):
    source = DistReader(find_checkpoint(root))
    return {key: source.read(key) for key in source.keys}


def test_weights_come_without_their_optimizer_and_bit_by_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(slices, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(slices, "SLICE_BYTES", 300)
    root = make_checkpoint(tmp_path)
    before = change(root, lambda item: item, with_optimizer=True)
    strip_checkpoint(StripCheckpoint(source=root, output=tmp_path / "out"))
    after = read_all(tmp_path / "out")
    assert set(after) == {key for key in before if not key.startswith("optimizer")}
    assert all(torch.equal(after[key], before[key]) for key in after)


def test_weights_change_their_type_and_their_files(tmp_path):
    root = make_checkpoint(tmp_path, hidden_size=256, intermediate_size=1024)
    before = read_all(root)
    config = StripCheckpoint(source=root, output=tmp_path / "out", dtype="bfloat16", max_file_mib=1)
    strip_checkpoint(config)
    after = read_all(tmp_path / "out")
    assert all(torch.equal(after[key], before[key].bfloat16()) for key in before)
    folder = find_checkpoint(tmp_path / "out")
    assert read_description(folder).dtype == "bfloat16"
    assert len(list(folder.glob("*.distcp"))) > 2


def test_the_mean_is_that_of_all_checkpoints(tmp_path):
    roots = [make_checkpoint(tmp_path / str(at)) for at in range(3)]
    parts = [change(root, lambda item, at=at: item * (at + 1) + at) for at, root in enumerate(roots)]
    average_checkpoints(AverageCheckpoints(sources=tuple(roots), output=tmp_path / "out"))
    for key, mean in read_all(tmp_path / "out").items():
        expected = torch.stack([part[key].double() for part in parts]).mean(0)
        torch.testing.assert_close(mean, expected.to(mean.dtype), rtol=0, atol=0)


def test_checkpoints_of_two_models_are_not_averaged(tmp_path):
    one, other = make_checkpoint(tmp_path / "a"), make_checkpoint(tmp_path / "b", intermediate_size=160)
    with pytest.raises(CheckpointError, match=r"shape .* but .* has .*; average checkpoints of one model"):
        average_checkpoints(AverageCheckpoints(sources=(one, other), output=tmp_path / "out"))
    with pytest.raises(ConfigError, match="--sources: 1 checkpoint; name at least two"):
        AverageCheckpoints(sources=(one,), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_groups_of_blocks_end_with_a_copy():
    assert list_blocks(4, 2) == ([0, 1, 1, 2, 3, 3], [False, False, True, False, False, True])
    assert list_blocks(2, 2) == ([0, 0, 1, 1], [False, True, False, True])


@pytest.mark.parametrize("tied", [False, True])
def test_an_expanded_model_is_what_it_was(tied, tmp_path):
    root = make_checkpoint(tmp_path, num_hidden_layers=4, tie_word_embeddings=tied)
    expand_blocks(ExpandBlocks(source=root, output=tmp_path / "wide", blocks=2))
    folder = find_checkpoint(tmp_path / "wide")
    assert read_description(folder).new_blocks == (2, 5)
    convert_checkpoint(ConvertCheckpoint(source=tmp_path / "wide", to="hf", output=tmp_path / "wide_hf", verify=True))
    base, wide = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("hf", "wide_hf"))
    assert wide.config.num_hidden_layers == 6
    ids = torch.randint(0, 200, (2, 17))
    with torch.no_grad():
        torch.testing.assert_close(wide(ids).logits, base(ids).logits, rtol=0, atol=1e-6)
    copied = wide.model.layers[2]
    assert not copied.self_attn.o_proj.weight.any()
    assert torch.equal(copied.mlp.up_proj.weight, base.model.layers[1].mlp.up_proj.weight)


def test_blocks_that_do_not_divide_the_layers_are_refused(tmp_path):
    root = make_checkpoint(tmp_path, num_hidden_layers=4)
    with pytest.raises(ConfigError, match="--blocks: 3 do not divide 4 layers; use one of 1, 2, 4"):
        expand_blocks(ExpandBlocks(source=root, output=tmp_path / "out", blocks=3))
    with pytest.raises(ConfigError, match="--blocks: 0 is below 1"):
        ExpandBlocks(source=root, output=tmp_path / "out", blocks=0)


SETUP = """
from megatron_adapt.checkpoint.reshape import {work} as work
from megatron_adapt.config import AverageCheckpoints, ExpandBlocks, StripCheckpoint

source, output = Path({root!r}), Path({output!r})
config = {config}
"""
KINDS = {
    "strip_checkpoint": "StripCheckpoint(source=source, output=output)",
    "average_checkpoints": "AverageCheckpoints(sources=(source, source), output=output)",
    "expand_blocks": "ExpandBlocks(source=source, output=output, blocks=2)",
}


@pytest.mark.parametrize(
    ("work", "num_moments"),
    [
        *((work, 3) for work in KINDS),
        *(pytest.param(work, 20, marks=pytest.mark.slow) for work in KINDS),
    ],
)
def test_killed_at_any_moment_it_ends_with_the_same_bytes(work, num_moments, tmp_path):
    root = make_checkpoint(tmp_path, num_hidden_layers=4)
    setup = SETUP.format(work=work, config=KINDS[work], root=str(root), output=str(tmp_path / "out"))
    check_kills(setup, tmp_path / "out", num_moments, seed=num_moments)
