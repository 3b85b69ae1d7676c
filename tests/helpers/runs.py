"""A run folder ready to train, made in the test: a tiny model, its tokenizer, and token files of two languages."""

import random
import shutil
from pathlib import Path
from typing import Any

import orjson

from megatron_adapt.checkpoint.convert import convert_checkpoint
from megatron_adapt.config import CheckpointSettings, ConvertCheckpoint, DataSettings, PreprocessData
from megatron_adapt.data.encode import preprocess_data
from megatron_adapt.flags import load_recipe
from megatron_adapt.logs import read_metrics
from megatron_adapt.train.loop import train
from tests.helpers.tiny import write_llama

RECIPE = """
work_dir = "{work_dir}"
base_model = "{hf}"
old_languages = ["en"]
new_languages = ["xx"]

[corpus]
en = ["{raw}/en.jsonl"]
xx = ["{raw}/xx.jsonl"]

[train]
seq_length = 16
micro_batch_size = 2
global_batch_size = 12
bf16 = false
log_interval = 1
eval_interval = 3
eval_windows = 5
save_interval = 3

[evaluate]
seq_length = 64

[[train.stages]]
name = "first"
tokens = {tokens}
blend = {{ en = 0.25, xx = 0.75 }}
trainable = "all"
lr = 1e-2
min_lr = 1e-3
lr_warmup_fraction = 0.3

[[train.stages]]
name = "second"
tokens = {tokens}
blend = {{ en = 0.5, xx = 0.5 }}
trainable = "embeddings"
lr = 1e-2
"""
NUM_STEPS = 6
TOKENS = NUM_STEPS * 12 * 16


def make_texts(words: list[str], num_documents: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(words, k=draw.randint(3, 30))) for _ in range(num_documents)]


def write_documents(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(orjson.dumps({"text": text}, option=orjson.OPT_APPEND_NEWLINE) for text in texts))
    return path


def encode_documents(raw: Path, tokenizer: Path, tokens: Path) -> None:
    """Encode every file of documents, each to a dataset of its name."""
    for documents in sorted(raw.glob("*.jsonl")):
        preprocess_data(
            PreprocessData(
                input=(documents,),
                tokenizer=tokenizer,
                output_prefix=tokens / documents.stem,
                settings=DataSettings(append_eod=True),
            )
        )


def make_run(folder: Path, *, vocab_pad_multiple: int = 128, **model: Any) -> Path:
    """Write everything a training stage reads below ``folder``; return the recipe."""
    hf, raw, work_dir = folder / "hf", folder / "raw", folder / "run"
    write_llama(hf, initializer_range=0.02, **model)
    convert_checkpoint(
        ConvertCheckpoint(
            source=hf,
            to="megatron",
            output=work_dir / "megatron",
            settings=CheckpointSettings(vocab_pad_multiple=vocab_pad_multiple),
        )
    )
    for language, words in (("en", "the cat saw a dog on hill".split()), ("xx", "ბა გუ დი ვო".split())):
        for part, num_documents in (("train", 80), ("valid", 10)):
            write_documents(raw / f"{language}-{part}.jsonl", make_texts(words, num_documents, seed=num_documents))
    encode_documents(raw, hf, work_dir / "tokens")
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE.format(work_dir=work_dir, hf=hf, raw=raw, tokens=TOKENS))
    return recipe


def copy_run(recipe: Path, folder: Path, *, trained: bool = False) -> Path:
    """Copy what a run starts from, and with ``trained`` its checkpoints; return the recipe of the copy."""
    shutil.copytree(recipe.parent, folder, ignore=None if trained else shutil.ignore_patterns("checkpoints"))
    copied = folder / recipe.name
    copied.write_text(copied.read_text().replace(str(recipe.parent), str(folder)))
    return copied


def train_stage(recipe: Path, stage: str, *flags: str) -> list[dict[str, Any]]:
    """Train a stage in this process (on this rank); return the rows of its metrics."""
    loaded, name = load_recipe(["--recipe", str(recipe), "--stage", stage, *flags], stage=True)
    train(loaded, name)
    return read_metrics(loaded.work_dir / "checkpoints" / stage / "metrics.jsonl")


def get_curve(rows: list[dict[str, Any]]) -> list[float]:
    """Return the loss of every row of metrics that has one."""
    return [row["loss"] for row in rows if "loss" in row]
