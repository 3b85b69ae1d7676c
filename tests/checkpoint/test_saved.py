import argparse
import collections
import enum
import io
import random
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_adapt.checkpoint.archive import Inert
from megatron_adapt.checkpoint.saved import Arguments, read_saved
from megatron_adapt.errors import CheckpointError
from tests.helpers.evil import MakesFolder


class _Kind(enum.Enum):
    ONE = 1


def _save(path: Path, content: object) -> object:
    torch.save(content, path)
    return read_saved(path)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_box_of_any_view_is_read(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("saved") / "x.pt"
    shape = [data.draw(st.integers(1, 5)) for _ in range(data.draw(st.integers(1, 3)))]
    skipped = data.draw(st.integers(0, 3))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.uint16]))
    storage = torch.randint(0, 1000, (skipped + torch.Size(shape).numel() + 2,)).to(dtype)
    tensor = storage[skipped : skipped + torch.Size(shape).numel()].view(shape)
    found = _save(path, {"whole": storage, "x": tensor})["x"]
    assert (found.spec.shape, found.spec.dtype) == (tuple(shape), dtype)
    begin = [data.draw(st.integers(0, n - 1)) for n in shape]
    end = [data.draw(st.integers(a + 1, n)) for a, n in zip(begin, shape, strict=True)]
    box = tuple(slice(a, b) for a, b in zip(begin, end, strict=True))
    assert torch.equal(found.read(begin, [b - a for a, b in zip(begin, end, strict=True)]), tensor[box])


def test_settings_and_states_of_a_run_are_read_whatever_their_classes(tmp_path):
    args = argparse.Namespace(num_layers=2, dtype=torch.bfloat16, kind=_Kind.ONE, path=tmp_path, sizes=[1, 2])
    content = {
        "args": args,
        "rng_state": [{"random": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}],
        "model": collections.OrderedDict(a=torch.nn.Parameter(torch.arange(3.0)), b=io.BytesIO(b"state")),
        "optimizer": {"state": collections.defaultdict(list, {0: [torch.ones(2)]}), "seen": {1, 2}},
        "rerun": types.SimpleNamespace(x=collections.deque([1, 2])),
        "iteration": 7,
    }
    content["model"]._metadata = {"version": 1}
    found = _save(tmp_path / "x.pt", content)
    assert isinstance(found["args"], Arguments)
    assert found["args"].num_layers == 2
    assert found["args"].dtype is torch.bfloat16
    assert found["args"].sizes == [1, 2]
    assert isinstance(found["args"].kind, Inert)
    assert found["iteration"] == 7
    assert found["model"]["a"].read((1,), (2,)).tolist() == [1.0, 2.0]
    assert isinstance(found["model"]["b"], Inert)


def test_code_that_a_file_names_does_not_run(tmp_path):
    found = _save(tmp_path / "x.pt", {"evil": MakesFolder(tmp_path / "ran"), "step": 3})
    assert found["step"] == 3
    assert isinstance(found["evil"], Inert)
    assert not (tmp_path / "ran").exists()


def test_a_tensor_with_strides_is_refused_when_it_is_read(tmp_path):
    found = _save(tmp_path / "x.pt", torch.randn(3, 4).t())
    with pytest.raises(CheckpointError, match=r"a tensor of shape \(4, 3\) is stored with strides; save it again"):
        found.read((0, 0), (4, 3))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"x\.pt: missing; the checkpoint is incomplete"):
        read_saved(tmp_path / "x.pt")


@pytest.mark.parametrize("form", ["cut", "old"])
def test_a_file_that_is_no_archive_is_refused(tmp_path, form):
    path = tmp_path / "x.pt"
    torch.save(torch.ones(100), path, _use_new_zipfile_serialization=form != "old")
    if form == "cut":
        path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match=r"x\.pt: no archive of torch\.save, or cut off"):
        read_saved(path)


@pytest.mark.parametrize("kind", ["other", "noise", "beyond"])
def test_a_damaged_archive_is_refused(tmp_path, kind):
    path = tmp_path / "x.pt"
    torch.save({"x": torch.ones(100)}, path)
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, raw in content.items():
            if name.endswith("data.pkl"):
                raw = b"noise" if kind == "noise" else raw
                name = "archive/other" if kind == "other" else name
            archive.writestr(name, raw[:-8] if kind == "beyond" and name.endswith("data/0") else raw)
    with pytest.raises(CheckpointError, match=r"x\.pt: damaged"):
        read_saved(path)
