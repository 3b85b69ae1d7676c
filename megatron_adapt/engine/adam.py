"""AdamW with Apex's interface, for machines with neither Apex nor Transformer Engine.

megatron-core's distributed optimizer keeps the number of steps in the parameter group, as Apex does; torch's AdamW
keeps it per parameter and cannot be restored from a checkpoint (megatron-core 0.16, ``distrib_optimizer``).
The arithmetic is torch's fused kernel (Loshchilov and Hutter 2019, arXiv 1711.05101).
"""

from collections.abc import Iterable
from typing import Any

import megatron.core.optimizer
import megatron.core.optimizer.distrib_optimizer
import torch
import torch.distributed as dist

from megatron_adapt.engine.parallel import get_device


class FusedAdam(torch.optim.Optimizer):
    """Adam(W) that keeps ``step`` in the parameter group and steps all tensors of a group in one call."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        bias_correction: bool = True,
    ) -> None:
        self._step_tensors = torch._fused_adamw_ if adam_w_mode else torch._fused_adam_
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "bias_correction": bias_correction})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            learning = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not learning:
                continue
            group["step"] = group.get("step", 0) + 1
            for parameter in learning:
                if not self.state[parameter]:
                    self.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
                    self.state[parameter]["exp_avg_sq"] = torch.zeros_like(parameter)
            num_steps = torch.tensor(float(group["step"]), device=learning[0].device)
            self._step_tensors(
                [parameter.data for parameter in learning],
                [parameter.grad for parameter in learning],
                [self.state[parameter]["exp_avg"] for parameter in learning],
                [self.state[parameter]["exp_avg_sq"] for parameter in learning],
                [],
                [num_steps] * len(learning),
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )


def install() -> None:
    """Give megatron-core this optimizer if it found neither Transformer Engine nor Apex."""
    distributed = megatron.core.optimizer.distrib_optimizer
    if distributed.HAVE_APEX_OR_TE:
        return
    megatron.core.optimizer.Adam = FusedAdam
    megatron.core.optimizer.USING_PYTORCH_OPTIMIZER = False
    distributed.Adam = FusedAdam
    distributed.HAVE_APEX_OR_TE = True
    distributed.USING_APEX_OPTIMIZER = True


def align_steps(optimizer: Any) -> None:
    """Tell groups without a parameter on this rank how many steps the others have done; every rank calls this.

    The engine saves what rank 0 says of the groups. A pipeline stage that owns nothing of a group never counts its
    steps, and who loads the group would correct Adam's bias as in the first step again.
    """
    groups = optimizer.param_groups
    done = torch.tensor(max((int(group.get("step", 0)) for group in groups), default=0), device=get_device())
    dist.all_reduce(done, op=dist.ReduceOp.MAX)
    for group in groups:
        if not group["params"]:
            group["step"] = int(done)
