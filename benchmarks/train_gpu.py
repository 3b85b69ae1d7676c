"""One layer of 8B shape and a model of 1B on a GPU: what share of a matrix product's rate each way to train reaches.

1. ``make_weights``: one model in bf16, as a Hugging Face folder and as a Megatron checkpoint.
2. ``make_steps``: ours with Triton's kernels and with their torch twins; transformers with SDPA, the same compiled, and
   with Liger Kernel where that is installed. Peers have bf16 weights and moments and no fp32 masters, which is less
   work than ours. Of the layer the passes forward and backward alone are timed, of the model the whole step.
3. ``check_equal``: the first losses agree, else nothing is measured.
4. ``run_in_turns``: one step of each a round and a large matrix product beside them; ``count_flops`` gives the
   operations of the model.

The layer has a vocabulary of 1,024, whose head is 2 per cent of it. Compiling takes minutes: ``--peers`` names those to
measure. Without a GPU, under ``TRITON_INTERPRET=1``, ``--quick`` shows that the script runs, and nothing else.

``python benchmarks/train_gpu.py [--quick] [--size TOKENS] [--peers NAME ...]``
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np
import torch
from measuring.llama import load_peer, make_ours, make_peer, make_weights
from measuring.report import make_parser, print_figures, print_table, show_ratio
from measuring.rounds import compare, make_timed, run_in_turns
from transformers.models.llama import modeling_llama

from megatron_adapt.checkpoint.root import read_description
from megatron_adapt.config import Layout
from megatron_adapt.engine.kernels.dispatch import choose_kernels
from megatron_adapt.engine.parallel import get_device, start_engine
from megatron_adapt.errors import EngineError
from megatron_adapt.flags import run_tool
from megatron_adapt.train.flops import count_flops

HEADS, QUICK_HEADS = ({"num_attention_heads": heads, "num_key_value_heads": heads // 4} for heads in (32, 4))
LAYER_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 1, "vocab_size": 1024}
MODEL_1B = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 131_072}
MODELS = {"one layer of 8B": {**LAYER_8B, **HEADS}, "1B": {**MODEL_1B, **HEADS}}
QUICK_SIZES = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 256, **QUICK_HEADS}
QUICK_MODELS = {
    "one layer": {**QUICK_SIZES, "num_hidden_layers": 1},
    "two layers": {**QUICK_SIZES, "num_hidden_layers": 2},
}
NUM_TOKENS, QUICK_TOKENS, GEMM_SIZE, QUICK_GEMM_SIZE = 8192, 32, 8192, 256
ROUNDS, QUICK_ROUNDS, WARM_UP = 15, 2, 3
TOLERANCE = 1e-2
PEERS = ("ours_torch", "transformers", "transformers_compiled", "transformers_liger")


def make_steps(
    hf: Path, checkpoint: Path, windows: np.ndarray, peers: Collection[str], *, updates: bool
) -> Iterator[tuple[str, Callable[[], float]]]:
    """Yield each way to train, by name, as a function that does a step and returns the loss; ours comes first."""
    yield "ours", make_ours(checkpoint, windows, bf16=True, kernels="triton", updates=updates)
    if "ours_torch" in peers:
        yield "ours_torch", make_ours(checkpoint, windows, bf16=True, kernels="torch", updates=updates)
    if "transformers" in peers:
        yield "transformers", make_peer(load_peer(hf, torch.bfloat16), windows, updates=updates)
    if "transformers_compiled" in peers:
        compiled = torch.compile(load_peer(hf, torch.bfloat16))
        yield "transformers_compiled", make_peer(compiled, windows, updates=updates)
    if "transformers_liger" in peers:
        yield "transformers_liger", make_liger(hf, windows, updates=updates)


def make_liger(hf: Path, windows: np.ndarray, *, updates: bool) -> Callable[[], float]:
    """Return a step with Liger's kernels, which other models of this process do not see."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    model = load_peer(hf, torch.bfloat16)
    with mock.patch.dict(vars(modeling_llama)):
        apply_liger_kernel_to_llama(model=model)
        rotate = modeling_llama.apply_rotary_pos_emb
    step = make_peer(model, windows, updates=updates)

    def run() -> float:
        # RoPE is a function of the module, and Liger replaces it there.
        with mock.patch.object(modeling_llama, "apply_rotary_pos_emb", rotate):
            return step()

    return run


