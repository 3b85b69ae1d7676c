"""One rank of a job that does not exist: megatron-core under a fake process group, on tensors without memory.

``start_fake_engine`` gives the groups, the model and the optimizer that rank R of N would have, on a machine with
neither GPUs nor N processes. Tensors are torch's fake ones: they have a shape and a type, and operations give further
fake tensors without computing. Collectives of the fake group return at once.

What the engine asks of real tensors or of other ranks is answered here, for as long as the block lasts:

1. groups over gloo, which the engine makes beside the others, are fake ones too;
2. objects gathered from all ranks are this rank's own: all ranks of a stage are alike;
3. ``LlamaModel.to`` does nothing, because the weights are where they belong and fake ones cannot be swapped;
4. the states of random generators are not kept apart: nothing is drawn;
5. Triton's kernels are their torch twins, which keep the same; for a GPU, RMSNorm also works without fp32 copies, as
   the fused kernels there do. Attention needs no such answer: the flash kernels of CPU and GPU keep the same;
6. attention over shared windows has no mask: it cannot be a fake tensor, and the flash kernels keep none;
7. the upstream gradient of the loss is the same for all tokens, as in training: fake tensors have no values to compare.

A GPU of this machine is not seen, and megatron-core stays bound to the CPU in this process (``cpu.install``): plan in a
process of its own.

Cost: one to three seconds per rank of 10 layers.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker, model_parallel_cuda_manual_seed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_adapt.config import Layout
from megatron_adapt.engine import attention, cpu, llama
from megatron_adapt.engine.kernels import linear_cross_entropy, rms_norm
from megatron_adapt.engine.llama import LlamaModel
from megatron_adapt.engine.parallel import make_groups, quieten_engine


@contextmanager
def start_fake_engine(layout: Layout, *, rank: int, world_size: int, on_gpu: bool) -> Iterator[None]:
    """Set the engine up as one rank of a job; every tensor made inside is a fake one on the CPU.

    Args:
        layout: how the model is spread over the ranks.
        rank: number of the rank.
        world_size: ranks of the job; a multiple of those that hold one copy of the model.
        on_gpu: whether operations shall keep what they keep on a GPU.
    """
    quieten_engine()
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    norm = mock.patch.object(rms_norm, "_Norm", _FusedNorm) if on_gpu else nullcontext()
    make_group = partial(_make_fake_group, parallel_state.create_group)
    try:
        with (
            mock.patch.object(torch.cuda, "is_available", _see_no_gpu),
            mock.patch.object(parallel_state, "create_group", make_group),
            mock.patch.object(dist, "all_gather_object", _gather_own),
            mock.patch.object(LlamaModel, "to", _stay),
            mock.patch.object(llama, "choose_kernels", _choose_twins),
            mock.patch.object(linear_cross_entropy, "_find_common_value", _answer_one),
            mock.patch.object(CudaRNGStatesTracker, "fork", _keep_generator),
            mock.patch.object(attention, "causal_lower_right", _keep_no_mask),
            norm,
        ):
            cpu.install()
            make_groups(layout)
            model_parallel_cuda_manual_seed(0, force_reset_rng=True)
            with FakeTensorMode():
                yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _see_no_gpu() -> bool:
    return False


def _make_fake_group(make: Any, *args: Any, **kwargs: Any) -> Any:
    return make(*args, **{**kwargs, "backend": None})


def _gather_own(gathered: list[Any], item: Any, group: Any = None) -> None:
    gathered[:] = [item] * len(gathered)


def _choose_twins(asked: str) -> str:
    return "torch"


def _answer_one(*_: Any) -> float:
    return 1.0


def _stay(model: LlamaModel, *_: Any, **__: Any) -> LlamaModel:
    return model


def _keep_generator(*_: Any, **__: Any) -> Any:
    return nullcontext()


def _keep_no_mask(*_: int) -> None:
    return None


class _FusedNorm(torch.autograd.Function):
    """Shapes and saved tensors of fused kernels, CUDA's ``_fused_rms_norm`` or Triton's; computes nothing."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        inverse_rms = torch.empty(hidden.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(hidden, weight, inverse_rms)
        return torch.empty_like(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, _ = ctx.saved_tensors
        return torch.empty_like(hidden), torch.empty_like(weight) if ctx.needs_input_grad[1] else None, None
