"""The training run: one stage of a recipe, from its first step or from its last checkpoint.

Reads: a Megatron checkpoint, token files, the recipe. Writes: ``checkpoints/<stage>/`` with ``plan.json``,
``metrics.jsonl``, ``iter_.../`` and, when the stage is finished, ``stage.json``. Guarantees: the losses do not depend
on the parallel layout beyond rounding; 6 steps equal 3 steps, a new launch and 3 steps, exactly.

1. ``open_inputs``: plan the blend in integers, open windows, check everything against the checkpoint.
2. ``start_engine``: process groups, megatron-core.
3. ``build_model``, ``freeze_rest``, ``build_trainer``: model, what learns, optimizer and schedule.
4. ``load_state`` of this stage, or ``load_weights`` of the one before.
5. ``run_steps``: step, log, validate, save.
"""

import logging
import math
import os
import shutil
from dataclasses import replace

import torch

from megatron_adapt.checkpoint.root import HF_FOLDER
from megatron_adapt.checkpoint.weights import load_weights
from megatron_adapt.data.plan import BlendPosition, write_plan
from megatron_adapt.data.plan_table import describe_plan
from megatron_adapt.data.stage_plans import check_trained
from megatron_adapt.engine.llama import build_chunks
from megatron_adapt.engine.parallel import get_device, start_engine
from megatron_adapt.engine.trainable import freeze_rest
from megatron_adapt.errors import EngineError
from megatron_adapt.files import STAGE_FILE, write_stage
from megatron_adapt.logs import is_main_rank
from megatron_adapt.parallelism import check_launch, count_batch_unit
from megatron_adapt.recipe import Recipe
from megatron_adapt.run_folder import is_trained
from megatron_adapt.train.agree import check_saved
from megatron_adapt.train.documents import mask_eod
from megatron_adapt.train.inputs import StageInputs, open_inputs
from megatron_adapt.train.metrics import StageMetrics, count_tokens, count_windows
from megatron_adapt.train.optimizer import Trainer, build_trainer
from megatron_adapt.train.saver import CheckpointSaver
from megatron_adapt.train.sinks import check_sinks
from megatron_adapt.train.state import load_state, load_trainer
from megatron_adapt.train.step import StepReport, measure_bits_per_byte, train_step
from megatron_adapt.train.stop import StopRequest

_logger = logging.getLogger(__name__)


def train(recipe: Recipe, stage_name: str) -> None:
    """Run one stage of the recipe, or continue it, on the ranks of this job.

    Raises:
        ConfigError: a setting does not fit the model or the ranks.
        CheckpointError: the weights, the token files or an earlier run of the stage do not fit.
        DataError: token files are missing or damaged.
    """
    inputs = open_inputs(recipe, stage_name)
    if is_trained(inputs.root, inputs.config):
        check_trained(recipe, stage_name)
        _logger.info("stage %s: finished before", stage_name)
        return
    settings, description = recipe.train, inputs.description
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    check_launch(settings, num_ranks=num_ranks)
    inputs.batches.check_unit(f"train.stages {stage_name}", count_batch_unit(settings, num_ranks=num_ranks))
    check_sinks(settings)
    _logger.info("stage %s\n%s", stage_name, describe_plan(inputs.blend.plan))
    if inputs.batches.is_ramped:
        _logger.info("stage %s: a growing batch, so %d steps", stage_name, inputs.batches.num_steps)
    with start_engine(settings, settings.seed):
        chunks = build_chunks(
            description.shape,
            padded_vocab_size=description.padded_vocab_size,
            layout=settings,
            seq_length=settings.seq_length,
            bf16=settings.bf16,
        )
        stage = inputs.place.settings
        # Distillation stops before the head, which would learn nothing from it.
        head, new_blocks = inputs.distillation is None, description.new_blocks
        learning = sum(freeze_rest(chunk, stage.trainable, head=head, new_blocks=new_blocks) for chunk in chunks)
        length = inputs.batches.count_progress(inputs.batches.num_steps)
        trainer = build_trainer(chunks, settings, stage, length, inputs.new_ids)
        learning -= sum(rows.num_values for rows in trainer.frozen_rows)
        _logger.info("stage %s: %s values of this rank learn", stage_name, f"{learning:,}")
        run_stage(trainer, inputs)


