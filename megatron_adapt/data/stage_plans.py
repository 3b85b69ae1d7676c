"""Plans of the stages of a recipe: each begins where those before stopped reading, and survives a change of the recipe.

Reads: the recipe, the token files in its run folder, the plans of stages that were trained.
Guarantees: a stage that continues the blend reads no window that the stages before it read, until the source is used
up; what a running or finished stage was trained on is never silently another plan.

1. ``plan_stages`` goes through the stages of a recipe and adds up the windows read of each source (``first``): the
   stages with ``continue_blend`` are one run over the sources.
2. ``plan_stage`` plans one of them to train on it. Where a plan was carried over before (``BlendPlan.before``), it
   still is.
3. ``carry_over`` plans the rest of a stage whose recipe or data changed while it was trained, behind every window that
   it has read.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from megatron_adapt.config import TrainSettings
from megatron_adapt.data.align import cut_documents
from megatron_adapt.data.index import read_tokens
from megatron_adapt.data.plan import BlendPlan, describe_change, make_plan, read_plan
from megatron_adapt.data.prompts import read_prompts
from megatron_adapt.data.record import read_appended_eod, read_record
from megatron_adapt.data.shares import nest_shares
from megatron_adapt.errors import CheckpointError, ConfigError, DataError
from megatron_adapt.recipe import Recipe
from megatron_adapt.run_folder import StagePlace, find_stage


def plan_stage(recipe: Recipe, name: str, trained: BlendPlan | None = None) -> BlendPlan:
    """Plan one training stage of a recipe from the tokens in its run folder, to train on it.

    Args:
        recipe: the recipe.
        name: the stage.
        trained: the plan it was begun on, if it was.

    Raises:
        ConfigError: the recipe has no such stage, or as ``make_plan``.
        DataError: a source is not tokenised yet, or as ``make_plan``.
        CheckpointError: a stage that this one continues was trained on another plan than the recipe gives now.
    """
    place = find_stage(recipe, name)
    before = {} if trained is None else dict(zip(trained.sources, trained.before, strict=True))
    return _plan(recipe, place, _count_read(recipe, place), before)


def carry_over(recipe: Recipe, name: str, trained: BlendPlan, place: int) -> BlendPlan:
    """Plan a stage anew that has read ``place`` windows of another plan.

    Returns:
        A plan that begins behind all that was read; or, if only the length of the stage changed, one that reads on as
        if it had always been so long.

    Raises:
        ConfigError: as ``plan_stage``, or the stage has read more than the recipe asks for now.
        DataError: as ``plan_stage``.
        CheckpointError: a source holds another number of windows than it did, or has gone.
    """
    longer = plan_stage(recipe, name, trained)
    if longer.reads_as(trained):
        return longer
    read = dict(zip(trained.sources, trained.count_before(place), strict=True))
    held = dict(zip(trained.sources, trained.available, strict=True))
    for source, count in read.items():
        now = dict(zip(longer.sources, longer.available, strict=True)).get(source)
        if count and now != held[source]:
            raise CheckpointError(
                f"train.stages {name}: {count} of the {held[source]} windows of {source} were read, and the blend has "
                f"{'none of it' if now is None else f'{now} of it'} now; keep the source, and give new text a name of "
                "its own"
            )
    at = find_stage(recipe, name)
    return _plan(recipe, at, _count_read(recipe, at), read)


def check_trained(recipe: Recipe, name: str) -> None:
    """Refuse to take a finished stage for the one that the recipe asks for now, if their plans differ.

    Raises:
        ConfigError: as ``plan_stage``.
        DataError: as ``plan_stage``.
        CheckpointError: the stage was trained on another plan.
    """
    path = find_stage(recipe, name).run.plan(name)
    if path.is_file():
        trained = read_plan(path)
        check_same(trained, plan_stage(recipe, name, trained), f"{path}", f"remove {path.parent} to train it again")


def check_same(trained: BlendPlan, plan: BlendPlan, where: str, remedy: str) -> None:
    """Refuse a plan that is not the one a stage was trained on.

    Raises:
        CheckpointError: naming what changed.
    """
    if trained.plan_hash != plan.plan_hash:
        raise CheckpointError(
            f"{where}: the stage was trained on another plan than the recipe and the data give now "
            f"({describe_change(trained, plan)}); restore them, or {remedy}"
        )


def plan_stages(recipe: Recipe) -> dict[str, BlendPlan]:
    """Plan every training stage of a recipe, whatever was trained already.

    Raises:
        ConfigError: the recipe has no stages, or as ``make_plan``.
        DataError: as ``plan_stage``.
    """
    if recipe.base_train is None and not recipe.train.stages:
        raise ConfigError("train.stages: the recipe has none; add a table [[train.stages]]")
    base = recipe.base_train
    plans = {} if base is None else {base.name: plan_stage(recipe, base.name)}
    return plans | _plan_chain(recipe, [stage.name for stage in recipe.train.stages])


def _plan_chain(recipe: Recipe, names: Sequence[str]) -> dict[str, BlendPlan]:
    """Plan stages from the first on; one that continues the blend begins where those before it stopped."""
    plans: dict[str, BlendPlan] = {}
    read: Counter[str] = Counter()
    for name in names:
        place = find_stage(recipe, name)
        plans[name] = _plan(recipe, place, read if place.settings.continue_blend else {}, {})
        if place.settings.continue_blend:
            _add(read, plans[name])
    return plans


def _count_read(recipe: Recipe, place: StagePlace) -> Counter[str]:
    """Count the windows of each source that the stages before have read: those trained, else those planned."""
    read: Counter[str] = Counter()
    if place.number == 0 or not place.settings.continue_blend:
        return read
    for stage in recipe.train.stages[: place.number - 1]:
        earlier = find_stage(recipe, stage.name)
        if not stage.continue_blend:
            continue
        path = earlier.run.plan(stage.name)
        trained = read_plan(path) if path.is_file() else None
        before = {} if trained is None else dict(zip(trained.sources, trained.before, strict=True))
        plan = _plan(recipe, earlier, read, before)
        if trained is not None and not recipe.train.continue_blend:
            name = place.settings.name
            remedy = f"add --train.continue-blend to begin {name} behind what was read"
            check_same(trained, plan, f"{path}", remedy)
        _add(read, trained or plan)
    return read


def _add(read: Counter[str], plan: BlendPlan) -> None:
    read.update(dict(zip(plan.sources, plan.count_before(plan.num_windows), strict=True)))


def _plan(recipe: Recipe, place: StagePlace, first: Mapping[str, int], before: Mapping[str, int]) -> BlendPlan:
    """Plan a stage; ``before`` is what it has read itself, ``first`` what the others have."""
    stage, train = place.settings, recipe.train
    prefixes = {source: place.run.tokens(source, "train") for source in recipe.list_stage_sources(stage)}
    # Records, not the files: those are opened, and compared with the plan, when it is read.
    tokens = {source: read_record(prefix).tokens for source, prefix in prefixes.items()}
    aligned = None
    if train.align_documents:
        starts = {source: read_tokens(prefix).starts() for source, prefix in prefixes.items()}
        aligned = {source: len(cut_documents(starts_D1, train.seq_length)) - 1 for source, starts_D1 in starts.items()}
    try:
        return make_plan(
            nest_shares(stage, tokens),
            stage.tokens,
            tokens,
            seq_length=train.seq_length,
            global_batch_size=train.global_batch_size,
            # A stage that does not continue needs an order of its own, or it begins with the windows of the others.
            seed=train.seed + (0 if stage.continue_blend else place.number),
            first={source: first.get(source, 0) + before.get(source, 0) for source in prefixes},
            before={source: before.get(source, 0) for source in prefixes},
            max_epochs=stage.max_epochs,
            shortfall=stage.shortfall,
            masked={
                source: _count_masked(prefix, (aligned or {}).get(source), train) for source, prefix in prefixes.items()
            },
            aligned=aligned,
        )
    except (ConfigError, DataError) as error:
        raise type(error)(f"train.stages {stage.name}: {error}") from None


def _count_masked(prefix: Path, num_windows: int | None, train: TrainSettings) -> Fraction:
    """Return the part of a source's targets that bear no loss.

    These are prompts, what the end of a document predicts, and what ``num_windows`` aligned windows read twice.
    """
    record = read_record(prefix)
    prompts_D = read_prompts(prefix, record.documents)
    masked = 0 if prompts_D is None else int(prompts_D.sum(dtype=np.int64))
    if train.eod_mask_loss and read_appended_eod(prefix) is not None:
        # The first token of a prompt is masked already.
        masked += record.documents if prompts_D is None else int((prompts_D == 0).sum())
    if num_windows is None:
        return Fraction(masked, record.tokens)
    return 1 - Fraction(record.tokens - 1 - masked, num_windows * train.seq_length)
