"""From a token budget and shares to a whole number of windows per source.

Reads: shares, the tokens each source holds. Writes: a ``BlendPlan``, also as JSON; needs no torch.
Guarantees: the windows of all sources are exactly ``steps * global_batch_size``; every source gets less than one window
more or less than its share, in the whole stage and up to any place in it; a longer stage with the same shares begins
with the same windows; equal input gives an equal plan on any machine.

``make_plan``: ``steps = ceil(tokens / (global_batch_size * seq_length))``; what ``max_epochs`` leaves (``shares``); the
whole weights that decide the order (``blend``), and how many windows of each source it names.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Any

import orjson

from megatron_adapt.data.blend import count_prefix, whole_weights
from megatron_adapt.data.shares import SHORTFALLS, apportion, find_limits, normalise, read_decimal
from megatron_adapt.data.windows import count_windows
from megatron_adapt.errors import ConfigError, DataError
from megatron_adapt.files import read_json, write_json


@dataclass(frozen=True, kw_only=True)
class BlendPlan:
    """How many windows of each source a training stage reads."""

    sources: tuple[str, ...]
    "Names, in the order of the recipe."
    weights: tuple[int, ...]
    "Shares as whole numbers, which decide the order of the sources."
    windows: tuple[int, ...]
    "Windows to read of each source."
    available: tuple[int, ...]
    "Windows each source has; it is read again from the start when they are used up."
    first: tuple[int, ...]
    "Windows of each source that were read before this plan, by any stage; it begins behind them."
    before: tuple[int, ...]
    "Windows of each source among these that the stage itself read, under an earlier plan; mostly none."
    seq_length: int
    "Tokens to predict in a window."
    global_batch_size: int
    "Windows in a step."
    seed: int
    "Seed of the order inside each source."
    aligned: bool
    "Whether windows begin where documents begin (``align``)."
    asked: tuple[int, ...]
    "Windows of each source the blend asks for; ``max_epochs`` may leave another number."
    loss_tokens: tuple[int, ...]
    "Targets of each source that the loss counts; expected ones where it leaves out the end of documents."

    @property
    def begin(self) -> int:
        """Place in the stage from which this plan holds."""
        return sum(self.before)

    @property
    def num_windows(self) -> int:
        """Windows of the stage, those before this plan included."""
        return self.begin + sum(self.windows)

    @property
    def num_steps(self) -> int:
        """Optimizer steps."""
        return self.num_windows // self.global_batch_size

    @property
    def epochs(self) -> tuple[float, ...]:
        """How often this stage reads each source."""
        read = zip(self.before, self.windows, self.available, strict=True)
        return tuple((before + count) / has for before, count, has in read)

    @property
    def repeats(self) -> tuple[int, ...]:
        """How many of the windows of each source are read for the second time or later, in any stage."""
        read = zip(self.windows, self.available, self.first, strict=True)
        return tuple(max(0, first + count - max(first, has)) for count, has, first in read)

    @property
    def plan_hash(self) -> str:
        """Hash of everything that decides which window is read at which place; the data have their own."""
        decisive = [getattr(self, name) for name in (*_ORDERING, "windows")]
        return hashlib.blake2b(orjson.dumps(decisive), digest_size=16).hexdigest()

    def count_before(self, place: int) -> tuple[int, ...]:
        """Count the windows of each source that the stage has read at ``place``, from ``begin`` on."""
        counts_K = count_prefix(self.weights, place - self.begin)
        return tuple(before + int(count) for before, count in zip(self.before, counts_K, strict=True))

    def reads_as(self, other: "BlendPlan") -> bool:
        """Tell whether the two read the same windows at the same places, as far as both go."""
        return all(getattr(self, name) == getattr(other, name) for name in _ORDERING)


@dataclass(frozen=True)
class BlendPosition:
    """Where a stage stands in its sources."""

    plan: BlendPlan
    read: tuple[int, ...]
    "Windows of each source that the stage has read."
    fingerprints: Mapping[str, str]
    "Hash of each source's data."

    def describe(self) -> dict[str, dict[str, int | str]]:
        """Return the cursor of each source: epochs behind it, windows of this one, those of this stage, its data."""
        cursors: dict[str, dict[str, int | str]] = {}
        for at, source in enumerate(self.plan.sources):
            ordinal = self.plan.first[at] - self.plan.before[at] + self.read[at]
            epoch, window = divmod(ordinal, self.plan.available[at])
            data = self.fingerprints[source]
            cursors[source] = {"epoch": epoch, "window": window, "read": self.read[at], "data": data}
        return cursors


_ORDERING = ("sources", "weights", "available", "first", "before", "seq_length", "seed", "aligned")


def make_plan(
    shares: Mapping[str, float | Fraction],
    tokens: int,
    available: Mapping[str, int],
    *,
    seq_length: int,
    global_batch_size: int,
    seed: int,
    first: Mapping[str, int] | None = None,
    before: Mapping[str, int] | None = None,
    max_epochs: Mapping[str, float] | None = None,
    shortfall: str = "fail",
    masked: Mapping[str, Fraction] | None = None,
    aligned: Mapping[str, int] | None = None,
) -> BlendPlan:
    """Turn a token budget and shares into windows per source.

    Args:
        shares: share of the tokens per source; divided by their sum.
        tokens: tokens to train on in the whole stage; rounded up to whole steps.
        available: tokens each source holds.
        seq_length: tokens to predict in a window.
        global_batch_size: windows in a step.
        seed: seed of the order inside each source.
        first: windows of a source that were read before; 0 where it names none.
        before: those of them that the stage itself has read.
        max_epochs: how often a source, or a language as a whole, may be read, with what ``first`` says.
        shortfall: what to do when the budget asks for more: a key of ``SHORTFALLS``.
        masked: part of a source's targets that the loss leaves out; none where it names none.
        aligned: windows that begin where documents begin, of each source; None cuts everywhere.

    Raises:
        ConfigError: a share is not positive, a source is unknown, the budget is not positive or over ``max_epochs``.
        DataError: a source holds no tokens, or less than one window.
    """
    _check(shares, available, tokens=tokens, seq_length=seq_length, global_batch_size=global_batch_size)
    has = aligned or {source: _count_available(source, available[source], seq_length) for source in shares}
    has, read, own = ({source: (counts or {}).get(source, 0) for source in shares} for counts in (has, first, before))
    whole = math.ceil(Fraction(tokens, global_batch_size * seq_length)) * global_batch_size
    total = whole - sum(own.values())
    if total <= 0:
        raise ConfigError(f"blend: the stage has read {sum(own.values())} windows, tokens asks for {whole}; raise it")
    exact = normalise({source: read_decimal(share) for source, share in shares.items()})
    windows = SHORTFALLS[shortfall](exact, find_limits(max_epochs or {}, has, read), total, global_batch_size)
    asked = windows if not max_epochs else apportion(exact, total)
    targets = {source: windows[source] * seq_length for source in shares}
    return BlendPlan(
        sources=tuple(shares),
        weights=_find_weights(exact, windows),
        windows=tuple(windows[source] for source in shares),
        available=tuple(has.values()),
        first=tuple(read.values()),
        before=tuple(own.values()),
        seq_length=seq_length,
        global_batch_size=global_batch_size,
        seed=seed,
        aligned=aligned is not None,
        asked=tuple(asked[source] for source in shares),
        loss_tokens=tuple(count - round(count * (masked or {}).get(source, 0)) for source, count in targets.items()),
    )


def _find_weights(shares: Mapping[str, Fraction], windows: Mapping[str, int]) -> tuple[int, ...]:
    """Return the weights of the order: those of the shares, or the windows themselves where limits changed them."""
    counts = tuple(windows[source] for source in shares)
    weights = whole_weights(list(shares.values()))
    return weights if tuple(count_prefix(weights, sum(counts)).tolist()) == counts else counts


def _check(shares: Mapping[str, float | Fraction], available: Mapping[str, int], **sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ConfigError(f"blend: {name} {value} is below 1; correct it")
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
    for name in ("seq_length", "seed", "aligned"):
        old, new = getattr(before, name), getattr(after, name)
        if old != new:
            return f"{name} {old}, now {new}"
    changes = []
    for name in ("available", "first", "before", "windows"):
        for source, old, new in zip(before.sources, getattr(before, name), getattr(after, name), strict=True):
            if old != new:
                changes.append(f"{name} of {source} {old}, now {new}")
    return "; ".join(changes) or "the shares"