def run_stage(trainer: Trainer, inputs: StageInputs) -> None:
    """Load weights or the state of an earlier launch, run the steps, record the finished stage."""
    plan, settings = inputs.blend.plan, inputs.settings
    verify, last = settings.verify_checkpoint, inputs.batches.num_steps
    first = load_state(inputs.root, trainer, inputs.training, inputs.batches, verify=verify)
    if first == 0:
        check_saved(inputs.initial, verify=verify, continues=False)
    if first == 0 and inputs.place.settings.carry_optimizer:
        load_trainer(inputs.initial, trainer)
    elif first == 0:
        load_weights(trainer.bare_models, inputs.initial)
        trainer.optimizer.reload_model_params()
    if is_main_rank():
        inputs.root.mkdir(parents=True, exist_ok=True)
        shutil.copytree(inputs.hf, inputs.root / HF_FOLDER, dirs_exist_ok=True)
        write_plan(inputs.place.run.plan(inputs.place.settings.name), plan)
    stop = min(last, first + (settings.stop_after_steps or last))
    with (
        StopRequest(settings.exit_duration_in_mins) as request,
        StageMetrics(inputs, first) as metrics,
        CheckpointSaver(inputs.root, settings) as saver,
    ):
        done = run_steps(trainer, inputs, first, stop, request, metrics, saver)
    if is_main_rank() and done == last:
        counts = {"steps": last, "tokens": count_tokens(inputs, last)}
        write_stage(inputs.root / STAGE_FILE, config=inputs.config, inputs=inputs.read_paths, counts=counts)


def run_steps(
    trainer: Trainer,
    inputs: StageInputs,
    first: int,
    stop: int,
    request: StopRequest,
    metrics: StageMetrics,
    saver: CheckpointSaver,
) -> int:
    """Do the optimizer steps after ``first`` up to ``stop``; log, validate and save on the way.

    Returns:
        The last step that was done and that ``saver`` saves: ``stop``, or an earlier one where ``request`` found a
        reason.
    """
    settings, batches, last = inputs.settings, inputs.batches, inputs.batches.num_steps
    description = replace(inputs.description, dtype="bfloat16" if settings.bf16 else "float32")
    if first == 0:
        metrics.write({"step": 0}, validate(trainer, inputs))
    masked_id = inputs.eod_id if settings.eod_mask_loss else None
    metrics.clock.start(first)
    for step in range(first + 1, stop + 1):
        with metrics.clock.read():
            windows, sources_B, loss_mask = inputs.blend.read_windows(*batches.find(step))
            if masked_id is not None:
                loss_mask &= mask_eod(windows, masked_id)
        report = train_step(
            trainer,
            windows,
            settings.micro_batch_size,
            loss_mask=loss_mask,
            reset_at=inputs.reset_at,
            distillation=inputs.distillation,
            sources=metrics.name_sources(sources_B),
            progress=batches.count_progress(step) - batches.count_progress(step - 1),
        )
        saver.poll()
        _check_finite(report, step)
        metrics.add(report)
        reason = request.find_reason()
        if reason and step < stop:
            _logger.info("stopping after step %d: %s; the same call goes on", step, reason)
            stop = step
        validates = step % settings.eval_interval == 0 or step == last
        if step % settings.log_interval == 0 or validates or step == stop:
            row = metrics.make_row(step, report)
            with metrics.clock.pause():
                metrics.write(row, validate(trainer, inputs) if validates else None)
        if step % settings.save_interval == 0 or step == stop:
            fingerprints = {name: source.fingerprint for name, source in inputs.blend.sources.items()}
            position = BlendPosition(inputs.blend.plan, count_windows(inputs, step), fingerprints)
            with metrics.clock.pause(), trainer.hold_weights():
                saver.save(trainer, replace(description, step=step), inputs.training, position)
        if step == stop:
            break
    return stop


def _check_finite(report: StepReport, step: int) -> None:
    """Stop before a diverged model is saved over nothing wrong."""
    if not (math.isfinite(report.loss) and math.isfinite(report.grad_norm)):
        raise EngineError(
            f"step {step}: loss {report.loss}, norm of the gradient {report.grad_norm}; the run diverged at learning "
            f"rate {report.learning_rate:g}; lower it, and start again to continue from the last checkpoint"
        )


def validate(trainer: Trainer, inputs: StageInputs) -> dict[str, float]:
    """Measure the loss on every language's validation windows, in bits per byte."""
    token_bytes_V = torch.from_numpy(inputs.token_bytes_V).to(get_device())
    micro_batch_size, reset_at = inputs.settings.micro_batch_size, inputs.reset_at
    with trainer.hold_weights():
        return {
            language: measure_bits_per_byte(trainer.models, windows, token_bytes_V, micro_batch_size, reset_at=reset_at)
            for language, windows in inputs.valid.items()
        }
