import json

import pytest
import torch

from megatron_adapt.checkpoint import values
from megatron_adapt.checkpoint.convert import convert_checkpoint
from megatron_adapt.checkpoint.dist import DistReader, DistWriter
from megatron_adapt.checkpoint.hf import HFFolder
from megatron_adapt.checkpoint.root import find_checkpoint, read_description
from megatron_adapt.checkpoint.values import TensorSpec
from megatron_adapt.config import CheckpointSettings, ConvertCheckpoint, ResizeVocab
from megatron_adapt.errors import CheckpointError
from megatron_adapt.vocab.resize import resize_vocab
from tests.helpers.tiny import swap_two_pieces, write_byte_tokenizer, write_extended_tokenizer, write_llama

NEW = [("aa", "ab"), ("t", "h"), ("th", "e"), ("Ġ", "the")]
EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


@pytest.fixture
def tokenizer(tmp_path):
    return write_extended_tokenizer(write_byte_tokenizer(tmp_path / "base", 300), tmp_path / "tokenizer", NEW)


def make_checkpoint(folder, *, with_optimizer=False, **model):
    """A converted tiny model padded to 384 rows; with an optimizer whose states tell row and matrix apart."""
    hf = write_llama(folder / "hf", dtype=torch.bfloat16, **model)
    root = folder / "root"
    settings = CheckpointSettings(vocab_pad_multiple=128)
    convert_checkpoint(ConvertCheckpoint(source=hf, to="megatron", output=root, settings=settings))
    if with_optimizer:
        add_optimizer(root / "release")
    return hf, root


def add_optimizer(folder):
    """Write the weights again, with masters and moments as a training run saves them."""
    source = DistReader(folder)
    tensors = {key: source.read(key) for key in source.keys}
    torch.manual_seed(7)
    for key in list(tensors):
        for state in ("param", "exp_avg", "exp_avg_sq"):
            tensors[f"optimizer.state.{state}.{key}"] = torch.rand(tensors[key].shape) + tensors[key].float()
    common = {**source.read_common(), "optimizer": {"param_groups": [{"step": 5, "betas": (0.9, 0.95)}]}}
    for path in folder.glob("*.distcp"):
        path.unlink()
    with DistWriter(
        folder, {key: TensorSpec(tuple(item.shape), item.dtype) for key, item in tensors.items()}
    ) as writer:
        for key, item in tensors.items():
            writer.write(key, (0,) * item.dim(), item)
        writer.write_object("some.object", {"kept": 1})
        writer.write_common(common)


def resize(root, tokenizer, output, **changes):
    resize_vocab(ResizeVocab(model=root, tokenizer=tokenizer, output=output, vocab_pad_multiple=128, **changes))
    return DistReader(find_checkpoint(output))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_result_is_that_of_resizing_the_hugging_face_folder(tmp_path, tokenizer, tied):
    hf, root = make_checkpoint(tmp_path, tie_word_embeddings=tied)
    resize(root, tokenizer, tmp_path / "out")
    convert_checkpoint(ConvertCheckpoint(source=tmp_path / "out", to="hf", output=tmp_path / "back"))
    resize_vocab(ResizeVocab(model=hf, tokenizer=tokenizer, output=tmp_path / "hf_out"))
    left, right = HFFolder(tmp_path / "back"), HFFolder(tmp_path / "hf_out")
    assert set(left.names) == set(right.names)
    for name in left.names:
        assert torch.equal(left.read(name), right.read(name)), name
    assert json.loads((tmp_path / "back" / "config.json").read_text())["vocab_size"] == 304


