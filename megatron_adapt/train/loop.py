"""The training run: one stage of a recipe, from its first step or from its last checkpoint.

Reads: a Megatron checkpoint, token files, the recipe. Writes: ``checkpoints/<stage>/`` with ``plan.json``,
``metrics.jsonl``, ``iter_.../`` and ``stage.json`` at the end. Guarantees: the losses do not depend on the
parallel layout beyond rounding; 6 steps equal 3 steps, a new launch and 3 steps, exactly.

1. ``open_data``: plan the blend in integers and open the windows.
2. ``start_engine``: process groups, megatron-core.
3. ``build_model``, ``freeze_rest``, ``build_trainer``: model, what learns, optimizer and schedule.
4. ``load_state``, or the weights of the stage before.
5. ``run_steps``: step, log, validate, save.
"""

import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from megatron_adapt.checkpoint.dist import find_checkpoint, read_description
from megatron_adapt.checkpoint.weights import load_weights
from megatron_adapt.config import Recipe, TrainSettings
from megatron_adapt.data.dataset import BlendedWindows, ValidationWindows
from megatron_adapt.data.plan import plan_stage, write_plan
from megatron_adapt.engine.llama import build_model
from megatron_adapt.engine.parallel import Layout, get_device, start_engine
from megatron_adapt.engine.trainable import freeze_rest
from megatron_adapt.errors import CheckpointError, ConfigError
from megatron_adapt.files import STAGE_FILE, is_finished, write_stage
from megatron_adapt.logs import MetricsWriter, is_main_rank
from megatron_adapt.run_folder import StagePlace, find_stage
from megatron_adapt.shape import LlamaShape, check_layout
from megatron_adapt.tokenizer.pieces import piece_bytes, read_tokenizer
from megatron_adapt.train.optimizer import Trainer, build_trainer
from megatron_adapt.train.state import load_state, save_state
from megatron_adapt.train.step import measure_bits_per_byte, train_step

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageData:
    """The windows a stage trains and validates on."""

    blend: BlendedWindows
    valid: dict[str, NDArray[np.int64]]
    "Validation windows per language, [number, T + 1]."
    token_bytes_V: NDArray[np.int64]
    "Bytes of text of every token id of the padded vocabulary."


def train(recipe: Recipe, stage_name: str) -> None:
    """Run one stage of the recipe, or continue it, on the ranks of this job.

    Raises:
        ConfigError: a setting does not fit the model or the data.
        CheckpointError: the checkpoint and the token files belong to different tokenizers.
        DataError: token files are missing or damaged.
    """
    place = find_stage(recipe, stage_name)
    settings = recipe.train
    initial = find_checkpoint(place.initial)
    description = read_description(initial)
    shape = LlamaShape.from_dict(description["shape"])
    layout = Layout(
        tensor_model_parallel_size=settings.tensor_model_parallel_size,
        pipeline_model_parallel_size=settings.pipeline_model_parallel_size,
        sequence_parallel=settings.sequence_parallel,
    )
    check_layout(
        shape,
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        sequence_parallel=layout.sequence_parallel,
        seq_length=settings.seq_length,
    )
    data = open_data(recipe, place, description)
    with start_engine(layout, settings.seed):
        _check_batch(settings)
        model = build_model(
            shape,
            padded_vocab_size=description["padded_vocab_size"],
            layout=layout,
            seq_length=settings.seq_length,
            bf16=settings.bf16,
        )
        learning = freeze_rest(model, place.settings.trainable)
        _logger.info("stage %s: %s values of this rank learn", stage_name, f"{learning:,}")
        trainer = build_trainer(model, settings, place.settings, data.blend.plan.num_steps)
        _run_from_checkpoint(trainer, place, settings, data, initial, description)


def open_data(recipe: Recipe, place: StagePlace, description: dict[str, Any]) -> StageData:
    """Plan the stage's blend and open its training and validation windows.

    Args:
        recipe: the run.
        place: the stage.
        description: ``adapt.json`` of the checkpoint the stage starts from.

    Raises:
        CheckpointError: the token files were written by another tokenizer than the checkpoint's.
        DataError: a source is missing, empty or damaged.
    """
    plan = plan_stage(recipe, place.settings.name)
    blend = BlendedWindows(plan, {source: place.run.tokens(source, "train") for source in plan.sources})
    if blend.tokenizer_fingerprint != description["tokenizer_fingerprint"]:
        record = blend.records[plan.sources[0]]
        raise CheckpointError(
            f"{place.run.tokens(plan.sources[0], 'train')}: written by tokenizer {record.tokenizer_fingerprint} with "
            f"{record.vocab_size} tokens, but the checkpoint {place.initial} was made for tokenizer "
            f"{description['tokenizer_fingerprint']} with {description['true_vocab_size']}; "
            "run tools/preprocess_data.py with the checkpoint's tokenizer"
        )
    valid = {}
    for language in plan.sources:
        windows = ValidationWindows(
            place.run.tokens(language, "valid"), recipe.train.eval_windows, recipe.train.seq_length
        )
        valid[language] = windows.read_windows(0, len(windows))
    token_bytes_V = np.zeros(description["padded_vocab_size"], dtype=np.int64)
    pieces = piece_bytes(read_tokenizer(place.initial / "hf"))
    token_bytes_V[: len(pieces)] = [len(piece) for piece in pieces]
    return StageData(blend, valid, token_bytes_V)


