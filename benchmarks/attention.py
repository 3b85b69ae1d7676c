"""Core attention, forward and backward: megatron-core's DotProductAttention against ours, on the CPU.

1. ``check_equal``: both give the same context and the same gradients, else nothing is measured.
2. ``run_in_turns``: one call of each a round, same tensors.
3. ``measure_memory``: the peak of one call in a fresh process, above what it held before; a call with few positions
   comes first, so that thread pools and kernels are there.

The peer runs as the engine's local layers run it: causal without an explicit mask, softmax in fp32.

``python benchmarks/attention.py [--quick] [--size POSITIONS]``
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from measuring.report import make_parser, print_figures, print_table, show_ratio
from measuring.rounds import compare, make_timed, measure, run_fresh, run_in_turns
from measuring.tensors import find_difference, require_cpu
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_adapt.config import Layout
from megatron_adapt.engine.attention import SDPACoreAttention
from megatron_adapt.engine.parallel import start_engine
from megatron_adapt.errors import EngineError
from megatron_adapt.flags import run_tool

HIDDEN_SIZE, NUM_HEADS, BATCH = 512, 8, 1
GROUP_COUNTS = (8, 2)
NUM_POSITIONS, WARM_UP_POSITIONS = 1024, 16
ROUNDS, QUICK_ROUNDS = 21, 5
ATTENTIONS = {"megatron_core": DotProductAttention, "ours": SDPACoreAttention}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}


@dataclass(frozen=True)
class Case:
    """What attention runs on."""

    bf16: bool
    num_query_groups: int
    num_positions: int

    @property
    def dtype(self) -> torch.dtype:
        """Type of the tensors."""
        return torch.bfloat16 if self.bf16 else torch.float32

    @property
    def name(self) -> str:
        """Name for the table."""
        return f"{'bf16' if self.bf16 else 'fp32'}, {self.num_query_groups} key-value heads"


def make_attention(name: str, case: Case) -> DotProductAttention | SDPACoreAttention:
    """Build one of the two; needs a started engine."""
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN_SIZE,
        num_attention_heads=NUM_HEADS,
        num_query_groups=case.num_query_groups,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
        bf16=case.bf16,
        params_dtype=case.dtype,
    )
    return ATTENTIONS[name](config, 1, AttnMaskType.causal, "self")


def make_inputs(case: Case) -> list[torch.Tensor]:
    """Draw query, key, value [T, B, heads, D] and the gradient of the context [T, B, H]."""
    generator = torch.Generator().manual_seed(0)
    width = HIDDEN_SIZE // NUM_HEADS
    heads = [(NUM_HEADS, width), (case.num_query_groups, width), (case.num_query_groups, width), (HIDDEN_SIZE,)]
    return [
        torch.randn(case.num_positions, BATCH, *size, generator=generator).to(case.dtype).requires_grad_(len(size) == 2)
        for size in heads
    ]


def make_step(name: str, case: Case) -> Callable[[], list[torch.Tensor]]:
    """Return a function that runs forward and backward and returns the context and three gradients."""
    attention = make_attention(name, case)
    *heads, gradient = make_inputs(case)

    def step() -> list[torch.Tensor]:
        context = attention(*heads, None, attn_mask_type=AttnMaskType.causal)
        return [context.detach(), *torch.autograd.grad(context, heads, gradient)]

    return step


def check_equal(case: Case) -> float:
    """Return the largest difference between the two, over the largest value.

    Raises:
        EngineError: the difference is more than rounding.
    """
    theirs, ours = (make_step(name, case)() for name in ATTENTIONS)
    difference = find_difference(theirs, ours)
    if difference > TOLERANCE[case.dtype]:
        raise EngineError(f"{case.name}: the two differ by {difference:.2g}; mend the attention before measuring it")
    return difference


def step_once(name: str, case: Case, num_threads: int) -> float:
    """Run one step in this process, fresh but warmed up; return the MiB that its peak adds."""
    torch.set_num_threads(num_threads)
    with start_engine(Layout(), seed=0):
        make_step(name, Case(case.bf16, case.num_query_groups, WARM_UP_POSITIONS))()
        return measure(make_step(name, case)).extra_mib


def measure_case(case: Case, num_rounds: int) -> dict[str, Any]:
    """Measure time and memory of both on one case."""
    difference = check_equal(case)
    calls = {name: make_timed(make_step(name, case)) for name in ATTENTIONS}
    run_in_turns(calls, 2)
    seconds = run_in_turns(calls, num_rounds)
    extra_mib = {name: run_fresh(step_once, name, case, torch.get_num_threads()) for name in ATTENTIONS}
    return {
        **asdict(case),
        "case": case.name,
        "largest_difference": difference,
        "seconds": {name: median(values) for name, values in seconds.items()},
        "time_ratio": compare(seconds, "megatron_core", "ours"),
        "extra_mib": extra_mib,
        "memory_ratio": extra_mib["megatron_core"] / extra_mib["ours"],
    }


def run(num_positions: int, num_rounds: int, group_counts: Sequence[int]) -> None:
    """Measure all cases and print them.

    Raises:
        EngineError: there is a GPU, and the engine would use it.
    """
    require_cpu("attention")
    cases = [Case(bf16, groups, num_positions) for bf16 in (False, True) for groups in group_counts]
    with start_engine(Layout(), seed=0):
        figures = [measure_case(case, num_rounds) for case in cases]
    print(f"Core attention, forward and backward: {num_positions} positions, {HIDDEN_SIZE} wide, {NUM_HEADS} heads")
    print_table(
        ("case", "peer ms", "ours ms", "time ratio (range)", "peer MiB", "ours MiB", "memory ratio"),
        [
            (
                found["case"],
                *(1e3 * value for value in found["seconds"].values()),
                show_ratio(found["time_ratio"]),
                *found["extra_mib"].values(),
                found["memory_ratio"],
            )
            for found in figures
        ],
    )
    shared = {"positions": num_positions, "rounds": num_rounds, "threads": torch.get_num_threads(), "cases": figures}
    print_figures("attention", ("torch", "megatron-core"), shared)


if __name__ == "__main__":
    parser = make_parser(__doc__, default_rounds=ROUNDS, size=NUM_POSITIONS, unit="positions")
    arguments = parser.parse_args()
    rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS)
    run_tool(run, int(arguments.size or NUM_POSITIONS), rounds, GROUP_COUNTS[-1:] if arguments.quick else GROUP_COUNTS)
