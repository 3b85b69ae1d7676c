"""Which implementation of the kernels runs: Triton's on a GPU, its torch twin elsewhere; a setting says otherwise.

Triton's kernels also run on a CPU, for tests alone: under ``TRITON_INTERPRET=1`` they are interpreted, if asked for.
"""

import functools
import importlib.util
import logging
import os
from typing import Literal

import torch

from megatron_adapt.errors import EngineError

Implementation = Literal["torch", "triton"]
_logger = logging.getLogger(__name__)


@functools.cache
def choose_kernels(asked: Literal["auto", "torch", "triton"]) -> Implementation:
    """Return what ``train.kernels`` means on this machine; say so once.

    Raises:
        EngineError: Triton was asked for, and it or what it runs on is missing.
    """
    obstacle = _find_obstacle(may_interpret=asked == "triton")
    if asked == "triton" and obstacle is not None:
        raise EngineError(f'train.kernels: "triton" does not run here, {obstacle}; mend that, or use "torch"')
    chosen: Implementation = "torch" if asked == "torch" or obstacle is not None else "triton"
    reason = "as train.kernels says" if asked != "auto" else obstacle or "a GPU and Triton are here"
    _logger.info("kernels: %s (%s)", chosen, reason)
    return chosen


def _find_obstacle(*, may_interpret: bool) -> str | None:
    """Say what keeps Triton's kernels from running here."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not torch.cuda.is_available() and not (may_interpret and os.environ.get("TRITON_INTERPRET") == "1"):
        return "there is no GPU"
    return None
