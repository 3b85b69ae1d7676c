"""From a token budget and shares to a whole number of windows per source.

Reads: shares as the recipe writes them, tokens each source holds. Writes: a ``BlendPlan``, also as JSON.
Guarantees: the windows of all sources are exactly ``steps * global_batch_size``; every source gets less than one
window more or less than its share; equal input gives an equal plan on any machine.

Method (``make_plan``):
1. ``steps = ceil(tokens / (global_batch_size * seq_length))``.
2. Shares are read as the decimals the user wrote (0.1 is one tenth) and divided by their sum, in fractions.
3. ``round_shares``: largest remainder; equal remainders fall to the source named first.
"""

import hashlib
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Any

import orjson

from megatron_adapt.data.index import read_tokens
from megatron_adapt.data.windows import count_windows
from megatron_adapt.errors import ConfigError, DataError
from megatron_adapt.files import read_json, write_json
from megatron_adapt.recipe import Recipe
from megatron_adapt.run_folder import find_stage

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BlendPlan:
    """How many windows of each source a training stage reads."""

    sources: tuple[str, ...]
    "Names, in the order of the recipe."
    windows: tuple[int, ...]
    "Windows to read of each source."
    available: tuple[int, ...]
    "Windows each source has; it is read again from the start when they are used up."
    seq_length: int
    "Tokens to predict in a window."
    global_batch_size: int
    "Windows in a step."
    seed: int
    "Seed of the order inside each source."

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
        """How often each source is read."""
        return tuple(asked / has for asked, has in zip(self.windows, self.available, strict=True))

    @property
    def plan_hash(self) -> str:
        """Hash of everything that decides which window is read at which place; the data have their own."""
        decisive = [self.sources, self.windows, self.available, self.seq_length, self.seed]
        return hashlib.blake2b(orjson.dumps(decisive), digest_size=16).hexdigest()


def make_plan(
    shares: Mapping[str, float],
    tokens: int,
    available: Mapping[str, int],
    *,
    seq_length: int,
    global_batch_size: int,
    seed: int,
) -> BlendPlan:
    """Turn a token budget and shares into windows per source.

    Args:
        shares: share of the tokens per source; divided by their sum.
        tokens: tokens to train on; rounded up to whole steps.
        available: tokens each source holds.
        seq_length: tokens to predict in a window.
        global_batch_size: windows in a step.
        seed: seed of the order inside each source.

    Raises:
        ConfigError: a share is not positive, a source is unknown, or the budget is not positive.
        DataError: a source holds no tokens, or less than one window.
    """
    if not shares:
        raise ConfigError("blend: no sources; name at least one and its share")
    for source, share in shares.items():
        if not (math.isfinite(share) and share > 0):
            raise ConfigError(f"blend.{source}: share {share} is not positive; leave the source out")
        if source not in available:
            known = ", ".join(available) or "none"
            raise ConfigError(f"blend.{source}: unknown source (known: {known}); correct the name or tokenise it")
    for name, value in (("tokens", tokens), ("seq_length", seq_length), ("global_batch_size", global_batch_size)):
        if value < 1:
            raise ConfigError(f"blend: {name} {value} is below 1; correct it")
    has = {source: _count_available(source, available[source], seq_length) for source in shares}
    steps = -(-tokens // (global_batch_size * seq_length))
    windows = round_shares([Fraction(repr(float(share))) for share in shares.values()], steps * global_batch_size)
    for source, count in zip(shares, windows, strict=True):
        if count == 0:
            _logger.warning(
                "blend.%s: its share of %d windows is less than one, it is never read; raise the share or the tokens",
                source,
                sum(windows),
            )
    return BlendPlan(
        sources=tuple(shares),
        windows=tuple(windows),
        available=tuple(has.values()),
        seq_length=seq_length,
        global_batch_size=global_batch_size,
        seed=seed,
    )


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


def round_shares(shares: list[Fraction], total: int) -> list[int]:
    """Split ``total`` into whole parts proportional to ``shares`` by largest remainder."""
    exact = [share * total / sum(shares) for share in shares]
    parts = [math.floor(part) for part in exact]
    by_remainder = sorted(range(len(shares)), key=lambda at: (parts[at] - exact[at], at))
    for at in by_remainder[: total - sum(parts)]:
        parts[at] += 1
    return parts


def write_plan(path: Path, plan: BlendPlan) -> None:
    """Write a plan as JSON, with its hash."""
    write_json(path, {**asdict(plan), "plan_hash": plan.plan_hash})


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


def describe_plan(plan: BlendPlan) -> str:
    """Return the plan as a table, a line per source and one for the sum."""
    total = plan.num_windows
    rows = [["source", "windows", "tokens", "share", "available", "epochs"]]
    for source, count, has, epochs in zip(plan.sources, plan.windows, plan.available, plan.epochs, strict=True):
        tokens, held = count * plan.seq_length, has * plan.seq_length
        rows.append([source, f"{count:,}", f"{tokens:,}", f"{count / total:.4%}", f"{held:,}", f"{epochs:.3f}"])
    rows.append(["all", f"{total:,}", f"{total * plan.seq_length:,}", "", "", ""])
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    lines = []
    for source, *numbers in rows:
        cells = [source.ljust(widths[0])]
        cells += [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    steps = f"{plan.num_steps:,} steps of {plan.global_batch_size:,} windows of {plan.seq_length:,} tokens"
    return "\n".join([*lines, f"{steps}, plan {plan.plan_hash[:12]}"])


def plan_stage(recipe: Recipe, name: str) -> BlendPlan:
    """Plan one training stage of a recipe from the tokens in its run folder.

    Raises:
        ConfigError: the recipe has no such stage, or as ``make_plan``.
        DataError: a source is not tokenised yet, or as ``make_plan``.
    """
    place = find_stage(recipe, name)
    return make_plan(
        place.settings.blend,
        place.settings.tokens,
        {source: read_tokens(place.run.tokens(source, "train")).num_tokens for source in place.settings.blend},
        seq_length=recipe.train.seq_length,
        global_batch_size=recipe.train.global_batch_size,
        # Stages read the sources in orders of their own, or every stage would begin with the same windows.
        seed=recipe.train.seed + place.number,
    )


def plan_stages(recipe: Recipe) -> dict[str, BlendPlan]:
    """Plan every training stage of a recipe.

    Raises:
        ConfigError: the recipe has no stages, or as ``plan_stage``.
        DataError: as ``plan_stage``.
    """
    stages = [*([recipe.base_train] if recipe.base_train else []), *recipe.train.stages]
    if not stages:
        raise ConfigError("train.stages: the recipe has none; add a table [[train.stages]]")
    return {stage.name: plan_stage(recipe, stage.name) for stage in stages}


def describe_stages(recipe: Recipe) -> str:
    """Return the tables of ``plan_stages`` below each other."""
    plans = plan_stages(recipe)
    return "\n\n".join(f"stage {name}\n{describe_plan(plan)}" for name, plan in plans.items())