def _check_batch(settings: TrainSettings) -> None:
    ranks = dist.get_world_size() // (settings.tensor_model_parallel_size * settings.pipeline_model_parallel_size)
    if settings.global_batch_size % (ranks * settings.micro_batch_size):
        raise ConfigError(
            f"train.global_batch_size: {settings.global_batch_size} is not a multiple of micro_batch_size "
            f"{settings.micro_batch_size} x {ranks} data-parallel ranks; "
            f"use a multiple of {ranks * settings.micro_batch_size}"
        )


def _run_from_checkpoint(
    trainer: Trainer,
    place: StagePlace,
    settings: TrainSettings,
    data: StageData,
    initial: Path,
    description: dict[str, Any],
) -> None:
    root = place.run.checkpoints(place.settings.name)
    plan = data.blend.plan
    description = {
        **{name: value for name, value in description.items() if name != "step"},
        "dtype": "bfloat16" if settings.bf16 else "float32",
        "plan_hash": plan.plan_hash,
        "data_fingerprints": data.blend.data_fingerprints,
    }
    done = load_state(root, trainer, description)
    if done == 0:
        load_weights([trainer.bare_model], initial)
        trainer.optimizer.reload_model_params()
    if is_main_rank():
        root.mkdir(parents=True, exist_ok=True)
        shutil.copytree(place.initial / "hf", root / "hf", dirs_exist_ok=True)
        write_plan(root / "plan.json", plan)
    stop = plan.num_steps
    if settings.stop_after_steps:
        stop = min(stop, done + settings.stop_after_steps)
    last_metrics = run_steps(trainer, place, settings, data, first=done, stop=stop, description=description)
    if is_main_rank() and stop == plan.num_steps:
        config = {"stage": place.settings, "train": settings}
        inputs = [initial / "adapt.json"]
        write_stage(root / STAGE_FILE, config=config, inputs=inputs, counts=last_metrics)


def run_steps(
    trainer: Trainer,
    place: StagePlace,
    settings: TrainSettings,
    data: StageData,
    *,
    first: int,
    stop: int,
    description: dict[str, Any],
) -> dict[str, Any]:
    """Do the optimizer steps ``first`` to ``stop``; log, validate and save on the way.

    Returns:
        The last row of metrics.
    """
    root = place.run.checkpoints(place.settings.name)
    metrics = MetricsWriter(root / "metrics.jsonl", first) if is_main_rank() else None
    batch, plan = settings.global_batch_size, data.blend.plan
    row: dict[str, Any] = {}
    if first == 0:
        row = {"step": 0, "valid_bits_per_byte": validate(trainer, data, settings)}
        _report(metrics, row, plan.num_steps)
    windows_seen = data.blend.count_before(first * batch)
    clock, clock_step = time.perf_counter(), first
    for step in range(first + 1, stop + 1):
        windows, sources = data.blend.read_windows((step - 1) * batch, batch)
        windows_seen = windows_seen + np.bincount(sources, minlength=len(plan.sources))
        report = train_step(trainer, windows, settings.micro_batch_size)
        validates = step % settings.eval_interval == 0 or step == plan.num_steps
        if step % settings.log_interval == 0 or validates or step == stop:
            seconds = time.perf_counter() - clock
            row = {
                "step": step,
                "loss": report.loss,
                "grad_norm": report.grad_norm,
                "learning_rate": report.learning_rate,
                "skipped": report.skipped,
                "tokens": {
                    name: int(count) * settings.seq_length
                    for name, count in zip(plan.sources, windows_seen, strict=True)
                },
                "tokens_per_second": (step - clock_step) * batch * settings.seq_length / seconds,
            }
            if validates:
                row["valid_bits_per_byte"] = validate(trainer, data, settings)
            _report(metrics, row, plan.num_steps)
            clock, clock_step = time.perf_counter(), step
        if step % settings.save_interval == 0 or step == stop:
            save_state(root, step, trainer, description)
    return row


def validate(trainer: Trainer, data: StageData, settings: TrainSettings) -> dict[str, float]:
    """Measure the loss on every language's validation windows, in bits per byte."""
    token_bytes_V = torch.from_numpy(data.token_bytes_V).to(get_device())
    return {
        language: measure_bits_per_byte(trainer.model, windows, token_bytes_V, settings.micro_batch_size)
        for language, windows in data.valid.items()
    }


def _report(metrics: MetricsWriter | None, row: dict[str, Any], num_steps: int) -> None:
    if metrics is None:
        return
    metrics.write(row)
    parts = [f"step {row['step']}/{num_steps}"]
    if "loss" in row:
        parts += [
            f"loss {row['loss']:.4f}",
            f"lr {row['learning_rate']:.2e}",
            f"grad norm {row['grad_norm']:.2f}",
            f"{row['tokens_per_second']:,.0f} tokens/s",
        ]
    valid = row.get("valid_bits_per_byte", {})
    parts += [f"{language} {value:.4f} bits/byte" for language, value in valid.items()]
    _logger.info("%s", "  ".join(parts))
