"""Training step of a small Llama on the CPU: a plain transformers loop against ours, tokens per second.

1. ``make_weights``: one model, as a Hugging Face folder and as a Megatron checkpoint.
2. ``make_peer``: ``LlamaForCausalLM`` with SDPA, ``clip_grad_norm_``, ``torch.optim.AdamW(fused=True)``. bf16 is what a
   user of transformers writes: ``torch.autocast`` over fp32 weights. Pure bf16 weights, for comparison, learn with bf16
   moments and no fp32 masters: that is less than ours does.
3. ``make_ours``: ``train_step`` as a training stage calls it; bf16 with fp32 masters and fp32 gradients.
4. ``check_equal``: the first losses agree, else nothing is measured.
5. ``run_in_turns``: one step of each a round, same windows.

``python benchmarks/train_cpu.py [--quick] [--size VOCABULARY]``
"""

from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from measuring.llama import load_peer, make_ours, make_peer, make_weights
from measuring.report import make_parser, print_figures, print_table, show_ratio
from measuring.rounds import compare, make_timed, run_in_turns
from measuring.tensors import require_cpu

from megatron_adapt.config import Layout
from megatron_adapt.engine.parallel import start_engine
from megatron_adapt.errors import EngineError
from megatron_adapt.flags import run_tool

SEQ_LENGTH, BATCH, VOCAB_SIZE, QUICK_VOCAB_SIZE = 512, 4, 32_768, 2048
SHAPE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
QUICK_SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
ROUNDS, QUICK_ROUNDS = 7, 2
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}
CASES = (("fp32", "transformers_fp32"), ("bf16", "transformers_autocast"), ("bf16", "transformers_pure_bf16"))


def check_equal(losses: dict[str, float]) -> None:
    """Compare the first losses.

    Raises:
        EngineError: the difference is more than rounding.
    """
    for ours, peer in CASES:
        difference = abs(losses[f"ours_{ours}"] / losses[peer] - 1)
        if difference > TOLERANCE[ours]:
            raise EngineError(f"{peer}: loss {losses[peer]}, ours has {losses[f'ours_{ours}']}; mend this first")


def run(vocab_size: int, num_rounds: int, shape: dict[str, int]) -> None:
    """Measure all cases and print them.

    Raises:
        EngineError: there is a GPU, and the engine would use it.
    """
    require_cpu("train_cpu")
    windows = np.random.default_rng(0).integers(0, vocab_size, (BATCH, SEQ_LENGTH + 1))
    with TemporaryDirectory() as folder, start_engine(Layout(), seed=0):
        hf, checkpoint = make_weights(Path(folder), {"vocab_size": vocab_size, **shape}, SEQ_LENGTH)
        steps = {f"ours_{name}": make_ours(checkpoint, windows, bf16=name == "bf16") for name in TOLERANCE}
        for _, peer in CASES:
            model = load_peer(hf, torch.bfloat16 if peer == "transformers_pure_bf16" else torch.float32)
            steps[peer] = make_peer(model, windows, autocasts=peer == "transformers_autocast")
        losses = {name: step() for name, step in steps.items()}
        check_equal(losses)
        seconds = run_in_turns({name: make_timed(step) for name, step in steps.items()}, num_rounds)
    tokens = BATCH * SEQ_LENGTH
    figures = [
        {
            "case": peer,
            "tokens_per_second": {name: tokens / median(seconds[name]) for name in (peer, f"ours_{ours}")},
            "time_ratio": compare(seconds, peer, f"ours_{ours}"),
        }
        for ours, peer in CASES
    ]
    print(f"Training step: {BATCH} windows of {SEQ_LENGTH}, vocabulary {vocab_size:,}, {shape}")
    print_table(
        ("peer", "its tokens/s", "ours tokens/s", "time ratio (range)"),
        [(found["case"], *found["tokens_per_second"].values(), show_ratio(found["time_ratio"])) for found in figures],
    )
    shared: dict[str, Any] = {"rounds": num_rounds, "threads": torch.get_num_threads(), "first_losses": losses}
    print_figures("train_cpu", ("torch", "megatron-core", "transformers"), {**shared, "cases": figures})


if __name__ == "__main__":
    parser = make_parser(__doc__, default_rounds=ROUNDS, size=VOCAB_SIZE, unit="tokens in the vocabulary")
    arguments = parser.parse_args()
    size = int(arguments.size or (QUICK_VOCAB_SIZE if arguments.quick else VOCAB_SIZE))
    rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS)
    run_tool(run, size, rounds, QUICK_SHAPE if arguments.quick else SHAPE)
