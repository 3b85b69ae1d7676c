"""Output head and loss, forward and backward: megatron-core's own way against ours, on a GPU or on the CPU.

1. ``check_equal``: both give the same losses and gradients on few tokens, else nothing is measured.
2. ``step_once``: one call in a fresh process, the peak above what it held before, of torch's tensors on a GPU, of the
   process elsewhere; losses and the gradient of the hidden states are part of it. A call with few tokens comes first,
   so that thread pools and kernels are there.
3. ``run_in_turns``: one call of each a round, same tensors.

The peer is what ``GPTModel`` does at tensor parallel size 1: ``torch.matmul`` of ``ColumnParallelLinear``, then
``vocab_parallel_cross_entropy``. Hidden states are 1024 wide. Neither the weight is counted nor the fp32 sum of its
gradients (``main_grad``), which a training run holds all the time: the peer's gradient is added to it and let go, as
the hook of megatron-core's ``DistributedDataParallel`` does it.

``python benchmarks/loss_memory.py [--quick] [--size TOKENS]``
"""

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from measuring.report import make_parser, print_figures, print_table, show_ratio
from measuring.rounds import compare, run_fresh, run_in_turns
from measuring.tensors import find_difference, make_clock, measure_peak
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

from megatron_adapt.engine.kernels.dispatch import choose_kernels
from megatron_adapt.engine.kernels.linear_cross_entropy import Columns, linear_cross_entropy
from megatron_adapt.engine.parallel import Layout, get_device, start_engine
from megatron_adapt.errors import EngineError
from megatron_adapt.flags import run_tool

HIDDEN_SIZE, NUM_TOKENS, QUICK_TOKENS, FEW_TOKENS = 1024, 8192, 128, 16
VOCABULARIES = tuple(1024 * size for size in (32, 64, 128, 256))
QUICK_VOCABULARIES = (4096,)
ROUNDS = 3
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}


def compute_unfused(
    hidden_NH: torch.Tensor, weight_VH: torch.Tensor, labels_N: torch.Tensor, sums_VH: torch.Tensor
) -> torch.Tensor:
    """Return losses as megatron-core computes them, and let the weight gradient be added to its sum."""

    def add(weight: torch.Tensor) -> None:
        assert weight.grad is not None
        sums_VH.add_(weight.grad)
        weight.grad = None

    weight_VH.register_post_accumulate_grad_hook(add)
    loss: torch.Tensor = vocab_parallel_cross_entropy(
        torch.matmul(hidden_NH[:, None], weight_VH.t()), labels_N[:, None]
    )
    return loss[:, 0]


def compute_ours(
    hidden_NH: torch.Tensor, weight_VH: torch.Tensor, labels_N: torch.Tensor, sums_VH: torch.Tensor
) -> torch.Tensor:
    """Return losses as our model computes them, and add the weight gradient to its sum."""
    columns = Columns(first=0, num_true=len(weight_VH), group=None)
    loss_N, _ = linear_cross_entropy(
        hidden_NH, weight_VH, labels_N, columns, weight_sums_VH=sums_VH, kernels=choose_kernels("auto")
    )
    return loss_N


LOSSES = {"megatron_core": compute_unfused, "ours": compute_ours}


def make_step(name: str, num_tokens: int, num_columns: int, dtype: torch.dtype) -> Callable[[], list[torch.Tensor]]:
    """Return a function that runs forward and backward and returns losses, a gradient, and the sum of the others."""
    device = get_device()
    draw = torch.Generator(device).manual_seed(0)
    hidden_NH = torch.randn(num_tokens, HIDDEN_SIZE, generator=draw, device=device).to(dtype).requires_grad_()
    weight_VH = torch.empty(num_columns, HIDDEN_SIZE, dtype=dtype, device=device)
    weight_VH.normal_(0, 0.02, generator=draw)
    # Written, not only asked for: the system counts memory from the first touch.
    sums_VH = torch.empty_like(weight_VH, dtype=torch.float32).zero_()
    labels_N = torch.randint(0, num_columns, (num_tokens,), generator=draw, device=device)

    def step() -> list[torch.Tensor]:
        weight = weight_VH.detach().requires_grad_()
        hidden_NH.grad = None
        loss_N = LOSSES[name](hidden_NH, weight, labels_N, sums_VH)
        loss_N.sum().backward()
        return [loss_N.detach(), hidden_NH.grad, sums_VH]

    return step


