import json
import shutil

import pytest
import torch
import transformers

from megatron_adapt.checkpoint.convert import convert_checkpoint
from megatron_adapt.checkpoint.dist import COMMON_FILE, DistReader
from megatron_adapt.checkpoint.root import find_checkpoint, read_description
from megatron_adapt.config import CheckpointSettings, ConvertCheckpoint, ResizeVocab
from megatron_adapt.errors import CheckpointError
from megatron_adapt.vocab.resize import resize_vocab
from tests.helpers.fused import fuse_weights, make_arguments
from tests.helpers.tensors import assert_same_tensors, convert_to_hf
from tests.helpers.tiny import write_byte_tokenizer, write_extended_tokenizer, write_llama

NEW = [("aa", "ab"), ("t", "h"), ("th", "e"), ("Ġ", "the")]


def _write_partition(hf, root):
    """Write a model as the one partition that Megatron-LM saves of it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(hf, dtype="auto")
    folder = root / "iter_0000010" / "mp_rank_00"
    folder.mkdir(parents=True)
    content = {"args": make_arguments(model, 320), "iteration": 10, "model": fuse_weights(model, 320)}
    torch.save(content, folder / "model_optim_rng.pt")
    (root / "latest_checkpointed_iteration.txt").write_text("10")


def _write_dist(hf, root):
    """Write a model as a torch_dist folder that does not describe itself."""
    settings = CheckpointSettings(vocab_pad_multiple=64)
    convert_checkpoint(ConvertCheckpoint(source=hf, to="megatron", output=root, settings=settings))
    model = transformers.AutoModelForCausalLM.from_pretrained(hf, dtype="auto")
    (root / "release" / "adapt.json").unlink()
    torch.save({"args": make_arguments(model, 320), "iteration": 10}, root / "release" / COMMON_FILE)
    shutil.rmtree(root / "hf")


@pytest.mark.parametrize("write", [_write_partition, _write_dist], ids=["partition", "torch_dist"])
def test_the_weights_of_another_program_become_a_checkpoint_of_the_new_tokenizer(tmp_path, write):
    hf = write_llama(tmp_path / "hf", dtype=torch.bfloat16)
    tokenizer = write_extended_tokenizer(hf, tmp_path / "tokenizer", NEW)
    write(hf, tmp_path / "root")
    config = ResizeVocab(model=tmp_path / "root", tokenizer=tokenizer, output=tmp_path / "out", vocab_pad_multiple=128)
    resize_vocab(config)
    folder = find_checkpoint(tmp_path / "out")
    description = read_description(folder)
    assert (folder.name, description.step, description.true_vocab_size) == ("release", 0, 304)
    assert DistReader(folder).read_common() == {"iteration": 0, "checkpoint_version": 3.0}
    convert_to_hf(tmp_path / "out", tmp_path / "back")
    resize_vocab(ResizeVocab(model=hf, tokenizer=tokenizer, output=tmp_path / "hf_out"))
    assert_same_tensors(tmp_path / "back", tmp_path / "hf_out")
    hf_config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (hf_config["bos_token_id"], hf_config["eos_token_id"], hf_config["vocab_size"]) == (0, 1, 304)


def test_a_tokenizer_of_a_larger_base_is_refused(tmp_path):
    hf = write_llama(tmp_path / "hf")
    _write_partition(hf, tmp_path / "root")
    base = write_byte_tokenizer(tmp_path / "base", 330)
    tokenizer = write_extended_tokenizer(base, tmp_path / "tokenizer", [("aa", "ab")])
    with pytest.raises(CheckpointError, match="has 320 vocabulary rows, the tokenizer 330 tokens"):
        resize_vocab(ResizeVocab(model=tmp_path / "root", tokenizer=tokenizer, output=tmp_path / "out"))
