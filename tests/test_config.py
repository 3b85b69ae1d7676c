import math
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from megatron_adapt import config
from megatron_adapt.config import (
    BaseSettings,
    CheckpointSettings,
    CorpusSettings,
    DataSettings,
    EvaluateSettings,
    StageSettings,
    TokenizerSettings,
    TrainSettings,
)
from megatron_adapt.errors import ConfigError
from megatron_adapt.recipe import Recipe

CLASSES = [item for item in vars(config).values() if isinstance(item, type) and is_dataclass(item)]


def make_stage(**changes):
    return StageSettings(**{"name": "warm", "tokens": 1000, "blend": {"en": 1.0}, **changes})


def make_distilling(**changes):
    return make_stage(objective="token_distillation", trainable="new_rows", **changes)


def make_recipe(**changes):
    values = {
        "work_dir": Path("run"),
        "old_languages": ("en",),
        "new_languages": ("ja",),
        "corpus": {"en": ("en.jsonl",), "ja": ("ja.jsonl",)},
        "base_model": Path("base"),
    }
    return Recipe(**{**values, **changes})


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_configs_are_frozen_and_keyword_only(kind):
    parameters = kind.__dataclass_params__
    assert parameters.frozen
    assert all(item.kw_only for item in fields(kind))
    assert kind.__doc__


@pytest.mark.parametrize("value", [0.0, 1.0, -0.5])
def test_valid_share_is_a_share(value):
    with pytest.raises(ConfigError, match=rf"^prepare\.valid_share: {value} is not between 0 and 1$"):
        CorpusSettings(valid_share=value)


@pytest.mark.parametrize("size", ["", "0", "extend", "extend0", "100%", "-3"])
def test_a_size_is_a_number_or_a_percentage(size):
    with pytest.raises(ConfigError, match=r"^tokenizer\.size: .* is no size; use a number or extend100$"):
        TokenizerSettings(size=size)
    TokenizerSettings(size="32000")
    TokenizerSettings(size="extend25")


@pytest.mark.parametrize(
    ("name", "value", "methods"),
    [
        ("segmenter", "fugashi", "continue merge replace optimize"),
        ("scores", "zero", "merge"),
        ("model", "unigram", "replace"),
        ("old_share", 0.3, "replace optimize"),
        ("kept_share", 0.3, "optimize"),
    ],
)
def test_a_setting_that_the_method_does_not_read_is_refused(name, value, methods):
    for method in ("continue", "merge", "replace", "optimize", "transplant"):
        if method in methods.split():
            assert getattr(TokenizerSettings(method=method, **{name: value}), name) == value
            continue
        use = " or ".join(methods.split())
        message = rf"^tokenizer\.{name}: '?{value}'? has no effect with method {method}; leave it out, or use {use}$"
        with pytest.raises(ConfigError, match=message):
            TokenizerSettings(method=method, **{name: value})


def make_transplant(**changes):
    return TokenizerSettings(**{"method": "transplant", "donor": Path("donor"), **changes})


def test_a_donor_is_for_transplant_and_transplant_needs_one():
    assert make_transplant(size="500", scripts=("Arabic",), min_frequency=3).donor == Path("donor")
    with pytest.raises(ConfigError, match=r"^tokenizer\.donor: missing; name the folder of the tokenizer whose pieces"):
        make_transplant(donor=None)
    with pytest.raises(ConfigError, match=r"^tokenizer\.donor: .* has no effect with method merge; leave it out"):
        make_transplant(method="merge")
    with pytest.raises(ConfigError, match=r"^tokenizer\.adopt: True has no effect with method continue; leave it out"):
        make_transplant(method="continue", donor=None, adopt=True)


