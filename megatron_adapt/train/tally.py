"""Training loss of every source in bits per byte of text, summed beside the loss of a step.

Every rank reads every window, so the last pipeline stage knows by itself which source a row of a micro-batch is from.
A target that bears no loss, or stands for no text, counts neither as loss nor as bytes.

Costs: per micro-batch two sums over [B, T] and a product of [K, B] by [B, 2] on the device, without waiting for it; per
step one copy of [global batch] numbers to the device, and 2 K numbers more in the reduction that there is anyway.
Shapes: B windows of a micro-batch, T positions, K sources, V vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_adapt.config.names import get_language


@dataclass(frozen=True, kw_only=True)
class BatchSources:
    """Which source each window of a global batch is from."""

    sources_B: NDArray[np.int64]
    "[global batch] indices of sources, in the order of the windows."
    num_sources: int
    token_bytes_V: torch.Tensor
    "Bytes of text of every token id, on the device of the model."


def sum_by_source(
    loss_BT: torch.Tensor, mask_BT: torch.Tensor, bytes_BT: torch.Tensor, sources_B: torch.Tensor, num_sources: int
) -> torch.Tensor:
    """Sum losses and bytes of the targets of each source.

    Args:
        loss_BT: losses in nats.
        mask_BT: True where a target bears loss.
        bytes_BT: bytes of text of the targets.
        sources_B: index of the source of each window.
        num_sources: K.

    Returns:
        [2 K] in fp64: the losses of all sources, then their bytes.
    """
    is_text_BT = mask_BT & (bytes_BT > 0)
    losses_B, bytes_B = (loss_BT.detach() * is_text_BT).sum(1), (bytes_BT * is_text_BT).sum(1)
    sums_B2 = torch.stack([losses_B.double(), bytes_B.double()], dim=1)
    # A product adds in the same order every time; index_add does not on a GPU.
    is_from_KB = sources_B == torch.arange(num_sources, device=sources_B.device)[:, None]
    sums_K2: torch.Tensor = is_from_KB.double() @ sums_B2
    return sums_K2.T.flatten()


class SourceTally:
    """Adds up what steps found, until it is asked for the mean."""

    def __init__(self, sources: Sequence[str]) -> None:
        self._sources = tuple(sources)
        self._sums_2K = np.zeros((2, len(self._sources)))

    def add(self, sums: Sequence[float]) -> None:
        """Add the sums of a step, as ``sum_by_source`` orders them; an empty sequence adds nothing."""
        if sums:
            self._sums_2K += np.reshape(sums, (2, -1))

    def take(self) -> dict[str, float]:
        """Return bits per byte of each source, and of each language of several, and begin anew.

        What had no text since the last call is left out.
        """
        losses, num_bytes = self._sums_2K / [[math.log(2)], [1]]
        bits = dict(zip(self._sources, losses, strict=True))
        found = merge_languages(bits, dict(zip(self._sources, num_bytes, strict=True)))
        self._sums_2K[:] = 0
        return found


def merge_languages(bits: Mapping[str, float], num_bytes: Mapping[str, float]) -> dict[str, float]:
    """Return bits per byte of each source, and of each language of several sources.

    Args:
        bits: of each source, in all.
        num_bytes: of each source; one without any is left out.
    """
    members = {source: [source] for source in bits}
    for source in bits:
        if source != get_language(source):
            members.setdefault(get_language(source), []).append(source)
    found = {}
    for name, own in members.items():
        if count := sum(num_bytes[source] for source in own):
            found[name] = float(sum(bits[source] for source in own) / count)
    return found
