"""Checkpoints written beside the training, those that stay, and damaged ones; one rank, in this process."""

import functools
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_adapt.checkpoint.dist import DistReader
from megatron_adapt.checkpoint.root import LATEST_FILE, list_steps, write_latest
from megatron_adapt.errors import CheckpointError
from megatron_adapt.train import loop, state
from tests.helpers.runs import NUM_STEPS, copy_run, get_curve, make_run, train_stage
from tests.helpers.spawn import run_ranks

WRITE_ITEM, TRAIN_STEP = filesystem_async._write_item, loop.train_step


def get_root(recipe):
    return recipe.parent / "run" / "checkpoints" / "first"


def train_held(recipe, *flags, held_until=5, fails=False):
    """Train with ``async_save``; nothing of the first checkpoint is written before step ``held_until`` is done."""
    done, root = [], get_root(recipe)
    told = recipe.parent / "go"

    @functools.wraps(WRITE_ITEM)  # the engine looks at its parameters
    def write_item(*args, **kwargs):
        deadline = time.monotonic() + 300
        while not told.exists():
            assert time.monotonic() < deadline, "training waits for the checkpoint"
            time.sleep(0.02)
        return WRITE_ITEM(*args, **kwargs)

    def train_step(*args, **kwargs):
        report = TRAIN_STEP(*args, **kwargs)
        done.append(report)
        if len(done) == held_until:
            assert not (root / LATEST_FILE).exists()
            if fails:
                raise KeyError("another error")
            told.touch()
        return report

    filesystem_async._write_item, loop.train_step = write_item, train_step
    try:
        return train_stage(recipe, "first", "--train.async-save", *flags)
    finally:
        filesystem_async._write_item, loop.train_step = WRITE_ITEM, TRAIN_STEP


def holds(process, folder):
    """Tell whether a process has a file below a folder open."""
    with suppress(psutil.Error):
        return any(file.path.startswith(str(folder)) for file in process.open_files())
    return False


def check_equal(one, other):
    first, second = DistReader(one), DistReader(other)
    assert sorted(first.keys) == sorted(second.keys)
    assert any(key.startswith("optimizer.state.exp_avg_sq") for key in first.keys)
    for key in first.keys:
        assert torch.equal(first.read(key), second.read(key)), key
    assert first.read_common() == second.read_common()


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A run that saved every step at once, and kept the last two and every third."""
    recipe = make_run(tmp_path_factory.mktemp("kept"))
    flags = ["--train.save-interval", "1", "--train.keep-last", "2", "--train.save-retain-interval", "3"]
    return recipe, train_stage(recipe, "first", *flags)


def test_the_last_checkpoints_and_the_multiples_stay(kept):
    recipe, _ = kept
    root = get_root(recipe)
    assert list_steps(root) == [3, 5, 6]
    assert [path.name for path in root.iterdir() if path.name.startswith(".")] == []


def test_training_goes_on_while_a_checkpoint_of_the_same_values_is_written(kept, tmp_path):
    recipe, expected = kept
    copied = copy_run(recipe, tmp_path / "run")
    rows = train_held(copied)
    assert get_curve(rows) == get_curve(expected)
    assert list_steps(get_root(copied)) == [3, 6]
    for step in (3, 6):
        name = f"iter_{step:07d}"
        check_equal(get_root(copied) / name, get_root(recipe) / name)
        records = [(get_root(run) / name / "training.json").read_text() for run in (copied, recipe)]
        assert records[0] == records[1]


def test_an_error_gives_the_save_up_and_the_next_launch_starts_clean(kept, tmp_path):
    recipe, expected = kept
    copied = copy_run(recipe, tmp_path / "run")
    with pytest.raises(KeyError):
        train_held(copied, fails=True)
    root = get_root(copied)
    assert list_steps(root) == []
    assert not (root / LATEST_FILE).exists()
    deadline = time.monotonic() + 60
    while any(holds(process, root) for process in psutil.process_iter()):
        assert time.monotonic() < deadline, "a writer lives on"
    (copied.parent / "go").touch()
    rows = train_stage(copied, "first", "--train.async-save")
    assert get_curve(rows) == get_curve(expected)
    assert list_steps(root) == [3, 6]
    assert [path.name for path in root.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("flags", [[], ["--train.async-save"]], ids=["sync", "async"])
def test_a_full_disk_stops_the_run_and_names_the_step(kept, tmp_path, monkeypatch, flags):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    copied = copy_run(kept[0], tmp_path / "run")
    monkeypatch.setattr(filesystem_async, "_write_item", fail)
    with pytest.raises(CheckpointError, match=r"step 3 could not be written \(rank 0: .*No space left.*; make room"):
        train_stage(copied, "first", *flags)
    assert list_steps(get_root(copied)) == []
    assert not (get_root(copied) / LATEST_FILE).exists()


def test_a_disk_that_is_full_at_the_end_of_a_save_leaves_the_checkpoint_before(kept, tmp_path, monkeypatch):
    copied = copy_run(kept[0], tmp_path / "run")
    train_stage(copied, "first", "--train.stop-after-steps", "2")

    def fail(folder):
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr(state, "record_files", fail)
    with pytest.raises(CheckpointError, match=r"iter_0000003\..*\.partial: No space left on device; make room"):
        train_stage(copied, "first", "--train.async-save")
    assert list_steps(get_root(copied)) == [2]
    assert (get_root(copied) / LATEST_FILE).read_text() == "2"


def test_a_damaged_checkpoint_is_refused_and_the_run_goes_back_as_told(kept, tmp_path):
    recipe, expected = kept
    copied = copy_run(recipe, tmp_path / "run", trained=True)
    root = get_root(copied)
    (root / "stage.json").unlink()
    write_latest(root, 5)
    file = root / "iter_0000005" / "__0_1.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    told = rf"__0_1\.distcp: not the bytes .* write 3 into .*{LATEST_FILE} to go back to iter_0000003, which is whole"
    with pytest.raises(CheckpointError, match=told):
        train_stage(copied, "first")
    (root / LATEST_FILE).write_text("3")
    assert get_curve(train_stage(copied, "first")) == get_curve(expected)
    assert (root / LATEST_FILE).read_text() == str(NUM_STEPS)
    file = root / "iter_0000006" / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(
        CheckpointError, match=r"__0_0\.distcp: \d+ bytes, but \d+ were saved; restore the file, or make"
    ):
        train_stage(copied, "second", "--train.no-verify-checkpoint")


LAYOUT = ["--train.tensor-model-parallel-size", "2", "--train.bf16"]


@pytest.mark.slow
def test_two_ranks_save_beside_the_training_and_continue_exactly(tmp_path):
    straight = make_run(tmp_path / "straight")
    held = copy_run(straight, tmp_path / "held")
    expected = run_ranks(train_stage, 2, straight, "first", *LAYOUT)[0]
    run_ranks(train_held, 2, held, *LAYOUT, "--train.stop-after-steps", "5")
    assert list_steps(get_root(held)) == [3, 5]
    check_equal(get_root(held) / "iter_0000003", get_root(straight) / "iter_0000003")
    rows = run_ranks(train_stage, 2, held, "first", *LAYOUT)[0]
    assert get_curve(rows) == get_curve(expected)
    assert Path(get_root(held) / "iter_0000006" / "files.json").is_file()
