"""Report values that are not finite while a model is copied; they are copied all the same."""

import logging
import threading

import torch

_logger = logging.getLogger(__name__)
_MAX_TENSORS, _MAX_ROWS = 20, 5


class FiniteWatch:
    """Looks at the slices of a model and warns once per tensor, with the rows; may be used by several threads."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._lock = threading.Lock()
        self._warned: set[str] = set()

    def check(self, name: str, first_row: int, rows: torch.Tensor) -> None:
        """Warn if a value is NaN or infinite.

        Args:
            name: the tensor.
            first_row: number of its first row in ``rows``.
            rows: [N, ...]; the warning names the rows of this slice that are damaged.
        """
        if not rows.is_floating_point():
            return
        low, high = rows.aminmax()  # NaN passes through both; no memory beyond the slice
        if low.isfinite() and high.isfinite():
            return
        is_bad_N = ~rows.isfinite().reshape(len(rows), -1).all(-1)
        found = [first_row + int(at) for at in is_bad_N.nonzero()[:, 0]]
        with self._lock:
            if not found or name in self._warned or len(self._warned) == _MAX_TENSORS:
                return
            self._warned.add(name)
        more = f" and {len(found) - _MAX_ROWS} more" if len(found) > _MAX_ROWS else ""
        listed = ", ".join(map(str, found[:_MAX_ROWS]))
        _logger.warning(
            "%s: %s has values that are not finite in rows %s%s; they are kept, and training would spread them",
            *(self._where, name, listed, more),
        )
