"""How a corpus is named: LANGUAGE, or LANGUAGE/SOURCE where a language has several."""

import re

_SOURCE = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def get_language(source: str) -> str:
    """Return the language of a source: what stands before the slash, or the whole name."""
    return source.partition("/")[0]


def is_source_name(name: str) -> bool:
    """Tell whether ``name`` is a plain word, or two with a slash between; it becomes part of paths."""
    return _SOURCE.fullmatch(name) is not None
