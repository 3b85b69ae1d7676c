"""What the benchmarks of the engine ask of the machine and of the tensors of both sides."""

from collections.abc import Callable, Sequence

import torch

from measuring.rounds import make_timed, measure
from megatron_adapt.errors import EngineError


def require_cpu(benchmark: str) -> None:
    """Refuse to measure the CPU where the engine would use a GPU.

    Raises:
        EngineError: there is one.
    """
    if torch.cuda.is_available():
        raise EngineError(f"{benchmark}: this measures the CPU, but a GPU is visible; start with CUDA_VISIBLE_DEVICES=")


def find_difference(theirs: Sequence[torch.Tensor], ours: Sequence[torch.Tensor]) -> float:
    """Return the largest difference between tensors, over the largest value of its tensor."""
    return max(
        float((one.float() - other.float()).abs().max() / one.float().abs().max())
        for one, other in zip(theirs, ours, strict=True)
    )


def make_clock(function: Callable[[], object]) -> Callable[[], float]:
    """Return a function that returns the seconds of a call.

    On a GPU they are the median of several calls (``triton.testing.do_bench``), the L2 cache emptied before each.
    """
    if not torch.cuda.is_available():
        return make_timed(function)
    from triton.testing import do_bench

    return lambda: do_bench(function, return_mode="median") / 1e3


def measure_peak(function: Callable[[], object]) -> float:
    """Call a function; return the MiB by which its peak exceeds what was held: tensors on a GPU, else the process.

    What a process holds only means something where it has done little before.
    """
    if not torch.cuda.is_available():
        return measure(function).extra_mib
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    return (torch.cuda.max_memory_allocated() - held) / (1 << 20)
