"""Step of a stage in which the embeddings alone learn against one in which all does: time, memory, and their plans.

1. ``make_step``: a trainer of a small Llama, with weights drawn alike; ``trainable`` is all that differs.
2. ``check_equal``: the first losses agree, else nothing is measured.
3. ``run_in_turns``: one step of each a round, same windows. Beside the ratio stands that of the operations
   (``count_flops``), which knows neither the optimizer nor anything that is not a matrix product.
4. ``count_held``: gradient buffers and optimizer state, on the trainer's own tensors.
5. ``measure_alone``: two steps in a process of their own, how far its memory rises; beside it the bytes that
   ``tools/plan_run.py`` plans.

The head, which saves nothing, has 5 per cent of the weights: between 7B with 48,000 rows (3) and 8B with 128,000 (7).

``python benchmarks/stage1.py [--quick] [--size VOCABULARY]``
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from measuring.report import make_parser, print_figures, print_table, show_ratio
from measuring.rounds import compare, make_timed, measure, run_fresh, run_in_turns
from measuring.tensors import require_cpu

from megatron_adapt.config import Layout, StageSettings, TrainSettings
from megatron_adapt.engine.llama import build_model
from megatron_adapt.engine.parallel import start_engine
from megatron_adapt.engine.trainable import freeze_rest
from megatron_adapt.errors import EngineError
from megatron_adapt.flags import run_tool
from megatron_adapt.shape import LlamaShape
from megatron_adapt.train.flops import count_flops
from megatron_adapt.train.memory import Job, measure_rank
from megatron_adapt.train.optimizer import Trainer, build_trainer
from megatron_adapt.train.step import train_step

SEQ_LENGTH, BATCH, VOCAB_SIZE, QUICK_VOCAB_SIZE = 512, 4, 4096, 512
SIZES = {"num_layers": 6, "hidden_size": 1024, "ffn_hidden_size": 2816, "num_attention_heads": 16}
QUICK_SIZES = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4}
ROUNDS, QUICK_ROUNDS = 7, 2
TRAINABLE = ("all", "embeddings")
TOLERANCE = {"fp32": 1e-6, "bf16": 1e-3}
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
"For a fresh process: what is freed goes back to the system, or its memory is what the allocator keeps."
MIB = 1 << 20


@dataclass(frozen=True)
class Case:
    """What is trained, but for what of it learns."""

    shape: LlamaShape
    bf16: bool

    @property
    def name(self) -> str:
        """The type of the weights."""
        return "bf16" if self.bf16 else "fp32"

    @property
    def train(self) -> TrainSettings:
        """Settings of the run."""
        return TrainSettings(
            seq_length=SEQ_LENGTH, micro_batch_size=BATCH, global_batch_size=BATCH, bf16=self.bf16
        )  # fmt: skip

    def make_windows(self) -> np.ndarray:
        """Return [B, T + 1] token ids, always the same."""
        return np.random.default_rng(0).integers(0, self.shape.vocab_size, (BATCH, SEQ_LENGTH + 1))


def make_shape(vocab_size: int, sizes: dict[str, int]) -> LlamaShape:
    """Return a Llama with tied matrices and a key-value head for every query head."""
    heads = sizes["num_attention_heads"]
    return LlamaShape(
        **sizes, num_query_groups=heads, kv_channels=sizes["hidden_size"] // heads, vocab_size=vocab_size,
        max_position_embeddings=SEQ_LENGTH, layernorm_epsilon=1e-5, rotary_base=1e4, rope_scaling=None, tied=True,
    )  # fmt: skip


def make_stage(trainable: str) -> StageSettings:
    """Return a stage that begins at its full learning rate."""
    return StageSettings(name="one", tokens=1, blend={"en": 1.0}, trainable=trainable, lr_warmup_fraction=0.0)


def make_trainer(case: Case, trainable: str) -> Trainer:
    """Draw a model and build what trains it; needs a started engine."""
    vocab_size = case.shape.vocab_size
    model = build_model(
        case.shape, padded_vocab_size=vocab_size, layout=Layout(), seq_length=SEQ_LENGTH, bf16=case.bf16
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.02, generator=generator) if weight.dim() > 1 else weight.fill_(1)
    freeze_rest(model, trainable)
    return build_trainer([model], case.train, make_stage(trainable), num_steps=1000)


def make_step(trainer: Trainer, windows: np.ndarray) -> Callable[[], float]:
    """Return a function that does one step of a training stage and returns the loss."""
    return lambda: train_step(trainer, windows, BATCH).loss


def check_equal(case: Case, losses: dict[str, float]) -> None:
    """Compare the first losses.

    Raises:
        EngineError: the difference is more than rounding.
    """
    whole, frozen = (losses[trainable] for trainable in TRAINABLE)
    if abs(frozen / whole - 1) > TOLERANCE[case.name]:
        raise EngineError(f"stage1: {case.name}: loss {whole}, with a frozen body {frozen}; mend this first")


def count_held(trainer: Trainer) -> dict[str, float]:
    """Count gradient buffers, and fp32 masters and moments after a step, in MiB."""
    weights = [weight for model in trainer.bare_models for weight in model.parameters()]
    own = {weight.untyped_storage().data_ptr() for weight in weights}
    steps = [weight for group in trainer.optimizer.param_groups for weight in group["params"]]
    masters = sum(weight.nbytes for weight in steps if weight.untyped_storage().data_ptr() not in own)
    states = [state for part in trainer.optimizer.chained_optimizers for state in part.optimizer.state.values()]
    moments = sum(moment.nbytes for state in states for moment in state.values())
    gradients = sum(buffer.grad_data.nbytes for model in trainer.models for buffer in model.buffers)
    return {"gradients": gradients / MIB, "optimizer": (masters + moments) / MIB}


def measure_alone(case: Case, trainable: str) -> float:
    """Do two steps in this process, which has done nothing before; return how far its memory rose, in MiB."""
    with start_engine(Layout(), seed=0):
        return measure(take_steps, case, trainable).extra_mib


def take_steps(case: Case, trainable: str) -> None:
    """Draw a model and do two steps with it."""
    step = make_step(make_trainer(case, trainable), case.make_windows())
    step()
    step()


def plan(case: Case, trainable: str) -> float:
    """Return what a rank of this training takes by ``tools/plan_run.py``, in MiB."""
    job = Job(
        shape=case.shape, padded_vocab_size=case.shape.vocab_size, train=case.train, stage=make_stage(trainable),
        world_size=1, on_gpu=False,
    )  # fmt: skip
    return measure_rank(job, 0).total / MIB


def measure_case(case: Case, num_rounds: int) -> dict[str, Any]:
    """Measure both ways to train, one beside the other and each alone."""
    windows = case.make_windows()
    with start_engine(Layout(), seed=0):
        trainers = {trainable: make_trainer(case, trainable) for trainable in TRAINABLE}
        steps = {trainable: make_step(trainer, windows) for trainable, trainer in trainers.items()}
        check_equal(case, {trainable: step() for trainable, step in steps.items()})
        held = {trainable: count_held(trainer) for trainable, trainer in trainers.items()}
        seconds = run_in_turns({trainable: make_timed(step) for trainable, step in steps.items()}, num_rounds)
    whole, frozen = (count_flops(case.shape, SEQ_LENGTH, trainable) for trainable in TRAINABLE)
    return {
        "case": case.name,
        "tokens_per_second": {name: BATCH * SEQ_LENGTH / median(taken) for name, taken in seconds.items()},
        "time_ratio": compare(seconds, *TRAINABLE),
        "flops_ratio": whole / frozen,
        "held_mib": held,
        "peak_mib": {trainable: run_fresh(measure_alone, case, trainable) for trainable in TRAINABLE},
        "planned_mib": {trainable: plan(case, trainable) for trainable in TRAINABLE},
    }


def run(vocab_size: int, num_rounds: int, sizes: dict[str, int]) -> None:
    """Measure all cases and print them.

    Raises:
        EngineError: there is a GPU, and the engine would use it; or the two ways do not have the same loss.
    """
    require_cpu("stage1")
    os.environ.update(ALLOCATOR)
    shape = make_shape(vocab_size, sizes)
    cases = [measure_case(Case(shape, bf16), num_rounds) for bf16 in (False, True)]
    print(f"Step: {BATCH} windows of {SEQ_LENGTH}, {shape.num_parameters:,} weights, all learn or the embeddings alone")
    print_table(
        ("weights", "tokens/s all", "embeddings", "time ratio (range)", "ratio of operations"),
        [(case["case"], *case["tokens_per_second"].values(), show_ratio(case["time_ratio"]), case["flops_ratio"])
         for case in cases],
    )  # fmt: skip
    print_table(
        ("weights, what learns", "gradients MiB", "optimizer MiB", "peak MiB", "planned MiB"),
        [(f"{case['case']}, {name}", *case["held_mib"][name].values(), case["peak_mib"][name],
          case["planned_mib"][name]) for case in cases for name in TRAINABLE],
    )  # fmt: skip
    figures = {"rounds": num_rounds, "threads": torch.get_num_threads(), "weights": shape.num_parameters}
    print_figures("stage1", ("torch", "megatron-core"), {**figures, "cases": cases})


if __name__ == "__main__":
    parser = make_parser(__doc__, default_rounds=ROUNDS, size=VOCAB_SIZE, unit="tokens in the vocabulary")
    arguments = parser.parse_args()
    size = int(arguments.size or (QUICK_VOCAB_SIZE if arguments.quick else VOCAB_SIZE))
    rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS)
    run_tool(run, size, rounds, QUICK_SIZES if arguments.quick else SIZES)
