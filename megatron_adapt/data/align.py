"""Windows that begin where documents begin.

The tokens of a source are cut into windows of different use but equal length: a window begins at a document, or inside
one that is longer than a window; the next begins at the last document that begins in it. What a window holds of that
document bears no loss there, for the next window reads it again, whole. So every token but the first is a target with
loss once an epoch, and no tail is dropped.

Costs: 8 bytes a window in memory, and the share of targets without loss: about half a document a window (C++ twin:
``csrc/windows.cpp``). All epochs are cut alike.
"""

import numpy as np
from numpy.typing import NDArray

try:
    import megatron_adapt._csrc as _csrc
except ImportError:  # built without a compiler
    _csrc = None


def cut_documents(starts_D1: NDArray[np.int64], seq_length: int) -> NDArray[np.int64]:
    """Return the first token of each of W windows, and the last token of the source, ``[W + 1]``.

    Args:
        starts_D1: first token of each document, and the number of tokens, at least 2.
        seq_length: tokens to predict in a window.
    """
    if _csrc is None:
        return cut_documents_twin(starts_D1, seq_length)
    starts_W1: NDArray[np.int64] = _csrc.cut_documents(np.ascontiguousarray(starts_D1, np.int64), seq_length)
    return starts_W1


def cut_documents_twin(starts_D1: NDArray[np.int64], seq_length: int) -> NDArray[np.int64]:
    """Do what ``cut_documents`` does in Python."""
    last = int(starts_D1[-1]) - 1
    found = [0]
    while found[-1] < last:
        end = found[-1] + seq_length
        document = int(starts_D1[np.searchsorted(starts_D1, end, side="right") - 1])
        found.append(last if end >= last else document if document > found[-1] else end)
    return np.array(found, np.int64)


def mask_targets(starts_W1: NDArray[np.int64], windows_N: NDArray[np.int64], seq_length: int) -> NDArray[np.bool_]:
    """Return which targets of windows bear loss, ``[N, T]``: those up to the first token of the next window."""
    num_targets_N = starts_W1[windows_N + 1] - starts_W1[windows_N]
    mask_NT: NDArray[np.bool_] = np.arange(seq_length) < num_targets_N[:, None]
    return mask_NT
