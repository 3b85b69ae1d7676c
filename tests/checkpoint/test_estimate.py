"""What a dry run says of a 70B model, whose weights are holes here, and what 2 of its 80 layers really take."""

import logging
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from megatron_adapt.checkpoint import estimate, resume
from megatron_adapt.checkpoint.convert import convert_checkpoint
from megatron_adapt.config import ConvertCheckpoint, ResizeVocab
from megatron_adapt.errors import ConfigError
from megatron_adapt.files import write_json
from megatron_adapt.vocab.resize import resize_vocab
from tests.helpers.sparse import (
    LLAMA_70B,
    list_merges,
    write_large_tokenizer,
    write_sparse_checkpoint,
    write_sparse_llama,
)
from tests.helpers.tiny import NUM_BASE_IDS, write_extended_tokenizer

_logger = logging.getLogger(__name__)
PARAMETERS = 68_976_648_192
"Of Llama 2 70B."
ROWS, PADDING = 32000 * 8192 * 2, 768 * 8192 * 2
"Values of 32,000 more rows in both matrices, and of the rows up to a multiple of 1024."
NUMBERS = re.compile(
    r"read +([\d.]+) GB in (\d+) .*write +([\d.]+) GB in (\d+) .*memory +([\d.]+) GB.*time +([\d,]+) s at ([\d.]+)",
    re.S,
)


def write_tokenizers(folder):
    base = write_large_tokenizer(folder / "base", 32000)
    return base, write_extended_tokenizer(
        base, folder / "new", list_merges(64000 - NUM_BASE_IDS)[32000 - NUM_BASE_IDS :]
    )


def read_numbers(capsys):
    read, read_files, write, files, memory, seconds, speed = NUMBERS.search(capsys.readouterr().out).groups()
    rounding = 0.005 / float(speed)
    assert float(seconds.replace(",", "")) == pytest.approx(float(write) / float(speed), rel=2 * rounding, abs=1)
    return float(read), int(read_files), float(write), int(files), float(memory)


def test_a_dry_run_of_a_70b_model_says_its_bytes_files_memory_and_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(estimate, "_SAMPLE_BYTES", 1 << 20)
    monkeypatch.setattr(resume.shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(10**12))
    model = tmp_path / "model"
    assert write_sparse_llama(model, LLAMA_70B).num_parameters == PARAMETERS
    used = sum(file.stat().st_blocks * 512 for file in model.iterdir())
    assert used < 2e6, "the file system has no holes"
    base, new = write_tokenizers(tmp_path)
    shutil.copytree(base, model, dirs_exist_ok=True)
    convert_checkpoint(ConvertCheckpoint(source=model, to="megatron", output=tmp_path / "out", dry_run=True))
    read, read_files, write, files, memory = read_numbers(capsys)
    assert read == pytest.approx(2 * PARAMETERS / 1e9, rel=1e-4)
    assert read_files == len(list(model.glob("*.safetensors")))
    assert write == pytest.approx(2 * (PARAMETERS + PADDING) / 1e9, rel=1e-3)
    assert files == pytest.approx(write * 1e9 / 2**30, abs=1)
    assert memory < 2
    resize_vocab(ResizeVocab(model=model, tokenizer=new, output=tmp_path / "out", dry_run=True))
    read, _, write, files, memory = read_numbers(capsys)
    assert read == pytest.approx(2 * PARAMETERS / 1e9, rel=1e-4)
    assert write == pytest.approx(2 * (PARAMETERS + ROWS) / 1e9, rel=1e-4)
    assert write / 5 <= files <= write / 4.5
    assert memory < 2
    monkeypatch.setattr(resume.shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(10**11))
    with pytest.raises(ConfigError, match=r"out takes 138 GB more, 100 GB are free there; free some or name"):
        convert_checkpoint(ConvertCheckpoint(source=model, to="megatron", output=tmp_path / "out", dry_run=True))
    assert not (tmp_path / "out").exists()


def test_a_dry_run_of_a_70b_checkpoint_counts_its_optimizer(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(estimate, "_SAMPLE_BYTES", 1 << 20)
    monkeypatch.setattr(resume.shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(10**13))
    base, new = write_tokenizers(tmp_path)
    write_json(base / "config.json", LLAMA_70B)
    write_sparse_checkpoint(tmp_path / "root", base)
    resize_vocab(ResizeVocab(model=tmp_path / "root", tokenizer=new, output=tmp_path / "out", dry_run=True))
    read, read_files, write, files, memory = read_numbers(capsys)
    each = 2 + 3 * 4
    assert read == pytest.approx(each * (PARAMETERS + PADDING) / 1e9, rel=1e-3)
    assert read_files == len(list((tmp_path / "root" / "iter_0000010").glob("*.distcp"))) + 1
    assert write == pytest.approx(each * (PARAMETERS + ROWS + 512 * 8192 * 2) / 1e9, rel=1e-3)
    assert files <= 257, "more than a process may have open"
    assert memory < 2


TOOLS = Path(__file__).parents[2] / "tools"
RUNNER = """
import runpy, sys
from pathlib import Path
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
status = Path("/proc/self/status").read_text().splitlines()  # ru_maxrss begins at the size of the parent
sys.stdout.write(next(line.split()[1] for line in status if line.startswith("VmHWM")))
"""


def run_tool(tool, *flags):
    """Run a tool; return its peak memory in GB."""
    command = [sys.executable, "-c", RUNNER, str(TOOLS / f"{tool}.py"), *map(str, flags)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) * 1024 / 1e9


def count_bytes(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.mark.slow
def test_two_layers_of_a_70b_model_take_the_bytes_and_the_memory_that_were_said(tmp_path):
    if shutil.disk_usage(tmp_path).free < 30e9:
        pytest.skip("less than 30 GB free for the copies of 4.5 GB")
    model = tmp_path / "model"
    shape = write_sparse_llama(model, {**LLAMA_70B, "num_hidden_layers": 2})
    base, new = write_tokenizers(tmp_path)
    shutil.copytree(base, model, dirs_exist_ok=True)
    megatron, wider, back, resized = (tmp_path / name for name in ("megatron", "wider", "back", "resized"))
    peaks = [
        run_tool("convert_checkpoint", "--source", model, "--to", "megatron", "--output", megatron),
        run_tool("resize_vocab", "--model", megatron, "--tokenizer", new, "--output", wider),
        run_tool("convert_checkpoint", "--source", wider, "--to", "hf", "--output", back),
        run_tool("resize_vocab", "--model", model, "--tokenizer", new, "--output", resized),
    ]
    _logger.info("peaks in GB: %s", peaks)
    weights = 2 * shape.num_parameters
    assert count_bytes(megatron) == pytest.approx(weights + 2 * PADDING, rel=5e-3)
    for folder in (wider, back, resized):
        assert count_bytes(folder) == pytest.approx(weights + 2 * ROWS, rel=5e-3)
    assert max(peaks[0], peaks[2]) < 0.4, "three slices"
    assert max(peaks[1], peaks[3]) < 0.7, "a chunk of new rows and three slices"
