"""The errors a user can cause or mend.

Every message has one form: *where: what is wrong, with the value; what to do.* The tools print it as
one line and exit with code 2 (``flags.run_tool``).
"""


class AdaptError(Exception):
    """Base of all errors whose message is meant for the user."""


class ConfigError(AdaptError):
    """A recipe, a flag or a combination of settings is wrong."""


class DataError(AdaptError, ValueError):
    """A corpus, a tokenizer or a tokenised dataset is wrong."""


class CheckpointError(AdaptError, ValueError):
    """A checkpoint is incomplete, damaged or does not fit what it is used with."""


class EngineError(AdaptError, RuntimeError):
    """The training engine cannot do what was asked on this machine."""