@pytest.mark.parametrize(
    ("name", "value"), [("size", "500"), ("size_multiple", 64), ("scripts", ("Arabic",)), ("min_frequency", 3)]
)
def test_a_donor_taken_whole_leaves_nothing_to_choose(name, value):
    assert make_transplant(adopt=True, max_drift=0.5).adopt
    with pytest.raises(ConfigError, match=rf"^tokenizer\.{name}: .* has no effect with adopt, which takes the donor"):
        make_transplant(adopt=True, **{name: value})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TokenizerSettings(min_frequency=0), r"tokenizer\.min_frequency: 0 is below 1; use 2"),
        (lambda: CheckpointSettings(vocab_pad_multiple=0), r"checkpoint\.vocab_pad_multiple: 0 is below 1; use 1024"),
        (lambda: DataSettings(workers=0), r"data\.workers: 0 is below 1; use the number of cores"),
        (lambda: EvaluateSettings(seq_length=0), r"evaluate\.seq_length: 0 is below 1"),
        (lambda: EvaluateSettings(batch_size=0), r"evaluate\.batch_size: 0 is below 1"),
        (lambda: TrainSettings(micro_batch_size=0), r"train\.micro_batch_size: 0 is below 1"),
        (lambda: TrainSettings(stages=(make_stage(), make_stage())), r"train\.stages: a name occurs twice in .*rename"),
        (lambda: make_stage(tokens=0), r"train\.stages warm: tokens 0 is not positive"),
        (lambda: make_stage(blend={}), r"train\.stages warm: blend is empty; name at least one language"),
        (lambda: make_stage(name="a b"), r"train\.stages a b: the name must be a plain word"),
        (lambda: make_stage(blend={"en": 0.0}), r"train\.stages warm: blend\.en 0\.0 is not positive; leave the"),
        (lambda: make_stage(lr=1e-4, min_lr=1e-3), r"train\.stages warm: lr 0\.0001 and min_lr 0\.001 must fall"),
        (lambda: make_stage(lr_warmup_fraction=1.0), r"train\.stages warm: lr_warmup_fraction 1\.0 is not between"),
        (lambda: make_recipe(corpus={"en": ("a",)}), r"corpus: no files for 'ja'; add corpus\.ja to the recipe"),
        (
            lambda: make_recipe(train=TrainSettings(stages=(make_stage(blend={"de": 1.0}),))),
            r"train\.stages warm: blend\.de is not among old_languages and new_languages",
        ),
        (lambda: make_recipe(new_languages=("en", "ja")), r"new_languages: 'en' is among old_languages too; keep it"),
        (
            lambda: make_recipe(train=TrainSettings(stages=(make_stage(name="resized"),))),
            r"train\.stages resized: the name is taken by another model; rename the stage",
        ),
        (lambda: make_stage(name=".."), r"train\.stages \.\.: the name must be a plain word"),
        (lambda: BaseSettings(num_attention_heads=0), r"base\.num_attention_heads: 0 is below 1"),
        (lambda: TrainSettings(adam_eps=0.0), r"train\.adam_eps: 0\.0 is not positive, and what has no .*; use 1e-8"),
        (lambda: TrainSettings(z_loss=-1e-4), r"train\.z_loss: -0\.0001 is no number from 0; 1e-4 is usual, 0 is none"),
        (lambda: TrainSettings(z_loss=math.nan), r"train\.z_loss: nan is no number from 0"),
        (
            lambda: make_recipe(train=TrainSettings(z_loss=1e-4, stages=(make_distilling(),))),
            r"train\.z_loss: 0\.0001 has no effect, all stages are token_distillation, which has no softmax; leave it",
        ),
        (lambda: TrainSettings(stop_after_steps=-1), r"train\.stop_after_steps: -1 is below 0"),
        (lambda: TrainSettings(device_hour_price=-0.5), r"train\.device_hour_price: -0\.5 is below 0"),
        (lambda: TrainSettings(max_skipped_steps=-1), r"train\.max_skipped_steps: -1 is below 0"),
        (lambda: TrainSettings(step_timeout_in_mins=-1), r"train\.step_timeout_in_mins: -1 is below 0"),
        (
            lambda: TrainSettings(loss_spike_factor=0.5),
            r"train\.loss_spike_factor: 0\.5 is no number from 1; 6 is usual",
        ),
        (lambda: TrainSettings(loss_spike_factor=math.inf), r"train\.loss_spike_factor: inf is no number from 1"),
    ],
)
def test_a_wrong_value_is_named_with_its_setting(make, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        make()


def test_right_values_are_accepted():
    stage = make_stage(lr_warmup_fraction=0.0)
    assert make_recipe(train=TrainSettings(stages=(stage, make_stage(name="full")))).train.stages[0] == stage
    assert make_recipe(base_model=None, base=BaseSettings(), base_train=stage).base == BaseSettings()


def test_a_z_loss_may_be_that_of_other_stages_than_a_distillation():
    stages = (make_distilling(), make_stage(name="next"))
    assert make_recipe(train=TrainSettings(z_loss=1e-4, stages=stages)).train.z_loss == 1e-4
    make_recipe(train=TrainSettings(z_loss=1e-4, stages=stages[:1]), base_train=make_stage(name="from_scratch"))
