"""The output appears whole: kept, replaced when asked, and the same bytes however often the work was killed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_adapt.checkpoint import estimate
from megatron_adapt.checkpoint.hf import HFFolder
from megatron_adapt.errors import ConfigError
from tests.helpers.kills import check_kills
from tests.vocab.trios import HEAD

TOOL = Path(__file__).parents[2] / "tools" / "propagate_embeddings.py"


def test_an_existing_output_is_kept_unless_told_otherwise(byte_trio, tmp_path):
    byte_trio.propagate(tmp_path / "out")
    with pytest.raises(ConfigError, match="exists already"):
        byte_trio.propagate(tmp_path / "out")
    byte_trio.propagate(tmp_path / "out", "swap", overwrite=True)
    record = json.loads((tmp_path / "out" / "stage.json").read_text())
    assert record["config"]["settings"]["method"] == "swap"
    assert record["counts"] == {"base_vocab_size": 420, "vocab_size": 438, "new_rows": 16, "instruct_rows": 4}


def test_a_dry_run_prints_what_it_would_take_and_writes_nothing(byte_trio, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(estimate, "_SAMPLE_BYTES", 1 << 16)
    before = sorted(tmp_path.rglob("*"))
    byte_trio.run(tmp_path / "out", dry_run=True)
    assert sorted(tmp_path.rglob("*")) == before
    text = capsys.readouterr().out
    assert "to 438 tokens, a dry run" in text
    assert "memory" in text


def test_the_tool_writes_the_same(byte_trio, tmp_path):
    expected = byte_trio.propagate(tmp_path / "expected", "overlap").read(HEAD)
    folders = {"base": byte_trio.base, "adapted": byte_trio.adapted, "instruct": byte_trio.instruct}
    flags = [text for name, folder in folders.items() for text in (f"--{name}", str(folder))]
    command = [sys.executable, str(TOOL), *flags, "--method", "overlap", "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert torch.equal(HFFolder(tmp_path / "out").read(HEAD), expected)


def kill_at(trio, tmp_path, num_moments, seed):
    setup = f"""
from megatron_adapt.vocab.propagate import propagate_embeddings as work
from megatron_adapt.config import PropagateEmbeddings

config = PropagateEmbeddings(
    base=Path({str(trio.base)!r}), adapted=Path({str(trio.adapted)!r}), instruct=Path({str(trio.instruct)!r}),
    output=Path({str(tmp_path / "out")!r}),
)
"""
    check_kills(setup, tmp_path / "out", num_moments, seed)


def test_killed_at_three_moments_and_started_again_it_ends_with_the_same_bytes(byte_trio, tmp_path):
    kill_at(byte_trio, tmp_path, 3, seed=1)


@pytest.mark.slow
def test_killed_at_twenty_moments_and_started_again_it_ends_with_the_same_bytes(byte_trio, tmp_path):
    kill_at(byte_trio, tmp_path, 20, seed=2)
