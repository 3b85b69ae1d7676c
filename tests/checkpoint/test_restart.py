"""A conversion that is killed at any moment and started again ends with the bytes of one that was never killed."""

import time
from collections import namedtuple

import pytest
import torch

from megatron_adapt.checkpoint import convert, resume, slices
from megatron_adapt.checkpoint.convert import convert_checkpoint
from megatron_adapt.checkpoint.hf import HFFolder
from megatron_adapt.config import CheckpointSettings, ConvertCheckpoint
from megatron_adapt.errors import CheckpointError, ConfigError
from tests.helpers.kills import check_kills, read_files, run_with_kills
from tests.helpers.tiny import write_llama

SETUP = """
from megatron_adapt.checkpoint.convert import convert_checkpoint as work
from megatron_adapt.config import CheckpointSettings, ConvertCheckpoint

config = ConvertCheckpoint(
    source=Path({source!r}), to={to!r}, output=Path({output!r}), settings=CheckpointSettings(vocab_pad_multiple=64)
)
"""


def _kill_at(tmp_path, to, num_moments, seed):
    write_llama(tmp_path / "hf", dtype=torch.bfloat16, max_shard_size="20KB")
    source, output = tmp_path / "hf", tmp_path / "out"
    if to == "hf":
        run_with_kills(SETUP.format(source=str(source), to="megatron", output=str(tmp_path / "megatron")), 0)
        source = tmp_path / "megatron.0"
    check_kills(SETUP.format(source=str(source), to=to, output=str(output)), output, num_moments, seed)


@pytest.mark.parametrize("to", ["megatron", "hf"])
def test_killed_at_three_moments(tmp_path, to):
    _kill_at(tmp_path, to, 3, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["megatron", "hf"])
def test_killed_at_twenty_moments(tmp_path, to):
    _kill_at(tmp_path, to, 20, seed=2)


@pytest.fixture
def small_slices(monkeypatch):
    for name, size in (("SLICE_BYTES", 2000), ("SAVE_BYTES", 4000), ("NUM_THREADS", 1)):
        monkeypatch.setattr(slices, name, size)


def _config(tmp_path, **changes):
    settings = CheckpointSettings(vocab_pad_multiple=64)
    values = {"source": tmp_path / "hf", "to": "megatron", "output": tmp_path / "out", "settings": settings}
    return ConvertCheckpoint(**{**values, **changes})


def _stop_after(monkeypatch, num_slices, error):
    """Let ``num_slices`` slices be read, then raise; return the list of slices that were read."""
    read, calls = HFFolder.read_rows, []

    def read_some(self, name, start, stop, buffer=None):
        if buffer is not None:
            if len(calls) == num_slices:
                time.sleep(0.5)  # for the thread that notes how far the work is
                raise error
            calls.append((name, start))
        return read(self, name, start, stop, buffer)

    monkeypatch.setattr(HFFolder, "read_rows", read_some)
    return calls


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch, small_slices):
    write_llama(tmp_path / "hf")
    with monkeypatch.context() as patch:
        first = _stop_after(patch, 40, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            convert_checkpoint(_config(tmp_path))
    with monkeypatch.context() as patch:
        second = _stop_after(patch, None, None)
        convert_checkpoint(_config(tmp_path))
    assert len(first) == 40
    assert len(set(first) & set(second)) <= 4, "done again"
    convert_checkpoint(_config(tmp_path, output=tmp_path / "whole"))
    for file in (tmp_path / "whole" / "release").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / "release" / file.name).read_bytes()


