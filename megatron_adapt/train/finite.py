"""The optimizer's part of a step, left out on all ranks where the loss or the gradient is not finite.

Guarantee: such a step leaves weights, fp32 masters, moments and Adam's count of steps as they were, to the last bit.

1. ``MicroBatchLosses.watch`` notes the loss of every micro-batch while the schedule runs.
2. ``step_if_finite`` looks before anything moves. megatron-core's ``step`` is: prepare the gradients and say whether
   there is an inf among them (it looks for fp16 alone), then norm, clipping, Adam, weights; with an inf it ends there.
   Here the first part takes the norm too, which the second is then given: no inf or NaN in a gradient leaves it finite.
3. ``MicroBatchLosses.find_non_finite`` names the windows, behind a step that was left out.

Costs: one integer sent between all ranks in a step; the norm is taken once, nothing is copied.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer

from megatron_adapt.engine.parallel import get_device


def step_if_finite(optimizer: MegatronOptimizer, loss: float) -> tuple[float, bool]:
    """Clip and step, unless ``loss`` or the norm of the gradient is not finite on any rank; every rank calls this.

    Args:
        optimizer: its gradients are reduced, and those of rows that are held are zero.
        loss: of the step; the ranks need not know the same one.

    Returns:
        The norm of the gradient before clipping, and whether the step was left out.
    """
    prepare, measure = optimizer.prepare_grads, optimizer.get_grad_norm
    norm = math.nan

    def find_inf() -> bool:
        nonlocal norm
        found = prepare()
        norm = float(measure())
        return _is_true_anywhere(found or not (math.isfinite(loss) and math.isfinite(norm)))

    vars(optimizer).update(prepare_grads=find_inf, get_grad_norm=lambda: norm)
    try:
        is_done, _, _ = optimizer.step()
    finally:
        del vars(optimizer)["prepare_grads"], vars(optimizer)["get_grad_norm"]
    if not is_done:
        _make_moments(optimizer)
    return norm, not is_done


def _make_moments(optimizer: MegatronOptimizer) -> None:
    """Make the moments that the first step would have made; a checkpoint without them cannot be read."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if not part.is_stub_optimizer:
            part.init_state_fn(part.optimizer, part.config)


def _is_true_anywhere(value: bool) -> bool:
    found = torch.tensor([value], dtype=torch.int32, device=get_device())
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found.item())


class MicroBatchLosses:
    """The losses of the micro-batches of this rank in one step; only the last pipeline stage has any."""

    def __init__(self) -> None:
        """Begin a step."""
        self._losses: list[torch.Tensor] = []

    def watch(self, forward: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
        """Return a forward step that notes the loss its loss function reports, ``{"sums": [loss, ...]}``."""

        def watched(*args: Any) -> tuple[Any, Any]:
            output, sum_loss = forward(*args)

            def note(loss_BT: torch.Tensor) -> Any:
                found = sum_loss(loss_BT)
                self._losses.append(found[-1]["sums"][0])
                return found

            return output, note

        return watched

    def find_non_finite(self, num_windows: int, micro_batch_size: int) -> tuple[int, ...]:
        """Return the windows of the batch whose micro-batch has a loss that is not finite; every rank calls this.

        Args:
            num_windows: windows of the global batch, of which the m-th micro-batches of all ranks are neighbours.
            micro_batch_size: windows in one forward pass.
        """
        size, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
        found_M = torch.zeros(num_windows // micro_batch_size, dtype=torch.int32, device=get_device())
        for at, loss in enumerate(self._losses):
            found_M[at * size + rank] = int(not bool(torch.isfinite(loss)))
        dist.all_reduce(found_M, op=dist.ReduceOp.MAX)
        places: list[int] = found_M.repeat_interleave(micro_batch_size).nonzero()[:, 0].tolist()
        return tuple(places)
