"""What a training stage reads, opened and checked before the engine starts.

Reads: the recipe, the description of the checkpoint to start from, token files. A mistake in any of them is
reported in seconds, not after the model was built on every rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_adapt.checkpoint.root import HF_FOLDER, LATEST_FILE, Description, find_checkpoint, read_description
from megatron_adapt.config import StageSettings, TrainSettings
from megatron_adapt.data.batches import Batches
from megatron_adapt.data.dataset import BlendedWindows, ValidationWindows
from megatron_adapt.data.index import bin_path
from megatron_adapt.data.megatron_blend import MegatronWindows
from megatron_adapt.data.plan import BlendPlan, read_plan
from megatron_adapt.data.record import TokensRecord, record_path
from megatron_adapt.data.sources import Source
from megatron_adapt.data.stage_plans import carry_over, check_same, plan_stage
from megatron_adapt.errors import CheckpointError
from megatron_adapt.files import STAGE_FILE, read_json
from megatron_adapt.parallelism import check_layout
from megatron_adapt.recipe import Recipe
from megatron_adapt.run_folder import (
    PLAN_FILE,
    TRAINING_FILE,
    StagePlace,
    describe_training,
    find_change,
    find_stage,
)
from megatron_adapt.tokenizer.pieces import piece_bytes, read_tokenizer
from megatron_adapt.train.distill import Distillation, plan_distillation
from megatron_adapt.train.documents import find_eod
from megatron_adapt.train.learning import check_learning
from megatron_adapt.train.new_tokens import find_new_ids, hash_ids


@dataclass(frozen=True, kw_only=True)
class StageInputs:
    """One stage of training, ready to run."""

    place: StagePlace
    "Settings of the stage, and its folders."
    settings: TrainSettings
    "Settings of the whole run."
    initial: Path
    "``torch_dist`` folder of the weights to start from."
    description: Description
    "The model in it."
    blend: BlendedWindows | MegatronWindows
    "Windows to train on."
    valid: dict[str, NDArray[np.int64]]
    "Validation windows per language, [number, T + 1]."
    token_bytes_V: NDArray[np.int64]
    "Bytes of text of every id of the padded vocabulary."
    eod_id: int | None
    "End-of-document id of the tokens; None where no setting needs it."
    new_ids: NDArray[np.int64] | None
    "Ids whose rows learn, in ascending order; None where whole parameters do."
    distillation: Distillation | None
    "For a stage of token distillation, what its teacher reads."
    old_languages: tuple[str, ...]
    "Languages that training may make the model forget; none of a base made from scratch."
    first_stage: str
    "Stage of the run whose validation before any training is that of the base."

    @cached_property
    def batches(self) -> Batches:
        """Which windows make which step."""
        return _cut_batches(self.place.settings, self.settings, self.blend.plan)

    @property
    def root(self) -> Path:
        """Folder of the stage's checkpoints."""
        return self.place.run.checkpoints(self.place.settings.name)

    @property
    def hf(self) -> Path:
        """Hugging Face files that travel with the weights."""
        return self.place.initial / HF_FOLDER

    @property
    def reset_at(self) -> int | None:
        """Id behind which attention starts anew; None where it spans documents."""
        return self.eod_id if self.settings.reset_attention_mask else None

    @property
    def config(self) -> dict[str, Any]:
        """What the record of the finished stage says was asked for."""
        return describe_training(self.place.settings, self.settings)

    @property
    def read_paths(self) -> list[Path]:
        """What the record of the finished stage says was read."""
        records = [record_path(self.place.run.tokens(source, "train")) for source in self.blend.plan.sources]
        return [self.initial, *records]

    @property
    def training(self) -> dict[str, Any]:
        """What must not change while the stage runs; the data and the plan are compared before (``open_inputs``)."""
        return {
            "tokenizer_fingerprint": self.description.tokenizer_fingerprint,
            "blend_engine": self.settings.blend_engine,
            "global_batch_size": self.settings.global_batch_size,
            "trainable": self.place.settings.trainable,
            "decoupled_lr": self.place.settings.decoupled_lr is not None,
            "rampup_batch_size": self.place.settings.rampup_batch_size,
            "new_rows": hash_ids(self.new_ids),
            "objective": self.place.settings.objective,
            "distillation_layer": self.place.settings.distillation_layer,
            "bf16": self.settings.bf16,
            "exp_avg_dtype": self.settings.exp_avg_dtype,
            "exp_avg_sq_dtype": self.settings.exp_avg_sq_dtype,
            "fp8": self.settings.fp8,
            "fp8_recipe": self.settings.fp8_recipe,
            "reset_attention_mask": self.settings.reset_attention_mask,
            "eod_mask_loss": self.settings.eod_mask_loss,
            "z_loss": self.settings.z_loss,
            "use_distributed_optimizer": self.settings.use_distributed_optimizer,
        }


