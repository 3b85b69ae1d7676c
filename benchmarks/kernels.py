"""Triton's kernels on a GPU: the bandwidth each reaches, against a copy of as many bytes and against plain torch.

1. ``make_cases``: every kernel at the sizes of an 8B model, with the fewest bytes it can move: what it needs is read
   once, what comes out is written once.
2. ``check_equal``: the kernel and plain torch agree, else nothing is measured.
3. ``run_in_turns``: a copy, torch and the kernel once a round; on a GPU ``triton.testing.do_bench``, which empties the
   L2 cache before each call.

The products between which the loss kernels stand are left out here: ``loss_memory.py`` has the whole of it. Without a
GPU, under ``TRITON_INTERPRET=1``, ``--quick`` shows that the script runs, and nothing else.

``python benchmarks/kernels.py [--quick] [--size TOKENS]``
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from measuring.report import make_parser, print_figures, print_table, show_ratio
from measuring.rounds import compare, run_in_turns
from measuring.tensors import find_difference, make_clock

from megatron_adapt.engine.kernels.dispatch import Implementation, choose_kernels
from megatron_adapt.engine.kernels.rms_norm import rms_norm
from megatron_adapt.engine.kernels.rope import rotate_heads
from megatron_adapt.engine.kernels.swiglu import swiglu
from megatron_adapt.engine.parallel import get_device
from megatron_adapt.errors import EngineError
from megatron_adapt.flags import run_tool

NUM_TOKENS, ROUNDS = 32_768, 5
QUICK_TOKENS, QUICK_ROUNDS = 8, 1
EPS, DTYPE, TOLERANCE = 1e-5, torch.bfloat16, 2e-2


@dataclass(frozen=True)
class Widths:
    """Columns of the tensors."""

    hidden: int
    heads: int
    head: int
    feed_forward: int
    vocabulary: int
    "Logits of a chunk have so many columns, and a sixteenth of the tokens."


WIDTHS = Widths(hidden=4096, heads=32, head=128, feed_forward=14336, vocabulary=131_072)
QUICK_WIDTHS = Widths(hidden=64, heads=4, head=16, feed_forward=96, vocabulary=300)


@dataclass(frozen=True)
class Case:
    """A kernel, and what plain torch does in its place."""

    name: str
    num_bytes: int
    "The fewest that can be moved."
    triton: Callable[[], Sequence[torch.Tensor]]
    torch: Callable[[], Sequence[torch.Tensor]]


def draw(*shape: int) -> torch.Tensor:
    """Draw a tensor that learns, where the kernels run."""
    return torch.randn(*shape, device=get_device(), dtype=DTYPE).requires_grad_()


def make_cases(num_tokens: int, widths: Widths) -> Iterator[Case]:
    """Yield every kernel; its tensors are drawn when its turn comes, and stay."""
    hidden, weight = draw(num_tokens, widths.hidden), draw(widths.hidden)
    yield from make_both_ways(
        "RMSNorm", lambda kernels: rms_norm(hidden, weight, EPS, kernels=kernels), [hidden, weight], hidden.nbytes
    )
    heads = draw(num_tokens, 1, widths.heads, widths.head)
    angles = torch.rand(num_tokens, 1, 1, widths.head // 2, device=heads.device).repeat(1, 1, 1, 2)
    yield from make_both_ways("RoPE", lambda kernels: rotate_heads(heads, angles, kernels=kernels), [heads], 0)
    inputs = draw(num_tokens, 2 * widths.feed_forward)
    yield from make_both_ways("SwiGLU", lambda kernels: swiglu(inputs, kernels=kernels), [inputs], inputs.nbytes)
    yield from make_loss_cases(draw(max(num_tokens // 16, 1), widths.vocabulary).detach())


def make_both_ways(
    name: str, compute: Callable[[Implementation], torch.Tensor], inputs: list[torch.Tensor], num_kept: int
) -> Iterator[Case]:
    """Yield forward and backward pass of a function.

    Args:
        name: for the table.
        compute: the function, by what computes it.
        inputs: what learns; the first one is large.
        num_kept: bytes of the inputs that the backward pass reads again.
    """
    outputs = {kernels: compute(kernels) for kernels in ("triton", "torch")}
    upstream = torch.randn_like(outputs["torch"])

    def forward(kernels: Implementation) -> list[torch.Tensor]:
        with torch.no_grad():
            return [compute(kernels)]

    def backward(kernels: Implementation) -> Sequence[torch.Tensor]:
        return torch.autograd.grad(outputs[kernels], inputs, upstream, retain_graph=True)

    yield Case(
        f"{name}, forward", inputs[0].nbytes + upstream.nbytes, partial(forward, "triton"), partial(forward, "torch")
    )
    yield Case(
        f"{name}, backward", upstream.nbytes + num_kept + inputs[0].nbytes,
        partial(backward, "triton"), partial(backward, "torch"),
    )  # fmt: skip


def make_loss_cases(logits_NV: torch.Tensor) -> Iterator[Case]:
    """Yield the two kernels between the products of head and loss; the second one works in place, on a copy."""
    from megatron_adapt.engine.kernels.gpu import linear_cross_entropy as gpu

    labels_N = torch.arange(len(logits_NV), device=logits_NV.device) % logits_NV.shape[1]
    rows = torch.arange(len(logits_NV), device=logits_NV.device)

    def normalise() -> list[torch.Tensor]:
        highest_N, sum_N, target_N = gpu.normalise(logits_NV, labels_N)
        return [highest_N + sum_N.log(), target_N]

    def normalise_in_torch() -> list[torch.Tensor]:
        return [logits_NV.float().logsumexp(1), logits_NV[rows, labels_N]]

    yield Case("loss, forward", logits_NV.nbytes, normalise, normalise_in_torch)
    highest_N, sum_N, _ = gpu.normalise(logits_NV, labels_N)
    log_sum_N1 = (highest_N + sum_N.log())[:, None]
    ones_N, gradient_NV = torch.ones_like(sum_N), logits_NV.clone()

    def differentiate() -> list[torch.Tensor]:
        gpu.differentiate(gradient_NV, labels_N, highest_N, 1 / sum_N, ones_N)
        return [gradient_NV]

    def differentiate_in_torch() -> list[torch.Tensor]:
        shares_NV = (logits_NV.float() - log_sum_N1).exp()
        shares_NV[rows, labels_N] -= 1
        return [shares_NV.to(logits_NV.dtype)]

    yield Case("loss, backward", 2 * logits_NV.nbytes, differentiate, differentiate_in_torch)


def check_equal(case: Case) -> float:
    """Return the largest difference between the two, over the largest value.

    Raises:
        EngineError: the difference is more than rounding.
    """
    difference = find_difference(case.torch(), case.triton())
    if difference > TOLERANCE:
        raise EngineError(f"{case.name}: the two differ by {difference:.2g}; mend the kernel before measuring it")
    return difference


def measure_case(case: Case, num_rounds: int) -> dict[str, Any]:
    """Measure a kernel, plain torch, and a copy that moves as much."""
    difference = check_equal(case)
    source = torch.randint(0, 100, (case.num_bytes // 2,), device=get_device(), dtype=torch.uint8)
    target = torch.empty_like(source)
    calls = {"copy": lambda: target.copy_(source), "torch": case.torch, "triton": case.triton}
    seconds = run_in_turns({name: make_clock(call) for name, call in calls.items()}, num_rounds)
    return {
        "case": case.name,
        "mib": case.num_bytes / (1 << 20),
        "gb_per_second": case.num_bytes / 1e9 / median(seconds["triton"]),
        "copy_share": compare(seconds, "copy", "triton"),
        "time_ratio": compare(seconds, "torch", "triton"),
        "largest_difference": difference,
    }


def run(num_tokens: int, num_rounds: int, widths: Widths) -> None:
    """Measure all kernels and print them.

    Raises:
        EngineError: Triton's kernels do not run here, or one is wrong.
    """
    choose_kernels("triton")
    torch.manual_seed(0)
    figures = [measure_case(case, num_rounds) for case in make_cases(num_tokens, widths)]
    print(f"Triton's kernels in bf16 on {get_device().type}: {num_tokens:,} tokens of {widths}")
    print_table(
        ("kernel", "MiB moved", "GB/s", "of a copy's (range)", "torch's time over ours (range)"),
        [
            (
                found["case"], found["mib"], found["gb_per_second"], show_ratio(found["copy_share"]),
                show_ratio(found["time_ratio"]),
            )
            for found in figures
        ],
    )  # fmt: skip
    shared = {"device": get_device().type, "tokens": num_tokens, "rounds": num_rounds}
    print_figures("kernels", ("torch", "triton"), {**shared, "cases": figures})


if __name__ == "__main__":
    parser = make_parser(__doc__, default_rounds=ROUNDS, size=NUM_TOKENS, unit="tokens")
    arguments = parser.parse_args()
    if arguments.quick:
        run_tool(run, int(arguments.size or QUICK_TOKENS), arguments.rounds or QUICK_ROUNDS, QUICK_WIDTHS)
    else:
        run_tool(run, int(arguments.size or NUM_TOKENS), arguments.rounds or ROUNDS, WIDTHS)
