import pytest

from megatron_adapt.errors import AdaptError, CheckpointError, ConfigError, DataError, EngineError


@pytest.mark.parametrize("kind", [ConfigError, DataError, CheckpointError, EngineError])
def test_one_except_catches_every_mistake_of_a_user(kind):
    with pytest.raises(AdaptError, match=r"^where: what; remedy$"):
        raise kind("where: what; remedy")


def test_a_wrong_setting_is_no_value_error():
    """The flag parser catches ValueError and would show its own box instead of our line."""
    assert not issubclass(ConfigError, ValueError)
