"""Which implementation of the kernels runs, and what is said of it."""

import importlib.util
import logging

import pytest

from megatron_adapt.engine.kernels.dispatch import choose_kernels
from megatron_adapt.errors import EngineError


@pytest.fixture(autouse=True)
def _forget():
    choose_kernels.cache_clear()
    yield
    choose_kernels.cache_clear()


def set_machine(monkeypatch, *, gpu, triton, interpreted=False):
    find = importlib.util.find_spec
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: (triton or None) if name == "triton" else find(name)
    )  # fmt: skip
    monkeypatch.setenv("TRITON_INTERPRET", "1" if interpreted else "0")


@pytest.mark.parametrize(
    ("gpu", "triton", "interpreted", "expected"),
    [(True, True, False, "triton"), (True, False, False, "torch"), (False, True, False, "torch"),
     (False, True, True, "torch"), (False, False, True, "torch")],
)  # fmt: skip
def test_auto_takes_triton_where_it_runs(monkeypatch, gpu, triton, interpreted, expected):
    set_machine(monkeypatch, gpu=gpu, triton=triton, interpreted=interpreted)
    assert choose_kernels("auto") == expected


def test_triton_is_interpreted_where_it_is_asked_for(monkeypatch):
    set_machine(monkeypatch, gpu=False, triton=True, interpreted=True)
    assert choose_kernels("triton") == "triton"


def test_torch_is_taken_where_it_is_asked_for(monkeypatch):
    set_machine(monkeypatch, gpu=True, triton=True)
    assert choose_kernels("torch") == "torch"


@pytest.mark.parametrize(
    ("gpu", "triton", "match"), [(False, True, "there is no GPU"), (True, False, "the package triton is not installed")]
)
def test_triton_is_refused_where_it_does_not_run(monkeypatch, gpu, triton, match):
    set_machine(monkeypatch, gpu=gpu, triton=triton)
    with pytest.raises(EngineError, match=rf'train\.kernels: "triton" does not run here, {match}; mend that, or use'):
        choose_kernels("triton")


def test_the_choice_is_said_once(monkeypatch, caplog):
    set_machine(monkeypatch, gpu=True, triton=True)
    with caplog.at_level(logging.INFO, logger="megatron_adapt"):
        choose_kernels("auto")
        choose_kernels("auto")
    assert [record.getMessage() for record in caplog.records] == ["kernels: triton (a GPU and Triton are here)"]
