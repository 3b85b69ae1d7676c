"""The training run: one stage of a recipe, from its first step or from its last checkpoint.

Reads: a Megatron checkpoint, token files, the recipe. Writes: ``checkpoints/<stage>/`` with ``plan.json``,
``metrics.jsonl``, ``iter_.../`` and, when the stage is finished, ``stage.json``. Guarantees: the losses do not depend
on the parallel layout beyond rounding; 6 steps equal 3 steps, a new launch and 3 steps, exactly.

1. ``open_inputs``: plan the blend in integers, open windows, check everything against the checkpoint.
2. ``start_engine``: process groups, megatron-core.
3. ``build_chunks``, ``freeze_rest``, ``build_trainer``: model, what learns, optimizer and schedule.
4. ``load_state`` of this stage, or ``load_weights`` of the one before.
5. ``StepLoop``: step, watch, log, validate, save.
"""

import logging
import os
import shutil
from contextlib import ExitStack
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
from megatron_adapt.files import STAGE_FILE, write_stage
from megatron_adapt.logs import is_main_rank
from megatron_adapt.parallelism import check_launch, count_batch_unit
from megatron_adapt.recipe import Recipe
from megatron_adapt.run_folder import is_trained
from megatron_adapt.train.agree import check_saved
from megatron_adapt.train.documents import mask_eod
from megatron_adapt.train.failure import record_failure
from megatron_adapt.train.guard import StepGuard
from megatron_adapt.train.inputs import StageInputs, open_inputs
from megatron_adapt.train.metrics import StageMetrics, count_tokens, count_windows
from megatron_adapt.train.optimizer import Trainer, build_trainer
from megatron_adapt.train.saver import CheckpointSaver
from megatron_adapt.train.sinks import check_sinks
from megatron_adapt.train.state import load_state, load_trainer
from megatron_adapt.train.step import StepReport, measure_bits_per_byte, train_step
from megatron_adapt.train.stop import StopRequest
from megatron_adapt.train.watchdog import Watchdog

_logger = logging.getLogger(__name__)


@record_failure()
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
    with start_engine(settings, settings.seed, settings.step_timeout_in_mins):
        chunks = build_chunks(
            description.shape,
            padded_vocab_size=description.padded_vocab_size,
            layout=settings,
            seq_length=settings.seq_length,
            bf16=settings.bf16,
            z_loss=settings.z_loss,
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
    with ExitStack() as stack:
        done = StepLoop(trainer, inputs, first, stack).run(stop)
    if is_main_rank() and done == last:
        counts = {"steps": last, "tokens": count_tokens(inputs, last)}
        write_stage(inputs.root / STAGE_FILE, config=inputs.config, inputs=inputs.read_paths, counts=counts)


class StepLoop:
    """The optimizer steps of one launch, and what goes with them: logging, validating, saving, watching."""

    def __init__(self, trainer: Trainer, inputs: StageInputs, first: int, stack: ExitStack) -> None:
        """Begin behind step ``first``; ``stack`` closes what is opened."""
        settings = inputs.settings
        self._trainer, self._inputs, self._first = trainer, inputs, first
        self._request = stack.enter_context(StopRequest(settings.exit_duration_in_mins))
        self._metrics = stack.enter_context(StageMetrics(inputs, first))
        self._saver = stack.enter_context(CheckpointSaver(inputs.root, settings))
        self._watchdog = stack.enter_context(Watchdog(settings.step_timeout_in_mins))
        self._guard = StepGuard(inputs, first)
        for model in trainer.models:
            self._watchdog.follow(model)

    def run(self, stop: int) -> int:
        """Do the steps up to ``stop``; log, validate and save on the way.

        Returns:
            The last step that was done and saved: ``stop``, or an earlier one where there was a reason to end.
        """
        settings, last = self._inputs.settings, self._inputs.batches.num_steps
        if self._first == 0:
            self._metrics.write({"step": 0}, self._validate(0))
        self._metrics.clock.start(self._first)
        for step in range(self._first + 1, stop + 1):
            self._watchdog.beat(f"step {step}")
            report = self._take(step)
            self._saver.poll()
            self._guard.check(step, report)
            self._metrics.add(report)
            reason = self._request.find_reason()
            if reason and step < stop:
                _logger.info("stopping after step %d: %s; the same call goes on", step, reason)
                stop = step
            validates = step % settings.eval_interval == 0 or step == last
            if step % settings.log_interval == 0 or validates or step == stop:
                row = self._metrics.make_row(step, report, skipped_steps=self._guard.num_skipped)
                with self._metrics.clock.pause():
                    self._metrics.write(row, self._validate(step) if validates else None)
            if step % settings.save_interval == 0 or step == stop:
                self._save(step)
            if step == stop:
                break
        return stop

    def _take(self, step: int) -> StepReport:
        """Read the windows of a step and train on them."""
        inputs, batches = self._inputs, self._inputs.batches
        with self._metrics.clock.read():
            windows, sources_B, loss_mask = inputs.blend.read_windows(*batches.find(step))
            if inputs.settings.eod_mask_loss:
                assert inputs.eod_id is not None
                loss_mask &= mask_eod(windows, inputs.eod_id)
        return train_step(
            self._trainer,
            windows,
            inputs.settings.micro_batch_size,
            loss_mask=loss_mask,
            reset_at=inputs.reset_at,
            distillation=inputs.distillation,
            sources=self._metrics.name_sources(sources_B),
            progress=batches.count_progress(step) - batches.count_progress(step - 1),
        )

    def _validate(self, step: int) -> dict[str, float]:
        self._watchdog.beat(f"the validation after step {step}")
        return validate(self._trainer, self._inputs)

    def _save(self, step: int) -> None:
        inputs = self._inputs
        dtype = "bfloat16" if inputs.settings.bf16 else "float32"
        description = replace(inputs.description, dtype=dtype, step=step)
        fingerprints = {name: source.fingerprint for name, source in inputs.blend.sources.items()}
        position = BlendPosition(inputs.blend.plan, count_windows(inputs, step), fingerprints)
        with (
            self._metrics.clock.pause(),
            self._watchdog.pause(f"the save after step {step}"),
            self._trainer.hold_weights(),
        ):
            self._saver.save(self._trainer, description, inputs.training, position)


def validate(trainer: Trainer, inputs: StageInputs) -> dict[str, float]:
    """Measure the loss on every language's validation windows, in bits per byte."""
    token_bytes_V = torch.from_numpy(inputs.token_bytes_V).to(get_device())
    micro_batch_size, reset_at = inputs.settings.micro_batch_size, inputs.reset_at
    with trainer.hold_weights():
        return {
            language: measure_bits_per_byte(trainer.models, windows, token_bytes_V, micro_batch_size, reset_at=reset_at)
            for language, windows in inputs.valid.items()
        }