def check_equal(losses: Mapping[str, float]) -> None:
    """Compare the first losses.

    Raises:
        EngineError: the difference is more than rounding.
    """
    for name, loss in losses.items():
        if abs(loss / losses["ours"] - 1) > TOLERANCE:
            raise EngineError(f"{name}: loss {loss}, ours has {losses['ours']}; mend this first")


def measure_case(
    name: str, config: Mapping[str, int], num_tokens: int, gemm_size: int, num_rounds: int, peers: Collection[str]
) -> Iterator[dict[str, Any]]:
    """Measure all ways to train one model."""
    windows = np.random.default_rng(0).integers(0, config["vocab_size"], (1, num_tokens + 1))
    matrix = torch.randn(gemm_size, gemm_size, device=get_device(), dtype=torch.bfloat16)
    with TemporaryDirectory() as folder:
        hf, checkpoint = make_weights(Path(folder), config, num_tokens, torch.bfloat16)
        shape = read_description(checkpoint).shape
        steps = dict(make_steps(hf, checkpoint, windows, peers, updates=config["num_hidden_layers"] > 1))
    check_equal({way: step() for way, step in steps.items()})
    calls = {way: make_timed(step) for way, step in steps.items()}
    # Read back, as a step reads its loss, so that the clock waits for the GPU.
    calls["gemm"] = make_timed(lambda: torch.mm(matrix, matrix)[0, 0].item())
    run_in_turns(calls, WARM_UP)
    seconds = run_in_turns(calls, num_rounds)
    work = num_tokens * count_flops(shape, num_tokens, "all")
    gemm_rate = 2 * gemm_size**3 / median(seconds["gemm"])
    for way in steps:
        rate = work / median(seconds[way])
        yield {
            "case": f"{name}, {way}",
            "milliseconds": 1e3 * median(seconds[way]),
            "tflops": rate / 1e12,
            "gemm_share": rate / gemm_rate,
            "time_ratio": compare(seconds, way, "ours"),
        }


def run(
    models: Mapping[str, Mapping[str, int]], num_tokens: int, gemm_size: int, num_rounds: int, peers: Collection[str]
) -> None:
    """Measure all models and print them.

    Raises:
        EngineError: Triton's kernels do not run here, or two ways do not have the same loss.
    """
    choose_kernels("triton")
    if "transformers_liger" in peers and find_spec("liger_kernel") is None:
        print("liger_kernel is not installed: transformers_liger is left out")
        peers = [peer for peer in peers if peer != "transformers_liger"]
    with start_engine(Layout(), seed=0):
        figures = [
            found
            for name, config in models.items()
            for found in measure_case(name, config, num_tokens, gemm_size, num_rounds, peers)
        ]
    print(f"Training on {num_tokens:,} tokens, bf16, on {get_device().type}")
    print_table(
        ("model, way", "ms", "TFLOP/s of the model", "share of a matrix product's", "time over ours (range)"),
        [(*list(found.values())[:-1], show_ratio(found["time_ratio"])) for found in figures],
    )
    shared = {"device": get_device().type, "tokens": num_tokens, "rounds": num_rounds}
    print_figures("train_gpu", ("torch", "megatron-core", "transformers", "triton"), {**shared, "cases": figures})


if __name__ == "__main__":
    parser = make_parser(__doc__, default_rounds=ROUNDS, size=NUM_TOKENS, unit="tokens")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS, metavar="NAME", help=", ".join(PEERS))
    arguments = parser.parse_args()
    if arguments.quick:
        sizes, rounds = (QUICK_MODELS, int(arguments.size or QUICK_TOKENS), QUICK_GEMM_SIZE), QUICK_ROUNDS
    else:
        sizes, rounds = (MODELS, int(arguments.size or NUM_TOKENS), GEMM_SIZE), ROUNDS
    run_tool(run, *sizes, arguments.rounds or rounds, arguments.peers)
