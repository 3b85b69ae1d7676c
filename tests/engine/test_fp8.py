"""FP8 reaches megatron-core's config under its own names, or is refused with what is missing."""

import typing
from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_adapt.config import Layout
from megatron_adapt.engine import fp8, llama
from megatron_adapt.engine.fp8 import check_fp8
from megatron_adapt.engine.parallel import start_engine
from megatron_adapt.errors import EngineError
from tests.engine.test_llama import SHAPE, build

RECIPES = typing.get_args(typing.get_type_hints(Layout)["fp8_recipe"])


def make_layout(**settings):
    return Layout(transformer_impl="transformer_engine", **{"fp8": "hybrid", **settings})


def pretend(monkeypatch, capability):
    monkeypatch.setattr(fp8, "HAVE_TE", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)


def test_without_transformer_engine_it_is_refused(monkeypatch):
    monkeypatch.setattr(fp8, "HAVE_TE", False)
    message = (
        r'^train\.fp8: "hybrid" runs in Transformer Engine, which is not installed here; install .*, or use "none"$'
    )
    with start_engine(Layout(), seed=1), pytest.raises(EngineError, match=message):
        build(make_layout())


@pytest.mark.parametrize(
    ("recipe", "capability", "needed", "here"),
    [
        ("tensorwise", None, "8.9", "there is no GPU"),
        ("tensorwise", (8, 0), "8.9", "the GPU has 8.0"),
        ("blockwise", (8, 9), "9.0", "the GPU has 8.9"),
        ("mxfp8", (9, 0), "10.0", "the GPU has 9.0"),
    ],
)
def test_a_gpu_without_it_is_refused(monkeypatch, recipe, capability, needed, here):
    pretend(monkeypatch, capability)
    message = (
        rf'^train\.fp8: "e4m3" with recipe "{recipe}" needs a GPU of compute capability {needed}, and {here}; .*"none"$'
    )
    with pytest.raises(EngineError, match=message):
        check_fp8(make_layout(fp8="e4m3", fp8_recipe=recipe))


@pytest.mark.parametrize(
    ("recipe", "capability"),
    [("tensorwise", (8, 9)), ("tensorwise", (9, 0)), ("blockwise", (9, 0)), ("mxfp8", (10, 0))],
)
def test_a_gpu_that_has_it_is_not(monkeypatch, recipe, capability):
    pretend(monkeypatch, capability)
    check_fp8(make_layout(fp8_recipe=recipe))


def test_none_asks_for_nothing(monkeypatch):
    pretend(monkeypatch, None)
    check_fp8(Layout())


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["e4m3", "hybrid"])
def test_the_settings_reach_the_config_of_the_engine(monkeypatch, name, recipe):
    made = []

    def take_config(shape, config, *rest):
        made.append(config)
        return SimpleNamespace()

    monkeypatch.setattr(llama, "check_fp8", lambda layout: None)
    monkeypatch.setattr(llama, "_build_chunk", take_config)
    with start_engine(Layout(), seed=1):
        for layout in (make_layout(fp8=name, fp8_recipe=recipe), Layout()):
            llama.build_chunks(SHAPE, padded_vocab_size=128, layout=layout, seq_length=16, bf16=True)
    assert [(config.fp8, config.fp8_recipe) for config in made] == [(name, recipe), (None, "tensorwise")]
    known = typing.get_type_hints(TransformerConfig)
    # What megatron-core itself calls them.
    assert name in typing.get_args(typing.get_args(known["fp8"])[0])
    assert recipe in typing.get_args(typing.get_args(known["fp8_recipe"])[0])


def test_every_recipe_has_its_capability():
    assert set(fp8._CAPABILITIES) == set(RECIPES)