def open_inputs(recipe: Recipe, stage_name: str) -> StageInputs:
    """Find a stage, its weights and its data, and check that they fit each other.

    Raises:
        ConfigError: no such stage, a layout that does not fit the model, or documents without the EOD a setting needs.
        CheckpointError: no weights to start from, or token files of another tokenizer than theirs.
        DataError: a source is missing, empty or damaged.
    """
    place, settings = find_stage(recipe, stage_name), recipe.train
    if place.number > 1 and not (place.initial / STAGE_FILE).is_file():
        raise CheckpointError(f"{place.initial}: the stage before is not finished; train it to its end first")
    initial = find_checkpoint(place.initial)
    description = read_description(initial)
    check_layout(description.shape, settings, padded_vocab_size=description.padded_vocab_size)
    check_learning(place.settings, description.shape, description.new_blocks)
    new_ids = find_new_ids(place.settings, place.initial / HF_FOLDER)
    if place.settings.carry_optimizer:
        _check_optimizer(initial, place.settings, settings, new_ids)
    plan = _plan(recipe, place)
    blend = _open_blend(settings, place, plan)
    _check_data(place, blend.sources)
    for source in blend.sources.values():
        _check_tokenizer(source.prefix, source.record, place.initial, description)
    valid = {}
    for language in _list_valid(recipe, place, plan.sources):
        prefix = place.run.tokens(language, "valid")
        windows = ValidationWindows(prefix, settings.eval_windows, settings.seq_length)
        _check_tokenizer(prefix, windows.record, place.initial, description)
        valid[language] = windows.read_windows(0, len(windows))
    return StageInputs(
        place=place,
        settings=settings,
        initial=initial,
        description=description,
        blend=blend,
        valid=valid,
        token_bytes_V=_count_token_bytes(place.initial / HF_FOLDER, description.padded_vocab_size),
        eod_id=find_eod(
            settings,
            [place.run.tokens(source, "train") for source in plan.sources]
            + [place.run.tokens(language, "valid") for language in valid],
            place.initial / HF_FOLDER,
        ),
        new_ids=new_ids,
        distillation=plan_distillation(place.settings, settings, description.shape, place.initial / HF_FOLDER),
        old_languages=recipe.old_languages if place.number else (),
        first_stage=settings.stages[0].name if place.number else stage_name,
    )


def _plan(recipe: Recipe, place: StagePlace) -> BlendPlan:
    """Plan a stage, or go on with the plan of its last checkpoint."""
    name = place.settings.name
    root = place.run.checkpoints(name)
    if not (root / LATEST_FILE).is_file():
        return plan_stage(recipe, name)
    folder = find_checkpoint(root)
    trained = read_plan(folder / PLAN_FILE)
    plan = plan_stage(recipe, name, trained)
    if recipe.train.continue_blend and plan.plan_hash != trained.plan_hash:
        batches = _cut_batches(place.settings, recipe.train, trained)
        return carry_over(recipe, name, trained, batches.count_windows(read_description(folder).step))
    remedy = f"add --train.continue-blend to go on behind what was read, or remove {root} to start again"
    check_same(trained, plan, str(folder), remedy)
    return plan


def _cut_batches(stage: StageSettings, train: TrainSettings, plan: BlendPlan) -> Batches:
    return Batches.of(stage, num_windows=plan.num_windows, global_batch_size=train.global_batch_size)


def _check_optimizer(
    initial: Path, stage: StageSettings, train: TrainSettings, new_ids: NDArray[np.int64] | None
) -> None:
    """Refuse to carry an optimizer that is not there, or of another set of parameters."""
    where = f"train.stages {stage.name}: carry_optimizer"
    if not (initial / TRAINING_FILE).is_file():
        raise CheckpointError(f"{where}: {initial} holds weights alone; leave it out, or start from a training run")
    asked = {
        "trainable": stage.trainable,
        "decoupled_lr": stage.decoupled_lr is not None,
        "new_rows": hash_ids(new_ids),
        "objective": stage.objective,
        "bf16": train.bf16,
        "use_distributed_optimizer": train.use_distributed_optimizer,
    }
    if change := find_change(read_json(initial / TRAINING_FILE), asked):
        name, before, now = change
        raise CheckpointError(
            f"{where}: {initial} was trained with {name} {before}, now it is {now}; its optimizer does not "
            "fit, leave the setting out or train alike"
        )


def _check_data(place: StagePlace, sources: Mapping[str, Source]) -> None:
    """Refuse sources that the last checkpoint of a running stage knows with other data."""
    root = place.run.checkpoints(place.settings.name)
    if not (root / LATEST_FILE).is_file():
        return
    folder = find_checkpoint(root)
    for name, cursor in read_json(folder / TRAINING_FILE)["cursors"].items():
        if name in sources and sources[name].fingerprint != cursor["data"]:
            raise CheckpointError(
                f"{bin_path(sources[name].prefix)}: not the data that {folder} was trained on; restore "
                f"the files, or remove {root} to start again"
            )


def _open_blend(settings: TrainSettings, place: StagePlace, plan: BlendPlan) -> BlendedWindows | MegatronWindows:
    prefixes = {source: place.run.tokens(source, "train") for source in plan.sources}
    if settings.blend_engine == "megatron":
        return MegatronWindows(plan, prefixes, place.run.checkpoints(place.settings.name) / "megatron_index")
    return BlendedWindows(plan, prefixes)


def _list_valid(recipe: Recipe, place: StagePlace, sources: Sequence[str]) -> list[str]:
    """Name the sources to validate on: those of the blend, and every other that was tokenised for it.

    A language that a stage leaves out is the one it may forget.
    """
    others = (name for name in recipe.list_sources(*recipe.old_languages, *recipe.new_languages) if name not in sources)
    return [*sources, *(name for name in others if record_path(place.run.tokens(name, "valid")).is_file())]


def _check_tokenizer(prefix: Path, record: TokensRecord, initial: Path, description: Description) -> None:
    if record.tokenizer_fingerprint != description.tokenizer_fingerprint:
        raise CheckpointError(
            f"{prefix}: written by tokenizer {record.tokenizer_fingerprint} with {record.vocab_size} tokens, but the "
            f"checkpoint {initial} is for tokenizer {description.tokenizer_fingerprint} with "
            f"{description.true_vocab_size}; run tools/preprocess_data.py with the tokenizer of the checkpoint"
        )


def _count_token_bytes(tokenizer: Path, padded_vocab_size: int) -> NDArray[np.int64]:
    lengths = [len(piece) for piece in piece_bytes(read_tokenizer(tokenizer))]
    return np.array(lengths + [0] * (padded_vocab_size - len(lengths)), dtype=np.int64)