def check_equal(dtype: torch.dtype) -> float:
    """Return the largest difference between the two, over the largest value.

    Raises:
        EngineError: the difference is more than rounding.
    """
    theirs, ours = (make_step(name, 300, 1000, dtype)() for name in LOSSES)
    difference = find_difference(theirs, ours)
    if difference > TOLERANCE[dtype]:
        raise EngineError(f"{dtype}: the two differ by {difference:.2g}; mend the loss before measuring it")
    return difference


def step_once(name: str, num_tokens: int, num_columns: int, dtype: torch.dtype, num_threads: int) -> float:
    """Run one step in this process, fresh but warmed up; return the MiB that its peak adds."""
    torch.set_num_threads(num_threads)
    with start_engine(Layout(), seed=0):
        make_step(name, FEW_TOKENS, 64, dtype)()
        return measure_peak(make_step(name, num_tokens, num_columns, dtype))


def measure_case(num_tokens: int, num_columns: int, dtype: torch.dtype, num_rounds: int) -> dict[str, Any]:
    """Measure time and memory of both on one vocabulary."""
    calls = {name: make_clock(make_step(name, num_tokens, num_columns, dtype)) for name in LOSSES}
    seconds = run_in_turns(calls, num_rounds)
    threads = torch.get_num_threads()
    extra_mib = {name: run_fresh(step_once, name, num_tokens, num_columns, dtype, threads) for name in LOSSES}
    return {
        "case": f"{'fp32' if dtype == torch.float32 else 'bf16'}, {num_columns:,} columns",
        "num_columns": num_columns,
        "seconds": {name: median(values) for name, values in seconds.items()},
        "time_ratio": compare(seconds, "megatron_core", "ours"),
        "extra_mib": extra_mib,
        "memory_ratio": extra_mib["megatron_core"] / extra_mib["ours"],
    }


def run(num_tokens: int, num_rounds: int, vocabularies: Sequence[int]) -> None:
    """Measure all cases and print them.

    Raises:
        EngineError: the two do not have the same losses.
    """
    with start_engine(Layout(), seed=0):
        differences = {str(dtype): check_equal(dtype) for dtype in TOLERANCE}
        figures = [
            measure_case(num_tokens, num_columns, dtype, num_rounds)
            for dtype in TOLERANCE
            for num_columns in vocabularies
        ]
    device = get_device().type
    print(f"Output head and loss, forward and backward, on {device}: {num_tokens:,} tokens, {HIDDEN_SIZE} wide")
    print_table(
        ("case", "peer s", "ours s", "time ratio (range)", "peer MiB", "ours MiB", "memory ratio"),
        [
            (
                found["case"],
                *found["seconds"].values(),
                show_ratio(found["time_ratio"]),
                *found["extra_mib"].values(),
                found["memory_ratio"],
            )
            for found in figures
        ],
    )
    print_figures(
        "loss_memory",
        ("torch", "megatron-core"),
        {
            "device": device,
            "tokens": num_tokens,
            "threads": torch.get_num_threads(),
            "rounds": num_rounds,
            "largest_differences": differences,
            "cases": figures,
        },
    )


if __name__ == "__main__":
    parser = make_parser(__doc__, default_rounds=ROUNDS, size=NUM_TOKENS, unit="tokens")
    arguments = parser.parse_args()
    tokens = int(arguments.size or (QUICK_TOKENS if arguments.quick else NUM_TOKENS))
    run_tool(run, tokens, arguments.rounds or ROUNDS, QUICK_VOCABULARIES if arguments.quick else VOCABULARIES)
