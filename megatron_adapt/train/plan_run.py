"""What the training stages of a recipe take on so many ranks, without one of them.

Reads: the recipe, the shape of the base model (its ``config.json``), the tokenizer of the run where there is one.
Writes: a report to the terminal, and its figures as JSON. Needs neither GPUs nor weights nor data.

1. ``find_shape``: the model with the vocabulary it has after the resize.
2. ``measure_stages`` (``memory``): a rank of every pipeline stage, on tensors without memory; ``find_layout``
   (``layouts``): where it does not fit, a layout that does.
3. ``count_costs`` (``costs``): operations, checkpoints, traffic.
4. ``show_costs`` (``plan_show``): the report.

Costs: half a minute and 0.4 GB for 70B on 64 ranks of a model; as much again for each layout that is tried.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from megatron_adapt.checkpoint.hf import CONFIG_FILE, read_hf_shape
from megatron_adapt.checkpoint.root import LATEST_FILE, find_checkpoint, read_description
from megatron_adapt.config import PlanRun, StageSettings
from megatron_adapt.errors import ConfigError
from megatron_adapt.files import read_json, write_json
from megatron_adapt.recipe import Recipe, make_base_shape
from megatron_adapt.run_folder import RunFolder, find_stage
from megatron_adapt.shape import LlamaShape, pad_vocab_size, read_shape
from megatron_adapt.tokenizer.made import count_pieces
from megatron_adapt.tokenizer.pieces import JSON_FILE, read_tokenizer
from megatron_adapt.train.costs import StageCosts, count_costs
from megatron_adapt.train.flops import DEVICES
from megatron_adapt.train.layouts import check_job, find_layout
from megatron_adapt.train.learning import check_learning
from megatron_adapt.train.memory import Job, RankMemory, measure_stages
from megatron_adapt.train.plan_show import show_costs


def plan_run(recipe: Recipe, config: PlanRun) -> None:
    """Plan one training stage of a recipe or all of them, and print what they take.

    Raises:
        ConfigError: no such stage, no model to plan with, or ranks, batch and layout do not fit.
    """
    shape = find_shape(recipe, config.config)
    planned = []
    for stage in list_stages(recipe, config.stage):
        costs, other = plan_stage(recipe, config, stage, shape)
        sys.stdout.write(show_costs(costs, other, config, distils=stage.objective != "language_modeling") + "\n")
        sys.stdout.flush()
        planned.append({**costs.to_dict(), "fitting": other.to_dict() if other else None})
    if config.json is not None:
        write_json(config.json, {"device": config.device, "mfu": config.mfu, "stages": planned})


def list_stages(recipe: Recipe, name: str) -> Iterator[StageSettings]:
    """Yield the training stage of a name, or without one all stages of the recipe.

    Raises:
        ConfigError: there is no such stage, or none at all.
    """
    if name:
        yield find_stage(recipe, name).settings
        return
    stages = recipe.train.stages or ([recipe.base_train] if recipe.base_train else [])
    if not stages:
        raise ConfigError("train.stages: empty; add a [[train.stages]] table to the recipe")
    yield from stages


def plan_stage(
    recipe: Recipe, config: PlanRun, stage: StageSettings, shape: LlamaShape
) -> tuple[StageCosts, StageCosts | None]:
    """Plan one training stage.

    Returns:
        What it takes, and if it does not fit into the device what it takes in the cheapest layout that does, or None
        where there is none.

    Raises:
        ConfigError: layout, ranks and batch do not fit each other or the model.
    """
    device = DEVICES[config.device]
    if stage == recipe.base_train and recipe.base is not None:
        shape = make_base_shape(recipe.base)
    shape, new_blocks = find_blocks(recipe, stage, shape)
    check_learning(stage, shape, new_blocks)
    job = Job(
        shape=shape,
        padded_vocab_size=pad_vocab_size(shape.vocab_size, recipe.checkpoint.vocab_pad_multiple),
        train=recipe.train,
        stage=stage,
        world_size=config.world_size,
        on_gpu=config.device != "cpu",
        new_blocks=new_blocks,
    )
    check_job(job)
    device_bytes = (config.device_memory or device.memory_gb) * 1e9

    def count(job: Job, ranks: list[RankMemory]) -> StageCosts:
        speed = config.save_speed * 1e9
        return count_costs(job, ranks, device, device_bytes=device_bytes, mfu=config.mfu, save_speed=speed)

    costs = count(job, measure_stages(job))
    found = None if costs.fits else find_layout(job, device_bytes)
    return costs, count(*found) if found else None


def find_blocks(recipe: Recipe, stage: StageSettings, shape: LlamaShape) -> tuple[LlamaShape, tuple[int, ...]]:
    """Return the shape with the blocks that were added to the checkpoint of the run, and their numbers.

    Raises:
        ConfigError: the stage trains added blocks, and the run has no checkpoint yet that says which those are.
    """
    root = RunFolder(recipe.work_dir).megatron
    if stage != recipe.base_train and (root / LATEST_FILE).is_file():
        description = read_description(find_checkpoint(root))
        if description.new_blocks:
            return replace(shape, num_layers=description.shape.num_layers), description.new_blocks
    elif stage.trainable == "expanded_blocks":
        raise ConfigError(
            f'train.stages {stage.name}: trainable = "expanded_blocks": {root}, which says how many there are, is not '
            "there yet; make it first: tools/reshape_checkpoint.py expand"
        )
    return shape, ()


def find_shape(recipe: Recipe, config: Path | None) -> LlamaShape:
    """Return the shape of the model that the stages of a recipe train, with its vocabulary after the resize.

    The tokenizer of the run says how large that is; before it is made, the recipe's ``tokenizer.size``.

    Args:
        recipe: the recipe.
        config: ``config.json`` of the base model; None takes that of the recipe's base.

    Raises:
        ConfigError: there is no shape to plan with, or the size of the vocabulary is not known yet.
    """
    shape = _find_base_shape(recipe, config)
    if not recipe.new_languages:
        return shape
    settings, made = recipe.tokenizer, RunFolder(recipe.work_dir).tokenizer
    if (made / JSON_FILE).is_file():
        return replace(shape, vocab_size=read_tokenizer(made).vocab_size)
    if settings.adopt:
        assert settings.donor is not None
        if not (settings.donor / JSON_FILE).is_file():
            raise ConfigError(
                f"tokenizer.donor: {settings.donor} is not on this machine, and its size is that of the vocabulary; "
                "copy its tokenizer.json there"
            )
        return replace(shape, vocab_size=read_tokenizer(settings.donor).vocab_size)
    # Of optimize this counts the special tokens and bytes, which are always kept, by the share like the rest.
    shares = {"replace": 0.0, "optimize": settings.kept_share}
    kept = round(shape.vocab_size * shares.get(settings.method, 1.0))
    return replace(shape, vocab_size=kept + count_pieces(settings, shape.vocab_size, kept))


def _find_base_shape(recipe: Recipe, config: Path | None) -> LlamaShape:
    if config is not None:
        return read_shape(read_json(config), str(config))
    if recipe.base is not None:
        return make_base_shape(recipe.base)
    if recipe.base_model is None:
        raise ConfigError("base_model: the recipe names none and has no [base]; add --config config.json of the model")
    if not (recipe.base_model / CONFIG_FILE).is_file():
        raise ConfigError(f"base_model: no {CONFIG_FILE} in {recipe.base_model}; add --config FILE with the model's")
    return read_hf_shape(recipe.base_model)
