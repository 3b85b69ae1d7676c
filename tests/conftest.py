"""Settings of every test."""

import logging
import os
from collections.abc import Iterator

import pytest

# Before anything imports torch: as ``flags`` sets it for the tools, or a busy machine makes the tests ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Before anything imports triton, as megatron-core does: tl.max and others are kernels themselves, and are made
# for the interpreter or for a GPU then. On a GPU: TRITON_INTERPRET=0.
os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that hold slow tests: workers take whole files, and one would end the run alone."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """One small English tokenizer of each family; not to be written to."""
    # Here, as most tests need no tokenizer.
    from tests.tokenizer.bases import learn_base

    root = tmp_path_factory.mktemp("bases")
    return {kind: learn_base(root / kind, kind) for kind in ("byte_level", "sentencepiece")}


@pytest.fixture(autouse=True)
def _reset_package_logger() -> Iterator[None]:
    """Undo ``setup_logging``, of a test or of what a module shares.

    Its handler would hold on to the captured stderr of a test that has ended, and pytest takes a record twice of a
    logger that propagates again.
    """
    _reset_logger()
    yield
    _reset_logger()


def _reset_logger() -> None:
    logger = logging.getLogger("megatron_adapt")
    logger.handlers[:], logger.propagate = [], True
    logger.setLevel(logging.NOTSET)
