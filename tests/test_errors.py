import pytest

from megatron_adapt.errors import AdaptError, CheckpointError, ConfigError, DataError, EngineError


@pytest.mark.parametrize("kind", [ConfigError, DataError, CheckpointError, EngineError])
def test_one_except_catches_every_mistake_of_a_user(kind):
    with pytest.raises(AdaptError, match=r"^where: what; remedy$"):
        raise kind("where: what; remedy")


@pytest.mark.parametrize("kind", [ConfigError, DataError, CheckpointError])
def test_wrong_input_is_also_a_value_error(kind):
    assert issubclass(kind, ValueError)
    assert not issubclass(EngineError, ValueError)
