"""AdamW with Apex's interface, for machines with neither Apex nor Transformer Engine, and for moments in bf16.

megatron-core's distributed optimizer keeps the number of steps in the parameter group, as Apex does; torch's AdamW
keeps it per parameter and cannot be restored from a checkpoint (megatron-core 0.16, ``distrib_optimizer``).
The arithmetic is torch's fused kernel (Loshchilov and Hutter 2019, arXiv 1711.05101).

Moments in bf16 (``exp_avg_dtype``, ``exp_avg_sq_dtype``) are kept so between steps and computed in fp32:

1. ``_cut``: a bounded number of values at a time;
2. their moments are widened into an fp32 scratch, and the fused kernel steps with it;
3. ``round_randomly``: back to bf16, up or down at random, so that the mean over draws is the fp32 value.

Why not to the nearest value: bf16 has 8 bits, its neighbours lie 2^-8 to 2^-7 of a value apart, and a change of less
than half of that is lost whenever it comes. A moment changes by ``(1 - beta) * (new / old - 1)`` of itself. With beta
0.999 a second moment whose gradients end should fall by 0.001 a step, less than 2^-9 = 0.00195: it would stay for ever,
and it grows only where a square is three to five times the average. With 0.95 it stops within 2^-8 / 0.05 = 8 per cent
of the right value, a first moment with 0.9 within 4. Rounded at random a moment is right on average under any beta. One
draw is off by at most half a distance, 2^-8, in the standard deviation, so a moment by 2^-8 / sqrt(1 - beta^2): 0.9 per
cent with 0.9, 1.3 with 0.95, 9 with 0.999, and the step by half of the last two.

The draws follow from the number of the step, so that there is no state to keep: a resumed run draws what it would have
drawn. In another layout a rank holds other values, which get other draws; results then differ by this noise.
Zero and every other value of bf16 stays what it is, so rows that are held stay held.

Memory: 4 bytes of moments a value instead of 8, and ``_CHUNK_VALUES`` of scratch. The engine's own setting of these
names (``use_precision_aware_optimizer``) needs Transformer Engine and rounds to the nearest.
Stochastic rounding: Gupta et al. 2015, arXiv 1502.02551. Moments in bf16: DeepSeek-V3, arXiv 2412.19437, section 3.3.3.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import megatron.core.optimizer
import megatron.core.optimizer.distrib_optimizer
import torch
import torch.distributed as dist

from megatron_adapt.engine.parallel import get_device

_CHUNK_VALUES = 1 << 22
"Values that are stepped at once where a moment is in bf16: 16 MiB of scratch for each moment, and as much to round."
_MOMENTS = ("exp_avg", "exp_avg_sq")
_DISTRIBUTED = megatron.core.optimizer.distrib_optimizer
_FOUND = megatron.core.optimizer.Adam if _DISTRIBUTED.HAVE_APEX_OR_TE else None
"Adam of Transformer Engine or Apex."


class FusedAdam(torch.optim.Optimizer):
    """Adam(W) that keeps ``step`` in the parameter group and steps many tensors of a group in one call."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        bias_correction: bool = True,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
    ) -> None:
        self._step_tensors = torch._fused_adamw_ if adam_w_mode else torch._fused_adam_
        self._dtypes = dict(zip(_MOMENTS, (exp_avg_dtype, exp_avg_sq_dtype), strict=True))
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "bias_correction": bias_correction})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for number, group in enumerate(self.param_groups):
            learning = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not learning:
                continue
            group["step"] = group.get("step", 0) + 1
            for parameter in learning:
                if not self.state[parameter]:
                    self.state[parameter].update(
                        {name: torch.zeros_like(parameter, dtype=dtype) for name, dtype in self._dtypes.items()}
                    )
            tensors = [
                [parameter.data for parameter in learning],
                [parameter.grad for parameter in learning],
                *([self.state[parameter][name] for parameter in learning] for name in _MOMENTS),
            ]
            if all(dtype == torch.float32 for dtype in self._dtypes.values()):
                self._step_group(group, tensors)
            else:
                self._step_in_chunks(group, number, tensors)

    def _step_in_chunks(self, group: dict[str, Any], number: int, tensors: Sequence[list[torch.Tensor]]) -> None:
        """Step a group of which some moments are in bf16; ``number`` is that of the group."""
        device = tensors[0][0].device
        generator = torch.Generator(device=device)
        generator.manual_seed(group["step"] * len(self.param_groups) + number)
        scratch = {
            name: torch.empty(min(_CHUNK_VALUES, sum(map(torch.numel, tensors[0]))), device=device)
            for name, dtype in self._dtypes.items()
            if dtype != torch.float32
        }
        for chunk in _cut(tensors, _CHUNK_VALUES):
            sizes = list(map(len, chunk[0]))
            kept = dict(zip(_MOMENTS, chunk[2:], strict=True))
            wide = {name: list(values[: sum(sizes)].split_with_sizes(sizes)) for name, values in scratch.items()}
            for name, moments in wide.items():
                torch._foreach_copy_(moments, kept[name])
            self._step_group(group, [*chunk[:2], *({**kept, **wide}[name] for name in _MOMENTS)])
            for name in wide:
                rounded = round_randomly(scratch[name][: sum(sizes)], generator)
                torch._foreach_copy_(kept[name], list(rounded.split_with_sizes(sizes)))

    def _step_group(self, group: dict[str, Any], tensors: Sequence[list[torch.Tensor]]) -> None:
        """Step weights, gradients, first and second moments, all in fp32, with the settings of a group."""
        weights, gradients, first, second = tensors
        num_steps = torch.tensor(float(group["step"]), device=weights[0].device)
        self._step_tensors(
            weights,
            gradients,
            first,
            second,
            [],
            [num_steps] * len(weights),
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load as torch does, which gives moments the type of their parameter, and put them back into their own.

        What was saved in bf16 comes back exactly.
        """
        super().load_state_dict(state_dict)
        for moments in self.state.values():
            for name, dtype in self._dtypes.items():
                if name in moments:
                    moments[name] = moments[name].to(dtype)


def round_randomly(values_N: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Round fp32 values to bf16, up or down with the probabilities that make the mean exact.

    Args:
        values_N: fp32; its memory is overwritten.
        generator: on the same device.

    Returns:
        [N] in bf16. Values of bf16, zero, infinities and NaN among them, come back as they are.
    """
    draws = torch.empty(-(-len(values_N) // 4), dtype=torch.int64, device=values_N.device)
    draws_N = draws.random_(-(1 << 63), None, generator=generator).view(torch.int16)[: len(values_N)]
    bits_N = values_N.view(torch.int32)
    # bf16 is the upper half of fp32, and the lower half is how far a value is on its way to the next one: that many
    # of 2^16 equally likely numbers carry into the upper half. The draws are signed, from -2^15.
    bits_N.add_(draws_N).add_(1 << 15).bitwise_and_(-(1 << 16))
    return values_N.to(torch.bfloat16)


def _cut(tensors: Sequence[list[torch.Tensor]], most: int) -> Iterator[list[list[torch.Tensor]]]:
    """Cut lists of tensors, alike in their sizes, into lists of flat pieces of at most ``most`` values in all."""
    chunk: list[list[torch.Tensor]] = [[] for _ in tensors]
    room = most
    for alike in zip(*tensors, strict=True):
        flat = [tensor.view(-1) for tensor in alike]
        start = 0
        while start < len(flat[0]):
            pieces = [tensor[start : start + room] for tensor in flat]
            for pieces_of_kind, piece in zip(chunk, pieces, strict=True):
                pieces_of_kind.append(piece)
            start, room = start + len(pieces[0]), room - len(pieces[0])
            if not room:
                yield chunk
                chunk, room = [[] for _ in tensors], most
    if chunk[0]:
        yield chunk


def install(exp_avg_dtype: torch.dtype = torch.float32, exp_avg_sq_dtype: torch.dtype = torch.float32) -> None:
    """Give megatron-core this optimizer if it found no other, or if a moment is to be in bf16.

    Args:
        exp_avg_dtype: of the first moment, between steps.
        exp_avg_sq_dtype: of the second moment.
    """
    if _FOUND is not None and exp_avg_dtype == exp_avg_sq_dtype == torch.float32:
        megatron.core.optimizer.Adam = _DISTRIBUTED.Adam = _FOUND
        return
    megatron.core.optimizer.Adam = partial(
        FusedAdam, exp_avg_dtype=exp_avg_dtype, exp_avg_sq_dtype=exp_avg_sq_dtype
    )  # fmt: skip
    _DISTRIBUTED.Adam = FusedAdam
    if _FOUND is None:
        megatron.core.optimizer.USING_PYTORCH_OPTIMIZER = False
        _DISTRIBUTED.HAVE_APEX_OR_TE = True
        _DISTRIBUTED.USING_APEX_OPTIMIZER = True


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
