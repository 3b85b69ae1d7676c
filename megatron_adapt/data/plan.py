"""From a token budget and shares to a whole number of windows per source.

Reads: the recipe, the tokens each source holds. Writes: a ``BlendPlan``, also as JSON; needs no torch.
Guarantees: the windows of all sources are exactly ``steps * global_batch_size``; every source, and every language,
gets less than one window more or less than its share; a stage that continues the blend reads no window that the
stages before it read, until the source is used up; equal input gives an equal plan on any machine.

Method:
1. ``plan_stages`` goes through the stages of a recipe and adds up the windows read of each source (``first``): the
   stages with ``continue_blend`` are one run over the sources, in one order.
2. ``nest_shares``: shares of the languages times shares of the sources within them (``shares``).
3. ``make_plan``: ``steps = ceil(tokens / (global_batch_size * seq_length))``; what ``max_epochs`` leaves; whole
   windows by largest remainder.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Any

import orjson

from megatron_adapt.data.index import TokensFile, read_tokens
from megatron_adapt.data.record import read_record
from megatron_adapt.data.shares import SHORTFALLS, find_limits, nest_shares, normalise, read_decimal, round_nested
from megatron_adapt.data.windows import count_windows
from megatron_adapt.errors import CheckpointError, ConfigError, DataError
from megatron_adapt.files import read_json, write_json
from megatron_adapt.recipe import Recipe
from megatron_adapt.run_folder import StagePlace, find_stage


@dataclass(frozen=True, kw_only=True)
class BlendPlan:
    """How many windows of each source a training stage reads."""

    sources: tuple[str, ...]
    "Names, in the order of the recipe."
    windows: tuple[int, ...]
    "Windows to read of each source."
    available: tuple[int, ...]
    "Windows each source has; it is read again from the start when they are used up."
    first: tuple[int, ...]
    "Windows of each source that earlier stages have read; this one begins behind them."
    seq_length: int
    "Tokens to predict in a window."
    global_batch_size: int
    "Windows in a step."
    seed: int
    "Seed of the order inside each source."
    asked: tuple[int, ...]
    "Windows of each source the blend asks for; ``max_epochs`` may leave another number."
    loss_tokens: tuple[int, ...]
    "Targets of each source that the loss counts; expected ones where it leaves out the end of documents."

    @property
    def num_windows(self) -> int:
        """Windows of all sources together."""
        return sum(self.windows)

    @property
    def num_steps(self) -> int:
        """Optimizer steps."""
        return self.num_windows // self.global_batch_size

    @property
    def epochs(self) -> tuple[float, ...]:
        """How often this stage reads each source."""
        return tuple(count / has for count, has in zip(self.windows, self.available, strict=True))

    @property
    def repeats(self) -> tuple[int, ...]:
        """How many of the windows of each source are read for the second time or later, in any stage."""
        read = zip(self.windows, self.available, self.first, strict=True)
        return tuple(max(0, first + count - max(first, has)) for count, has, first in read)

    @property
    def plan_hash(self) -> str:
        """Hash of everything that decides which window is read at which place; the data have their own."""
        decisive = [getattr(self, name) for name in _DECISIVE]
        return hashlib.blake2b(orjson.dumps(decisive), digest_size=16).hexdigest()


_DECISIVE = ("sources", "windows", "available", "first", "seq_length", "seed")


def make_plan(
    shares: Mapping[str, float | Fraction],
    tokens: int,
    available: Mapping[str, int],
    *,
    seq_length: int,
    global_batch_size: int,
    seed: int,
    first: Mapping[str, int] | None = None,
    max_epochs: Mapping[str, float] | None = None,
    shortfall: str = "fail",
    masked: Mapping[str, Fraction] | None = None,
) -> BlendPlan:
    """Turn a token budget and shares into windows per source.

    Args:
        shares: share of the tokens per source; divided by their sum.
        tokens: tokens to train on; rounded up to whole steps.
        available: tokens each source holds.
        seq_length: tokens to predict in a window.
        global_batch_size: windows in a step.
        seed: seed of the order inside each source.
        first: windows of a source that earlier stages have read; 0 where it names none.
        max_epochs: how often a source, or a language as a whole, may be read, with what ``first`` says.
        shortfall: what to do when the budget asks for more: a key of ``SHORTFALLS``.
        masked: part of a source's tokens that the loss leaves out; none where it names none.

    Raises:
        ConfigError: a share is not positive, a source is unknown, the budget is not positive or over ``max_epochs``.
        DataError: a source holds no tokens, or less than one window.
    """
    _check_shares(shares, available)
    for name, value in (("tokens", tokens), ("seq_length", seq_length), ("global_batch_size", global_batch_size)):
        if value < 1:
            raise ConfigError(f"blend: {name} {value} is below 1; correct it")
    has = {source: _count_available(source, available[source], seq_length) for source in shares}
    before = {source: (first or {}).get(source, 0) for source in shares}
    total = math.ceil(Fraction(tokens, global_batch_size * seq_length)) * global_batch_size
    exact = normalise({source: read_decimal(share) for source, share in shares.items()})
    asked = round_nested({source: share * total for source, share in exact.items()}, total)
    limits = find_limits(max_epochs or {}, has, before)
    windows = SHORTFALLS[shortfall](exact, limits, total, global_batch_size)
    targets = {source: windows[source] * seq_length for source in shares}
    return BlendPlan(
        sources=tuple(shares),
        windows=tuple(windows[source] for source in shares),
        available=tuple(has.values()),
        first=tuple(before.values()),
        seq_length=seq_length,
        global_batch_size=global_batch_size,
        seed=seed,
        asked=tuple(asked[source] for source in shares),
        loss_tokens=tuple(count - round(count * (masked or {}).get(source, 0)) for source, count in targets.items()),
    )


def _check_shares(shares: Mapping[str, float | Fraction], available: Mapping[str, int]) -> None:
    if not shares:
        raise ConfigError("blend: no sources; name at least one and its share")
    for source, share in shares.items():
        if not (math.isfinite(share) and share > 0):
            raise ConfigError(f"blend.{source}: share {share} is not positive; leave the source out")
        if source not in available:
            known = ", ".join(available) or "none"
            raise ConfigError(f"blend.{source}: unknown source (known: {known}); correct the name or tokenise it")


def _count_available(source: str, tokens: int, seq_length: int) -> int:
    if tokens == 0:
        raise DataError(f"blend.{source}: the source holds no tokens; add text or leave it out")
    windows = count_windows(tokens, seq_length)
    if windows == 0:
        raise DataError(
            f"blend.{source}: {tokens} tokens are less than one window of {seq_length} + 1; "
            "add text, shorten seq_length or leave it out"
        )
    return windows


# ---------------------------------------------------------------- plans as files


def write_plan(path: Path, plan: BlendPlan) -> None:
    """Write a plan as JSON, with what follows from it and its hash."""
    derived = {name: getattr(plan, name) for name in ("num_steps", "epochs", "repeats", "plan_hash")}
    write_json(path, {**asdict(plan), **derived})


def read_plan(path: Path) -> BlendPlan:
    """Read a plan that ``write_plan`` wrote.

    Raises:
        DataError: the file is no plan, or was edited after it was written.
    """
    stored = read_json(path)
    names = [item.name for item in fields(BlendPlan)]
    if not isinstance(stored, dict) or any(name not in stored for name in [*names, "plan_hash"]):
        raise DataError(f"{path}: no blend plan; it needs {', '.join(names)} and plan_hash")
    values: dict[str, Any] = {
        name: tuple(stored[name]) if isinstance(stored[name], list) else stored[name] for name in names
    }
    plan = BlendPlan(**values)
    if plan.plan_hash != stored["plan_hash"]:
        raise DataError(
            f"{path}: the plan was changed after it was written (hash {stored['plan_hash']}, now {plan.plan_hash}); "
            "change the recipe instead"
        )
    return plan


def describe_change(before: BlendPlan, after: BlendPlan) -> str:
    """Return what differs between two plans with different hashes, first things first."""
    if before.sources != after.sources:
        return f"sources {', '.join(before.sources)}, now {', '.join(after.sources)}"
    for name in ("seq_length", "seed"):
        old, new = getattr(before, name), getattr(after, name)
        if old != new:
            return f"{name} {old}, now {new}"
    changes = []
    for name in ("available", "first", "windows"):
        for source, old, new in zip(before.sources, getattr(before, name), getattr(after, name), strict=True):
            if old != new:
                changes.append(f"{name} of {source} {old}, now {new}")
    return "; ".join(changes)


# ---------------------------------------------------------------- the stages of a recipe


def plan_stage(recipe: Recipe, name: str) -> BlendPlan:
    """Plan one training stage of a recipe from the tokens in its run folder, to train on it.

    Raises:
        ConfigError: the recipe has no such stage, or as ``make_plan``.
        DataError: a source is not tokenised yet, or as ``make_plan``.
        CheckpointError: a stage that this one continues was trained on another plan than the recipe gives now.
    """
    place = find_stage(recipe, name)
    if place.number == 0:
        return _plan(recipe, place, {})
    plans = _plan_chain(recipe, [stage.name for stage in recipe.train.stages[: place.number]])
    for earlier in recipe.train.stages[: place.number - 1]:
        if place.settings.continue_blend and earlier.continue_blend:
            remedy = f"restore them, or set continue_blend = false for {name}, which begins where it stopped"
            _check_plan(place.run.plan(earlier.name), plans[earlier.name], remedy)
    return plans[name]


def check_trained(recipe: Recipe, name: str) -> None:
    """Refuse to take a finished stage for the one that the recipe asks for now, if their plans differ.

    Raises:
        ConfigError: as ``plan_stage``.
        DataError: as ``plan_stage``.
        CheckpointError: the stage was trained on another plan.
    """
    path = find_stage(recipe, name).run.plan(name)
    _check_plan(path, plan_stage(recipe, name), f"restore them, or remove {path.parent} to train it again")


def _check_plan(path: Path, plan: BlendPlan, remedy: str) -> None:
    """Refuse a plan that is not the one a stage was trained on; ``path`` holds that one, if there is any."""
    trained = read_plan(path) if path.is_file() else plan
    if trained.plan_hash != plan.plan_hash:
        raise CheckpointError(
            f"{path}: the stage was trained on another plan than the recipe and the data give now "
            f"({describe_change(trained, plan)}); {remedy}"
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
        plans[name] = _plan(recipe, place, read if place.settings.continue_blend else {})
        if place.settings.continue_blend:
            read.update(dict(zip(plans[name].sources, plans[name].windows, strict=True)))
    return plans


def _plan(recipe: Recipe, place: StagePlace, first: Mapping[str, int]) -> BlendPlan:
    stage, train = place.settings, recipe.train
    prefixes = {source: place.run.tokens(source, "train") for source in recipe.list_stage_sources(stage)}
    files = {source: read_tokens(prefix) for source, prefix in prefixes.items()}
    tokens = {source: file.num_tokens for source, file in files.items()}
    try:
        return make_plan(
            nest_shares(stage, tokens),
            stage.tokens,
            tokens,
            seq_length=train.seq_length,
            global_batch_size=train.global_batch_size,
            # A stage that does not continue needs an order of its own, or it begins with the windows of the others.
            seed=train.seed + (0 if stage.continue_blend else place.number),
            first=first,
            max_epochs=stage.max_epochs,
            shortfall=stage.shortfall,
            masked={source: _count_ends(file) for source, file in files.items()} if train.eod_mask_loss else {},
        )
    except (ConfigError, DataError) as error:
        raise type(error)(f"train.stages {stage.name}: {error}") from None


def _count_ends(file: TokensFile) -> Fraction:
    """Return the part of a source's tokens that are ends of documents; none where they were not appended."""
    has_ends = int(file.tokens_N[-1]) == read_record(file.prefix).eod_id
    return Fraction(file.num_documents, file.num_tokens) if has_ends else Fraction(0)
