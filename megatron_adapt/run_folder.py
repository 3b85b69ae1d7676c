"""Where every stage of a run keeps its files: the layout of ``work_dir``.

``corpus/<source>/``, ``tokenizer/``, ``resized/``, ``megatron/``, ``tokens/<source>-{train,valid}.{bin,idx}``,
``plans/``, ``checkpoints/<stage>/``, ``export/<stage>/``; a base made from scratch has the same folders under
``base/``. A source is a language, or LANGUAGE/SOURCE: ``tokens/ja/wiki-train.bin``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from megatron_adapt.config import Layout, StageSettings, TrainSettings
from megatron_adapt.errors import CheckpointError, ConfigError
from megatron_adapt.files import STAGE_FILE, is_finished, to_plain
from megatron_adapt.recipe import Recipe

PLAN_FILE = "plan.json"
"Plan of the blend, beside the checkpoints of a stage and in each of them."
TRAINING_FILE = "training.json"
"In a checkpoint: what the run reads, and where it stands in each source."
_OLDER_DEFAULTS: dict[str, Any] = {
    "decoupled_lr": False,
    "rampup_batch_size": [],
    "z_loss": 0.0,
    "exp_avg_dtype": "fp32",
    "exp_avg_sq_dtype": "fp32",
    "fp8": "none",
    "fp8_recipe": "tensorwise",
}
"What a ``training.json`` of before these entries means."


@dataclass(frozen=True)
class RunFolder:
    """The paths of one run."""

    root: Path

    @property
    def base(self) -> "RunFolder":
        """The run that trains a base from scratch."""
        return RunFolder(self.root / "base")

    @property
    def scratch(self) -> Path:
        """Hugging Face folder with random weights (of a base made from scratch)."""
        return self.root / "scratch"

    @property
    def tokenizer(self) -> Path:
        """Extended tokenizer."""
        return self.root / "tokenizer"

    @property
    def resized(self) -> Path:
        """Hugging Face folder with the new rows filled."""
        return self.root / "resized"

    @property
    def megatron(self) -> Path:
        """Megatron checkpoint that the first stage starts from."""
        return self.root / "megatron"

    def corpus(self, source: str) -> Path:
        """Folder of the prepared documents of a source."""
        return self.root / "corpus" / source

    def corpus_part(self, source: str, part: str) -> Path:
        """File of the documents of one part, "train" or "valid"."""
        return self.corpus(source) / f"{part}-00000.jsonl.zst"

    def tokens(self, source: str, part: str) -> Path:
        """Prefix of the token files of one part, "train" or "valid"."""
        return self.root / "tokens" / f"{source}-{part}"

    def checkpoints(self, stage: str) -> Path:
        """Root of the checkpoints of a stage."""
        return self.root / "checkpoints" / stage

    def plan(self, stage: str) -> Path:
        """Plan of the blend that a stage is trained on."""
        return self.checkpoints(stage) / PLAN_FILE

    @property
    def plans(self) -> Path:
        """Folder of the plans that tools/plan_blend.py makes before anything is trained."""
        return self.root / "plans"

    def export(self, stage: str) -> Path:
        """Hugging Face folder of the last checkpoint of a stage."""
        return self.root / "export" / stage


@dataclass(frozen=True)
class StagePlace:
    """What one training stage is, what it starts from, and where its run lives."""

    settings: StageSettings
    run: RunFolder
    initial: Path
    number: int
    "Place among the stages; a base made from scratch is stage 0."


# Settings of the launch, not of the result; the layout, but for FP8, changes a loss in its last digits only.
_WITHOUT_EFFECT = (
    "stages nproc_per_node micro_batch_size log_interval save_interval eval_interval eval_windows stop_after_steps "
    "continue_blend exit_duration_in_mins tensorboard_dir wandb_project device_hour_price async_save keep_last "
    "save_retain_interval verify_checkpoint max_skipped_steps loss_spike_factor step_timeout_in_mins"
).split() + [item.name for item in fields(Layout) if not item.name.startswith("fp8")]
# Settings that are newer than the first records: left out at their default, so that those still hold.
_LATER_DEFAULTS = {
    "objective": "language_modeling",
    "distillation_layer": -1,
    "lr_decay_style": "cosine",
    "lr_wsd_decay_fraction": 0.1,
    "lr_wsd_decay_style": "exponential",
    "lr_cooldown_fraction": 0.1,
    "lr_constant": 0.0,
    "decoupled_min_lr": None,
    **_OLDER_DEFAULTS,
    # Of which ``training.json`` says only whether there is one.
    "decoupled_lr": None,
}


def describe_training(stage: StageSettings, train: TrainSettings) -> dict[str, Any]:
    """Return the settings that decide the weights a stage ends with; its record keeps them."""
    decisive = {name: value for name, value in to_plain(train).items() if name not in _WITHOUT_EFFECT}
    return {"stage": _drop_later_defaults(to_plain(stage)), "train": _drop_later_defaults(decisive)}


def _drop_later_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if (name, value) not in _LATER_DEFAULTS.items()}


def find_change(saved: Mapping[str, Any], asked: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """Return name, value then and value now of the first entry that a ``training.json`` has otherwise; None if none.

    Args:
        saved: what the file holds; an entry that it lacks is one of before there was a setting, and had its default.
        asked: what is compared.
    """
    before = {**_OLDER_DEFAULTS, **saved}
    changed = ((name, before[name], now) for name, now in to_plain(asked).items() if before.get(name, now) != now)
    return next(changed, None)


def is_trained(folder: Path, config: dict[str, Any]) -> bool:
    """Tell whether a training stage has ended with this config.

    Args:
        folder: its checkpoints.
        config: what ``describe_training`` says of it.

    Raises:
        CheckpointError: it ended under other settings, weights or data; nothing is thrown away unasked.
    """
    record = folder / STAGE_FILE
    if record.is_file() and not is_finished(record, config=config):
        raise CheckpointError(
            f"{folder}: the stage is finished, with other settings or from other weights or data; "
            "remove the folder to train it again"
        )
    return record.is_file()


def find_stage(recipe: Recipe, name: str) -> StagePlace:
    """Look a training stage up in the recipe.

    Raises:
        ConfigError: the recipe has no stage of that name.
    """
    run = RunFolder(recipe.work_dir)
    if recipe.base_train is not None and name == recipe.base_train.name:
        return StagePlace(recipe.base_train, run.base, run.base.megatron, 0)
    names = [stage.name for stage in recipe.train.stages]
    if name not in names:
        known = names + ([recipe.base_train.name] if recipe.base_train else [])
        raise ConfigError(
            f"--stage: {name!r} is not in the recipe; use {' or '.join(known) or 'none: it has no stages'}"
        )
    at = names.index(name)
    initial = run.megatron if at == 0 else run.checkpoints(names[at - 1])
    return StagePlace(recipe.train.stages[at], run, initial, at + 1)
