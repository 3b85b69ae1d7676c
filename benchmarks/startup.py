"""From nothing to the first step of training: a plain transformers loop against ``tools/pretrain.py``.

1. ``make_run``: a small base of a recipe, by ``tools/adapt.py``: corpus, tokenizer, weights, token files.
2. ``PEER``: imports torch and transformers, loads the weights, takes one step on windows that are random numbers.
3. ``time_ours``: a stage of the recipe, with all that it checks and reads before: plan, token files, checkpoint,
   engine, and the validation of step 0.
4. ``run_in_turns``: each in a new process; the clock stops at its line about step 1.

``python benchmarks/startup.py [--quick] [--size COLUMNS]``
"""

import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from measuring.report import make_parser, print_figures, print_table, show_ratio
from measuring.rounds import compare, run_in_turns

from megatron_adapt.errors import EngineError
from megatron_adapt.flags import run_tool

TOOLS = Path(__file__).parents[1] / "tools"
COLUMNS, QUICK_COLUMNS, ROUNDS, QUICK_ROUNDS = 512, 64, 5, 1
SEQ_LENGTH, BATCH, VOCAB_SIZE = 128, 8, 600
RECIPE = """
work_dir = "{root}/run"
old_languages = ["en"]
new_languages = []

[corpus]
en = ["{root}/en.json"]

[base]
vocab_size = {vocab_size}
num_layers = 8
hidden_size = {columns}
ffn_hidden_size = {columns}
num_attention_heads = 4
num_query_groups = 4
max_position_embeddings = {seq_length}

[base_train]
name = "base"
tokens = {tokens}
blend = {{ en = 1.0 }}

[train]
seq_length = {seq_length}
micro_batch_size = {batch}
global_batch_size = {batch}
eval_windows = {batch}
log_interval = 1
bf16 = false

[evaluate]
seq_length = {seq_length}
"""
PEER = """
import sys, torch
from transformers import LlamaForCausalLM
model = LlamaForCausalLM.from_pretrained(sys.argv[1], attn_implementation="sdpa")
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
ids = torch.randint(0, model.config.vocab_size, ({batch}, {seq_length}))
model(input_ids=ids, labels=ids).loss.backward()
torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
optimizer.step()
print("step 1/", file=sys.stderr, flush=True)
"""


def make_run(root: Path, columns: int) -> Path:
    """Make what a stage starts from; return the recipe."""
    draw, recipe = random.Random(0), root / "recipe.toml"
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(400)]
    texts = [" ".join(draw.choices(words, k=draw.randint(20, 80))) for _ in range(400)]
    lines = "".join(f'{{"id": "{at}", "text": "{text}"}}\n' for at, text in enumerate(texts))
    (root / "en.json").write_text(lines)
    sizes = {"vocab_size": VOCAB_SIZE, "columns": columns, "seq_length": SEQ_LENGTH, "batch": BATCH}
    recipe.write_text(RECIPE.format(root=root, tokens=2 * BATCH * SEQ_LENGTH, **sizes))
    done = subprocess.run([sys.executable, TOOLS / "adapt.py", "--recipe", recipe], capture_output=True, check=False)
    if done.returncode:
        raise EngineError(f"startup: {recipe} cannot be trained; {done.stderr.decode()[-2000:]}")
    return recipe


def time_first_step(command: Sequence[str | Path]) -> float:
    """Start a process; return the seconds until it says that step 1 is done, and end it.

    Raises:
        EngineError: it ended before.
    """
    begun = time.perf_counter()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if "step 1/" in line:
                seconds = time.perf_counter() - begun
                process.kill()
                return seconds
    raise EngineError(f"startup: {command[1]} ended before its first step; {''.join(said)[-2000:]}")


def time_ours(recipe: Path) -> float:
    """Time the first step of a stage that was never started."""
    shutil.rmtree(recipe.parent / "run" / "base" / "checkpoints")
    return time_first_step([sys.executable, TOOLS / "pretrain.py", "--recipe", recipe, "--stage", "base"])


def run(columns: int, num_rounds: int) -> None:
    """Measure and print."""
    with TemporaryDirectory() as folder:
        root = Path(folder)
        recipe = make_run(root, columns)
        peer = PEER.format(batch=BATCH, seq_length=SEQ_LENGTH)
        calls: dict[str, Callable[[], float]] = {
            "transformers": partial(time_first_step, [sys.executable, "-c", peer, root / "run" / "base" / "scratch"]),
            "ours": partial(time_ours, recipe),
        }
        seconds = run_in_turns(calls, num_rounds)
    ratio = compare(seconds, "transformers", "ours")
    best = {name: min(values) for name, values in seconds.items()}
    print("From the start of a process to its first step, best of the rounds")
    rows = [("transformers", best["transformers"], ""), ("ours", best["ours"], show_ratio(ratio))]
    print_table(("program", "seconds", "time ratio (range)"), rows)
    figures = {"rounds": num_rounds, "columns": columns, "seconds": best, "time_ratio": ratio}
    print_figures("startup", ("torch", "megatron-core", "transformers"), figures)


if __name__ == "__main__":
    parser = make_parser(__doc__, default_rounds=ROUNDS, size=COLUMNS, unit="columns of the model")
    arguments = parser.parse_args()
    size = int(arguments.size or (QUICK_COLUMNS if arguments.quick else COLUMNS))
    run_tool(run, size, arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS))