@pytest.mark.parametrize("change", ["settings", "source", "folder"])
def test_another_plan_begins_anew(tmp_path, monkeypatch, small_slices, change):
    write_llama(tmp_path / "hf")
    with monkeypatch.context() as patch:
        _stop_after(patch, 20, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            convert_checkpoint(_config(tmp_path))
    changes = {}
    if change == "settings":
        changes["settings"] = CheckpointSettings(vocab_pad_multiple=64, dtype="bfloat16")
    elif change == "source":
        write_llama(tmp_path / "hf", seed=5)
    else:
        (tmp_path / ".out.partial").rename(tmp_path / "elsewhere")
    convert_checkpoint(_config(tmp_path, verify=True, **changes))


def test_a_full_disk_keeps_what_was_written_and_says_so(tmp_path, monkeypatch, small_slices):
    write_llama(tmp_path / "hf")
    with monkeypatch.context() as patch:
        _stop_after(patch, 20, OSError(28, "No space left on device"))
        with pytest.raises(CheckpointError, match=r"out: stopped by '.*No space left .*'; .* in \.out\.partial, st"):
            convert_checkpoint(_config(tmp_path))
    assert not (tmp_path / "out").exists()
    convert_checkpoint(_config(tmp_path, verify=True))


@pytest.mark.parametrize("begun", [False, True])
def test_too_little_space_is_one_line_before_the_first_byte(tmp_path, monkeypatch, small_slices, begun):
    write_llama(tmp_path / "hf")
    if begun:
        with monkeypatch.context() as patch:
            _stop_after(patch, 20, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                convert_checkpoint(_config(tmp_path))
    before = sorted(tmp_path.rglob("*"))
    usage = namedtuple("Usage", "free")(12_345)
    monkeypatch.setattr(resume.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConfigError, match=r"--output: .*out takes [\d.]+ GB more, 1\.23e-05 GB are free there; free"):
        convert_checkpoint(_config(tmp_path))
    assert sorted(tmp_path.rglob("*")) == before


def test_two_runs_never_write_one_output(tmp_path, monkeypatch):
    write_llama(tmp_path / "hf")

    def convert_again(*args, **kwargs):
        convert_checkpoint(_config(tmp_path))

    monkeypatch.setattr(convert, "stream_to_megatron", convert_again)
    with pytest.raises(ConfigError, match="out: another run is writing it; wait for it or name another output"):
        convert_checkpoint(_config(tmp_path))


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch, caplog):
    write_llama(tmp_path / "hf")

    def refuse(descriptor, operation):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(resume.fcntl, "flock", refuse)
    convert_checkpoint(_config(tmp_path))
    assert "this file system has no locks" in caplog.text


def test_a_mistake_leaves_nothing_to_go_on_with(tmp_path, monkeypatch):
    write_llama(tmp_path / "hf")

    def find_difference(*args, **kwargs):
        raise CheckpointError("x: differs")

    monkeypatch.setattr(convert, "_verify", find_difference)
    with pytest.raises(CheckpointError, match="x: differs"):
        convert_checkpoint(_config(tmp_path, verify=True))
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("to", ["megatron", "hf"])
def test_a_dry_run_prints_what_it_would_take_and_writes_nothing(tmp_path, monkeypatch, capsys, to):
    write_llama(tmp_path / "hf", max_shard_size="20KB")
    source = tmp_path / "hf"
    if to == "hf":
        source = tmp_path / "megatron"
        convert_checkpoint(_config(tmp_path, output=source))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    convert_checkpoint(_config(tmp_path, source=source, to=to, output=tmp_path / "new" / "out", dry_run=True))
    text = capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    for word in ("dry run", "read ", "write ", "free ", "memory ", "time ", "GB/s"):
        assert word in text
    monkeypatch.setattr(resume.shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(1))
    with pytest.raises(ConfigError, match="free there; free some"):
        convert_checkpoint(_config(tmp_path, source=source, to=to, output=tmp_path / "x", dry_run=True))


@pytest.mark.parametrize("to", ["megatron", "hf"])
def test_the_estimate_of_bytes_is_close_and_not_below(tmp_path, monkeypatch, to):
    settings = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    write_llama(tmp_path / "hf", **settings)
    source = tmp_path / "hf"
    if to == "hf":
        source = tmp_path / "megatron"
        convert_checkpoint(_config(tmp_path, output=source))
    sizes = []
    monkeypatch.setattr(convert, "write_estimate", lambda *args, num_bytes, **others: sizes.append(num_bytes))
    convert_checkpoint(_config(tmp_path, source=source, to=to, dry_run=True))
    convert_checkpoint(_config(tmp_path, source=source, to=to))
    written = sum(len(raw) for raw in read_files(tmp_path / "out").values())
    assert written <= sizes[0] <= written * 1.05 + (1 << 20)
