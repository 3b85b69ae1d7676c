"""Mend ``fully_reshardable`` checkpoints of megatron-core 0.16's distributed optimizer.

On save the engine gathers the optimizer state into one tensor per gradient buffer without the padding between
buckets, then cuts parameters out of it at offsets that include the padding. With several buckets of which one is
padded (a tied head in a pipeline, overlapped reduction, data parallel 3, 6, 12...) fp32 weights and moments of the
parameters behind it are wrong; the weights are right, so the first step after a resume looks fine.
Here the padding is put back before the cut. Loading is not affected.
"""

from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

_gather = DistributedOptimizer.get_parameter_state_dp_zero
_cut = DistributedOptimizer.sharded_param_state_fully_reshardable


def install() -> None:
    """Wrap the two methods of the engine. Safe to call again."""
    DistributedOptimizer.get_parameter_state_dp_zero = _gather_with_padding
    DistributedOptimizer.sharded_param_state_fully_reshardable = _cut_padded


def _cut_padded(self: Any, *args: Any, **kwargs: Any) -> Any:
    self.keep_bucket_padding = True
    try:
        return _cut(self, *args, **kwargs)
    finally:
        self.keep_bucket_padding = False


def _gather_with_padding(self: Any, *args: Any, **kwargs: Any) -> Any:
    state = _gather(self, *args, **kwargs)
    if state is None or not getattr(self, "keep_bucket_padding", False):
        return state
    for index, buffer in enumerate(self.buffers):
        for world_tensors in state[index].values():
            for name in ("param", "exp_avg", "exp_avg_sq"):
                world_tensors[name] = _insert_padding(world_tensors[name], buffer)
    return state


def _insert_padding(unpadded: torch.Tensor, buffer: Any) -> torch.Tensor:
    padded = torch.zeros(buffer.numel, dtype=unpadded.dtype, device=unpadded.device)
    start = 0
    for bucket in buffer.buckets:
        stop = start + bucket.numel_unpadded
        padded[bucket.offset : bucket.offset + bucket.numel_unpadded] = unpadded[start:stop]
        start = stop
    return padded