def test_masters_and_moments_are_resized_with_their_matrix(tmp_path, tokenizer):
    _, root = make_checkpoint(tmp_path, with_optimizer=True)
    before, after = DistReader(root / "release"), resize(root, tokenizer, tmp_path / "out")
    assert set(before.keys) == set(after.keys)
    pieces = {
        int(new): olds for new, olds in json.loads((tokenizer / "added_pieces.json").read_text())["pieces"].items()
    }
    for matrix in (EMBEDDING, HEAD):
        masters = before.read(f"optimizer.state.param.{matrix}")
        for state in ("param.", "exp_avg.", "exp_avg_sq.", ""):
            key = f"optimizer.state.{state}{matrix}" if state else matrix
            old, new = before.read(key), after.read(key)
            assert new.shape == (384, 32)
            assert new.dtype == old.dtype
            assert torch.equal(new[:300], old[:300]), key
            if state.startswith("exp"):
                assert not new[300:].any()
                continue
            for index, olds in pieces.items():
                assert torch.allclose(new[index], masters[olds].mean(0).to(new.dtype), rtol=1e-6), (key, index)
            assert torch.allclose(new[304:], masters[:300].double().mean(0).to(new.dtype), rtol=1e-6)
    for key in before.keys:
        if not key.endswith((EMBEDDING, HEAD)):
            assert torch.equal(before.read(key), after.read(key)), key
    assert after.read_common() == before.read_common()
    assert after.object_keys == ["some.object"]
    assert after.read_object("some.object") == before.read_object("some.object")


def test_padding_grows_and_shrinks_with_the_vocabulary(tmp_path, tokenizer):
    _, root = make_checkpoint(tmp_path, with_optimizer=True)
    resize_vocab(ResizeVocab(model=root, tokenizer=tokenizer, output=tmp_path / "out", vocab_pad_multiple=305))
    for key in (EMBEDDING, f"optimizer.state.exp_avg.{HEAD}"):
        assert DistReader(tmp_path / "out" / "release").shape(key) == (305, 32)
    description = read_description(tmp_path / "out" / "release")
    assert (description.true_vocab_size, description.padded_vocab_size) == (304, 305)
    assert description.shape.vocab_size == 304
    assert description.tokenizer_fingerprint != read_description(root / "release").tokenizer_fingerprint


def test_small_blocks_give_the_same_checkpoint(tmp_path, tokenizer, monkeypatch):
    _, root = make_checkpoint(tmp_path, with_optimizer=True)
    whole = resize(root, tokenizer, tmp_path / "whole")
    monkeypatch.setattr(values, "BLOCK_BYTES", 7 * 32 * 4)
    blocks = resize(root, tokenizer, tmp_path / "blocks")
    for key in whole.keys:
        assert torch.equal(whole.read(key), blocks.read(key)), key


def test_rows_follow_tokens_that_moved(tmp_path, tokenizer):
    _, root = make_checkpoint(tmp_path, with_optimizer=True)
    swap_two_pieces(tokenizer)
    before, after = DistReader(root / "release"), resize(root, tokenizer, tmp_path / "out")
    order = [*range(258), 259, 258, *range(260, 300)]
    for key in (EMBEDDING, f"optimizer.state.exp_avg_sq.{EMBEDDING}"):
        assert torch.equal(after.read(key)[:300], before.read(key)[order])


def test_an_unknown_state_of_a_matrix_is_refused_and_nothing_written(tmp_path, tokenizer):
    _, root = make_checkpoint(tmp_path)
    source = DistReader(root / "release")
    tensors = {key: source.read(key) for key in source.keys}
    tensors[f"optimizer.state.momentum.{EMBEDDING}"] = torch.zeros(384, 32)
    with DistWriter(root / "release", {k: TensorSpec(tuple(t.shape), t.dtype) for k, t in tensors.items()}) as writer:
        for key, item in tensors.items():
            writer.write(key, (0,) * item.dim(), item)
        writer.write_common({})
    with pytest.raises(CheckpointError, match=r"optimizer\.state\.momentum\..* is an optimizer state .* not known"):
        resize(root, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_made_from_another_base_is_refused(tmp_path):
    _, root = make_checkpoint(tmp_path)
    other = write_extended_tokenizer(write_byte_tokenizer(tmp_path / "other", 310), tmp_path / "tokenizer", NEW[1:])
    with pytest.raises(
        CheckpointError, match=r"has 300 vocabulary rows .*, but .* made from a base of 310 tokens; build"
    ):
        resize(root, other, tmp_path / "out")
