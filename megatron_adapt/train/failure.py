"""Which rank failed first, and of what: the traceback that torchrun shows as the root cause.

torchrun ends a job when one rank has failed, and names as its cause the earliest of the error files that ranks have
written (``TORCHELASTIC_ERROR_FILE``), by seconds. All others fail too, for the connection is closed by their peer,
often within the same second and with longer texts. A rank whose error is only that waits before it speaks: torchrun
ends it meanwhile, without a word.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

_PATIENCE_SECONDS = 20


@contextmanager
def record_failure() -> Iterator[None]:
    """Name the rank in an exception that leaves the block, and write it down for torchrun."""
    try:
        yield
    except Exception as error:
        if "RANK" in os.environ:
            error.add_note(f"(on rank {os.environ['RANK']})")
        if dist.is_torchelastic_launched() and _is_of_a_peer(error):
            time.sleep(_PATIENCE_SECONDS)
        get_error_handler().record_exception(error)
        raise


def _is_of_a_peer(error: Exception) -> bool:
    """Tell whether an error says that another rank is gone; of gloo it has no class of its own."""
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and "gloo" in str(error))
