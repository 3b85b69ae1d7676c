"""What a record of a stage keeps of its settings, and what an older record means."""

import pytest

from megatron_adapt.config import StageSettings, TrainSettings
from megatron_adapt.run_folder import describe_training, find_change

STAGE = StageSettings(name="warm", tokens=1, blend={"en": 1.0})
NARROW = {
    "exp_avg_dtype": "bf16",
    "exp_avg_sq_dtype": "bf16",
    "fp8": "hybrid",
    "fp8_recipe": "mxfp8",
}


@pytest.mark.parametrize("name", NARROW)
def test_types_that_decide_the_weights_are_kept_and_left_out_at_their_default(name):
    settings = {key: value for key, value in NARROW.items() if key.startswith("fp8") or key == name}
    described = describe_training(STAGE, TrainSettings(transformer_impl="transformer_engine", **settings))["train"]
    assert described[name] == NARROW[name]
    plain = describe_training(STAGE, TrainSettings())["train"]
    assert not set(NARROW) & set(plain)


def test_how_the_layers_are_built_is_not_kept():
    other = TrainSettings(transformer_impl="transformer_engine", tensor_model_parallel_size=2)
    assert describe_training(STAGE, other) == describe_training(STAGE, TrainSettings())


@pytest.mark.parametrize("name", NARROW)
def test_a_checkpoint_of_before_there_were_these_types_had_their_defaults(name):
    default = getattr(TrainSettings(), name)
    assert find_change({}, {name: default}) is None
    assert find_change({}, {name: NARROW[name]}) == (name, default, NARROW[name])
