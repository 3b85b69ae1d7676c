"""How exact a kernel is: its error and plain PyTorch's, against fp64. Triton's interpreter rounds as a GPU does."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@contextmanager
def rounding_as_a_gpu() -> Iterator[None]:
    """Round fp32 to the nearest bf16: Triton 3.9's interpreter cuts the digits off, which no GPU does."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def convert_to_nearest(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, rounding)
        return torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()

    with mock.patch.object(interpreter, "_convert_float", convert_to_nearest):
        yield


def run_both_ways(
    compute: Callable[..., torch.Tensor], inputs: list[torch.Tensor], upstream: torch.Tensor
) -> list[torch.Tensor]:
    """Return the output and the gradients of all inputs."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    out = compute(*inputs)
    assert out.dtype == inputs[0].dtype
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream)]


def measure_errors(
    ours: Callable[..., torch.Tensor],
    plain: Callable[..., torch.Tensor],
    inputs: list[torch.Tensor],
    upstream: torch.Tensor,
    dtype: torch.dtype,
) -> Iterator[tuple[float, float, float]]:
    """Yield, for the output and every gradient: our error, plain PyTorch's, and the norm of the fp64 reference."""
    inputs, upstream = [tensor.to(dtype) for tensor in inputs], upstream.to(dtype)
    exact = run_both_ways(plain, [tensor.double() for tensor in inputs], upstream.double())
    with rounding_as_a_gpu():
        found = run_both_ways(ours, inputs, upstream)
    expected = run_both_ways(plain, inputs, upstream)
    for one, other, reference in zip(found, expected, exact, strict=True):
        errors = ((tensor.double() - reference).norm().item() for tensor in (one, other))
        yield (*errors, reference.norm().item())


def allow(plain: float, norm: float, dtype: torch.dtype) -> float:
    """Return the error that a kernel may have for a handful of values, of which plain PyTorch is exact now and then."""
    return 2 * plain + 2 * torch.finfo(dtype).eps * (norm + 1)
