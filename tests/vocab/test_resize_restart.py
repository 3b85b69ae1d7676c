"""A resize that is killed at any moment and started again ends with the bytes of one that was never killed."""

import time
from collections import namedtuple

import pytest
import torch

from megatron_adapt.checkpoint import estimate, resume, slices
from megatron_adapt.checkpoint.dist import DistReader
from megatron_adapt.checkpoint.hf import HFFolder
from megatron_adapt.config import ResizeVocab
from megatron_adapt.errors import ConfigError
from megatron_adapt.vocab.resize import resize_vocab
from tests.helpers.kills import check_kills, read_files
from tests.helpers.tiny import write_byte_tokenizer, write_extended_tokenizer, write_llama
from tests.vocab.test_resize_megatron import NEW, make_checkpoint

SETUP = """
from megatron_adapt.vocab.resize import resize_vocab as work
from megatron_adapt.config import ResizeVocab

config = ResizeVocab(
    model=Path({model!r}), tokenizer=Path({tokenizer!r}), output=Path({output!r}), vocab_pad_multiple=128
)
"""
KINDS = ("hf", "megatron")


def make_inputs(folder, kind):
    """Return a model of a kind, a Megatron checkpoint with its optimizer, and a tokenizer made from its own."""
    tokenizer = write_extended_tokenizer(write_byte_tokenizer(folder / "base", 300), folder / "tokenizer", NEW)
    if kind == "megatron":
        return make_checkpoint(folder, with_optimizer=True)[1], tokenizer
    return write_llama(folder / "model", dtype=torch.bfloat16, max_shard_size="20KB"), tokenizer


def kill_at(tmp_path, kind, num_moments, seed):
    model, tokenizer = make_inputs(tmp_path, kind)
    output = tmp_path / "out"
    setup = SETUP.format(model=str(model), tokenizer=str(tokenizer), output=str(output))
    check_kills(setup, output, num_moments, seed)


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_three_moments(tmp_path, kind):
    kill_at(tmp_path, kind, 3, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_twenty_moments(tmp_path, kind):
    kill_at(tmp_path, kind, 20, seed=2)


def configure(model, tokenizer, output, **changes):
    return ResizeVocab(model=model, tokenizer=tokenizer, output=output, vocab_pad_multiple=128, **changes)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_done_is_not_done_again(tmp_path, monkeypatch, kind):
    for name, size in (("SLICE_BYTES", 2000), ("SAVE_BYTES", 4000), ("NUM_THREADS", 1)):
        monkeypatch.setattr(slices, name, size)
    model, tokenizer = make_inputs(tmp_path, kind)
    reader, name = (HFFolder, "read_rows") if kind == "hf" else (DistReader, "read")
    original, calls = getattr(reader, name), []

    def read_some(self, *args):
        if isinstance(args[-1], torch.Tensor):
            calls.append(args[:2])
            if len(calls) == 16:
                time.sleep(0.5)  # for the thread that notes how far the work is
                raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(reader, name, read_some)
    with pytest.raises(KeyboardInterrupt):
        resize_vocab(configure(model, tokenizer, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    resize_vocab(configure(model, tokenizer, tmp_path / "out"))
    assert len(set(calls[:15]) & set(calls[16:])) <= 4, "done again"
    resize_vocab(configure(model, tokenizer, tmp_path / "whole"))
    expected, found = read_files(tmp_path / "whole"), read_files(tmp_path / "out")
    assert expected.keys() == found.keys()
    assert [file for file in expected if expected[file] != found[file]] == [
        file for file in expected if file.name == "stage.json"
    ], "the record names its output, nothing else does"


@pytest.mark.parametrize("kind", KINDS)
def test_a_dry_run_prints_what_it_would_take_and_writes_nothing(tmp_path, monkeypatch, capsys, kind):
    monkeypatch.setattr(estimate, "_SAMPLE_BYTES", 1 << 16)
    model, tokenizer = make_inputs(tmp_path, kind)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    resize_vocab(configure(model, tokenizer, tmp_path / "new" / "out", dry_run=True))
    text = capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert "to 304 tokens, a dry run" in text
    for word in ("read ", "write ", "free ", "memory ", "time ", "GB/s"):
        assert word in text
    monkeypatch.setattr(resume.shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(1))
    for dry_run in (True, False):
        with pytest.raises(ConfigError, match="free there; free some"):
            resize_vocab(configure(model, tokenizer, tmp_path / "x", dry_run=dry_run))
