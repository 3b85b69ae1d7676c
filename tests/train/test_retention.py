"""Which checkpoints go, and that none of them is ever half there."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_adapt.checkpoint.root import list_steps, name_iteration
from megatron_adapt.config import TrainSettings
from megatron_adapt.errors import ConfigError
from megatron_adapt.train import retention
from megatron_adapt.train.retention import Retention, remove_old, sweep


def make_iterations(root, *steps):
    for step in steps:
        folder = root / name_iteration(step)
        folder.mkdir(parents=True)
        for name in (".metadata", "values"):
            (folder / name).write_bytes(b"")


@given(st.sets(st.integers(1, 60), min_size=1).map(sorted), st.data())
def test_the_latest_the_last_and_the_multiples_stay(steps, data):
    latest = data.draw(st.sampled_from(steps))
    keep, interval = data.draw(st.integers(1, 5)), data.draw(st.integers(0, 7))
    old = Retention(keep, interval).choose_old(steps, latest)
    past = [step for step in steps if step <= latest]
    assert latest not in old
    assert not set(old) & {*past[-keep:], *(step for step in steps if step > latest)}
    left = set(past[:-keep]) - set(old)
    assert left == {step for step in past[:-keep] if interval and step % interval == 0}


def test_all_stay_by_default():
    assert Retention().choose_old([1, 2, 3], 3) == []


def test_old_checkpoints_go_and_others_stay(tmp_path):
    make_iterations(tmp_path, 2, 4, 6, 8, 10)
    (tmp_path / "hf").mkdir()
    remove_old(tmp_path, 8, Retention(1, 4))
    assert list_steps(tmp_path) == [4, 8, 10]
    assert sorted(path.name for path in tmp_path.iterdir())[0] == "hf"


def test_a_kill_while_deleting_leaves_no_half_of_a_checkpoint(tmp_path, monkeypatch):
    make_iterations(tmp_path, 1, 2)

    def die(folder, **_):
        if folder.exists():
            (folder / "values").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(retention.shutil, "rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            remove_old(tmp_path, 2, Retention(1))
    assert list_steps(tmp_path) == [2]
    assert not (tmp_path / name_iteration(1)).exists()
    (tmp_path / ".iter_0000003.0a1b2c3d.partial").mkdir()
    (tmp_path / ".iter_0000003.partial").mkdir()
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["iter_0000002"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_last": -1}, "keep_last: -1 is below 0"),
        ({"save_retain_interval": 1000}, "save_retain_interval: 1000 has no effect without keep_last; add it"),
        ({"keep_last": 1, "save_retain_interval": 750}, "750 is not a multiple of save_interval 500; make it one"),
    ],
)
def test_settings_without_sense_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        TrainSettings(**settings)
