import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _keep_package_logger() -> Iterator[None]:
    """Undo ``setup_logging``: its handler would hold on to the captured stderr of a test that has ended."""
    logger = logging.getLogger("megatron_adapt")
    handlers, propagate, level = logger.handlers[:], logger.propagate, logger.level
    yield
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)
