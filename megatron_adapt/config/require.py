"""The one check of a setting's value."""

from megatron_adapt.errors import ConfigError


def require(holds: bool, message: str) -> None:
    """Raise ``ConfigError`` with ``message`` unless ``holds``."""
    if not holds:
        raise ConfigError(message)
