"""TensorBoard and Weights & Biases get the rows of metrics.jsonl, step by step, over a resume."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_adapt.config import TrainSettings
from megatron_adapt.errors import ConfigError
from megatron_adapt.train.sinks import WANDB_FILE, check_sinks, flatten_row, open_sinks

ROW = {"step": 2, "loss": 1.5, "objective": "x", "tokens": {"en": 3, "xx/a": 4}, "mfu": 0.25}


class FakeBoard:
    """Stands for ``torch.utils.tensorboard``; keeps the calls."""

    def __init__(self):
        self.calls = []

    def SummaryWriter(self, **settings):
        self.calls.append(("open", settings))
        return SimpleNamespace(
            add_scalar=lambda *args: self.calls.append(args),
            flush=lambda: self.calls.append("flush"),
            close=lambda: self.calls.append("close"),
        )


class FakeWandb:
    """Stands for ``wandb``; keeps the calls."""

    def __init__(self):
        self.calls = []

    def init(self, **settings):
        self.calls.append(("init", settings))
        return SimpleNamespace(
            define_metric=lambda name, **settings: self.calls.append(("define", name, settings)),
            log=lambda row: self.calls.append(("log", row)),
            finish=lambda exit_code: self.calls.append(("finish", exit_code)),
        )


@pytest.fixture
def fakes(monkeypatch):
    board, wandb = FakeBoard(), FakeWandb()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return board, wandb


def test_every_number_of_a_row_has_a_name():
    assert dict(flatten_row(ROW)) == {"step": 2.0, "loss": 1.5, "tokens/en": 3.0, "tokens/xx/a": 4.0, "mfu": 0.25}


def test_nothing_is_opened_or_imported_unasked(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    check_sinks(TrainSettings())
    assert open_sinks(TrainSettings(), "first", tmp_path, 0, {}) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"tensorboard_dir": Path("board")},
            r"train\.tensorboard_dir: needs tensorboard, which is not installed; .*log",
        ),
        (
            {"wandb_project": "p"},
            r"train\.wandb_project: needs wandb, which is not installed; .*adapt\[log\]', or leave",
        ),
    ],
)
def test_a_missing_package_is_named_with_the_setting(settings, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=message):
        check_sinks(TrainSettings(**settings))


def test_tensorboard_has_a_folder_per_stage_and_hides_what_is_done_again(fakes, tmp_path):
    board, _ = fakes
    settings = TrainSettings(tensorboard_dir=tmp_path / "board")
    check_sinks(settings)
    for first in (0, 3):
        (sink,) = open_sinks(settings, "first", tmp_path / "run", first, {})
        sink.write(first + 1, {"loss": 1.5})
        sink.close(failed=False)
    folder = str(tmp_path / "board" / "first")
    assert board.calls == [
        ("open", {"log_dir": folder, "purge_step": 0}), ("loss", 1.5, 1), "flush", "close",
        ("open", {"log_dir": folder, "purge_step": 4}), ("loss", 1.5, 4), "flush", "close",
    ]  # fmt: skip


def test_wandb_goes_on_in_the_run_of_the_stage_and_begins_a_new_one_with_it(fakes, tmp_path):
    _, wandb = fakes
    root = tmp_path / "arabic" / "checkpoints" / "first"
    root.mkdir(parents=True)
    ids = []
    for first, failed in ((0, True), (3, False), (0, False)):
        (sink,) = open_sinks(TrainSettings(wandb_project="p"), "first", root, first, {"lr": 1.0})
        ids.append(json.loads((root / WANDB_FILE).read_text())["run_id"])
        sink.write(first + 1, {"loss": 1.5})
        sink.close(failed=failed)
    assert ids[0] == ids[1] != ids[2]
    inits = [call[1] for call in wandb.calls if call[0] == "init"]
    assert [call["id"] for call in inits] == ids
    del inits[0]["id"]
    assert inits[0] == {
        "project": "p", "name": "arabic-first", "resume": "allow", "dir": str(root), "config": {"lr": 1.0}
    }  # fmt: skip
    assert [call[1] for call in wandb.calls if call[0] == "log"] == [{"step": at, "loss": 1.5} for at in (1, 4, 1)]
    assert [call[1] for call in wandb.calls if call[0] == "finish"] == [1, 0, 0]
    # Its own counter does not go back; ours is what is drawn over.
    assert ("define", "*", {"step_metric": "step"}) in wandb.calls
