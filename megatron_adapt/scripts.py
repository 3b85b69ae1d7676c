"""Unicode scripts by name, as classes of the ``regex`` package."""

import re
from collections.abc import Sequence

import regex

from megatron_adapt.errors import ConfigError


def make_script_class(scripts: Sequence[str], setting: str) -> str:
    """Return the inside of a character class for the named scripts.

    A character passes a script if its ``Script_Extensions`` name it.

    Raises:
        ConfigError: a name is no Unicode script; ``setting`` says where it was given.
    """
    for name in scripts:
        try:
            known = re.fullmatch(r"\w+", name) and regex.compile(rf"\p{{Script_Extensions={name}}}")
        except regex.error:
            known = None
        if not known:
            raise ConfigError(f"{setting}: {name!r} is no Unicode script; use names such as Arabic, Cyrillic, Han")
    return "".join(rf"\p{{Script_Extensions={name}}}" for name in scripts)
