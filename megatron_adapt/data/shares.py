"""Shares as exact fractions: nested, held under limits, and turned into whole windows.

A blend gives each language a share; its sources split it. Everything here is a fraction of Python's integers, read
from the decimals the user wrote (0.1 is one tenth), so that equal input gives equal windows on any machine.

1. ``nest_shares``: share of each source in the whole, by size, weight or temperature within its language.
2. ``apportion``: the windows of each source are those of the first ``total`` places of the order they are read in
   (``blend``), each its exact part rounded down or up. Largest remainders would not do: with them a longer run may give
   a source less (the Alabama paradox), so that no order could be the beginning of another (Balinski, Young 1982).
3. ``SHORTFALLS``: what is left of it under the limits of ``find_limits`` - ``fail_short`` refuses to read less than
   asked; ``redistribute`` fills sources up to their limit and lets the others grow in proportion (water-filling),
   first within the language, so that it keeps its share while it can; ``cap_budget`` keeps every share and shortens
   the stage to the last whole step that fits.
4. ``round_nested`` rounds what was redistributed: largest remainder (Hamilton's method) between languages, then within
   each, so that integer limits that hold for the parts hold for the windows.

Costs: O(K log K) fractions. Temperature: Arivazhagan et al. 2019, "Massively multilingual neural machine translation
in the wild" (arXiv 1907.05019). Why limit repetition: Muennighoff et al. 2023, "Scaling data-constrained language
models" (arXiv 2305.16264): up to four epochs are worth nearly as much as new text.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Context, Decimal
from fractions import Fraction

from megatron_adapt.config import StageSettings
from megatron_adapt.config.names import get_language
from megatron_adapt.data.blend import count_prefix, whole_weights
from megatron_adapt.errors import ConfigError

Shares = Mapping[str, Fraction]

# Enough for 2 ** 64 tokens; unlike floats, decimals give the same power on every machine.
_DECIMALS = Context(prec=40)


def read_decimal(value: float | Fraction) -> Fraction:
    """Return the fraction a user wrote as a decimal; a fraction stays what it is."""
    return value if isinstance(value, Fraction) else Fraction(repr(float(value)))


def normalise(ratio: Shares) -> dict[str, Fraction]:
    """Divide by the sum."""
    total = _sum(ratio)
    return {name: part / total for name, part in ratio.items()}


def _sum(parts: Shares) -> Fraction:
    return sum(parts.values(), Fraction())


def _group(parts: Shares) -> dict[str, dict[str, Fraction]]:
    """Put the sources of each language together."""
    groups: dict[str, dict[str, Fraction]] = {}
    for source, part in parts.items():
        groups.setdefault(get_language(source), {})[source] = part
    return groups


# ---------------------------------------------------------------- nested shares


def _split_by_size(stage: StageSettings, tokens: Mapping[str, int]) -> dict[str, Fraction]:
    return {source: Fraction(held) for source, held in tokens.items()}


def _split_by_weight(stage: StageSettings, tokens: Mapping[str, int]) -> dict[str, Fraction]:
    if len(tokens) == 1:
        return dict.fromkeys(tokens, Fraction(1))
    return {source: read_decimal(stage.weights[source]) for source in tokens}


def _split_by_temperature(stage: StageSettings, tokens: Mapping[str, int]) -> dict[str, Fraction]:
    power = _DECIMALS.divide(Decimal(1), Decimal(repr(stage.temperature)))
    return {source: Fraction(_DECIMALS.power(Decimal(held), power)) for source, held in tokens.items()}


WITHIN: dict[str, Callable[[StageSettings, Mapping[str, int]], dict[str, Fraction]]] = {
    "size": _split_by_size,
    "weight": _split_by_weight,
    "temperature": _split_by_temperature,
}
"Parts of a language's sources by name of ``StageSettings.within``; they need not sum to one."


def nest_shares(stage: StageSettings, tokens: Mapping[str, int]) -> dict[str, Fraction]:
    """Return the share of each source in the whole stage; together they are one.

    Args:
        stage: shares of the languages, and how each is split.
        tokens: tokens of each source that the stage reads, at least 1.
    """
    languages = normalise({language: read_decimal(share) for language, share in stage.blend.items()})
    shares: dict[str, Fraction] = {}
    for language, share in languages.items():
        own = {source: held for source, held in tokens.items() if get_language(source) == language}
        parts = normalise(WITHIN[stage.within](stage, own))
        shares |= {source: share * part for source, part in parts.items()}
    return shares


# ---------------------------------------------------------------- whole windows


def apportion(shares: Shares, total: int) -> dict[str, int]:
    """Split ``total`` windows by ``shares`` as the order they are read in does."""
    return dict(zip(shares, count_prefix(whole_weights(list(shares.values())), total).tolist(), strict=True))


# ---------------------------------------------------------------- limits


@dataclass(frozen=True, kw_only=True)
class Limit:
    """Windows that a source, or the sources of a language together, may still be read."""

    name: str
    "The source or language, as ``max_epochs`` names it."
    members: tuple[str, ...]
    "Its sources."
    windows: int
    "How many may be read; 0 if earlier stages used them up."

    def count(self, windows: Mapping[str, int]) -> int:
        """Return how many of the windows of all sources are under this limit."""
        return sum(windows[source] for source in self.members)


def find_limits(
    max_epochs: Mapping[str, float], available: Mapping[str, int], first: Mapping[str, int]
) -> tuple[Limit, ...]:
    """Turn epochs into windows.

    Args:
        max_epochs: epochs of a source or a language over all stages that continue each other.
        available: windows each source has, which is an epoch.
        first: windows of each source that were read before.
    """
    limits = []
    for name, epochs in max_epochs.items():
        members = tuple(source for source in available if name in (source, get_language(source)))
        allowed = math.floor(read_decimal(epochs) * sum(available[source] for source in members))
        left = allowed - sum(first[source] for source in members)
        limits.append(Limit(name=name, members=members, windows=max(0, left)))
    return tuple(limits)


# ---------------------------------------------------------------- what to do when a source falls short


def fail_short(shares: Shares, limits: Sequence[Limit], total: int, step: int) -> dict[str, int]:
    """Split ``total`` windows by ``shares``; refuse if that breaks a limit.

    Raises:
        ConfigError: a source would be read more often than allowed.
    """
    windows = apportion(shares, total)
    for limit in limits:
        asked = limit.count(windows)
        if asked > limit.windows:
            raise ConfigError(
                f"blend.{limit.name}: the stage asks for {asked:,} windows where max_epochs leaves {limit.windows:,}; "
                'lower tokens, raise max_epochs, or set shortfall = "redistribute" or "cap"'
            )
    return windows


def redistribute(shares: Shares, limits: Sequence[Limit], total: int, step: int) -> dict[str, int]:
    """Split ``total`` windows by ``shares`` as far as the limits allow; the others take what a source lacks.

    Raises:
        ConfigError: all sources together may not be read so often.
    """
    plain = apportion(shares, total)
    if all(limit.count(plain) <= limit.windows for limit in limits):
        return plain
    ceilings = {limit.name: limit.windows for limit in limits}
    groups = _group(shares)
    inside = {language: [ceilings.get(source, math.inf) for source in group] for language, group in groups.items()}
    most = {language: min(ceilings.get(language, math.inf), sum(inside[language])) for language in groups}
    if sum(most.values()) < total:
        raise ConfigError(
            f"blend: max_epochs leaves {sum(most.values()):,} windows of all sources for a stage of {total:,}; "
            "lower tokens or raise max_epochs"
        )
    languages = fill_up({language: _sum(group) for language, group in groups.items()}, most, total)
    exact: dict[str, Fraction] = {}
    for language, group in groups.items():
        exact |= fill_up(group, dict(zip(group, inside[language], strict=True)), languages[language])
    return round_nested(exact, total)


def cap_budget(shares: Shares, limits: Sequence[Limit], total: int, step: int) -> dict[str, int]:
    """Split by ``shares`` the most whole steps that break no limit, at most ``total`` windows.

    Raises:
        ConfigError: not even one step is left.
    """
    room = {limit.name: limit.windows / _sum({source: shares[source] for source in limit.members}) for limit in limits}
    most = math.floor(min([*room.values(), Fraction(total)])) // step * step
    for capped in range(most, 0, -step):
        windows = apportion(shares, capped)
        # The sources of a language may each be rounded up.
        if all(limit.count(windows) <= limit.windows for limit in limits):
            return windows
    tightest = min(limits, key=lambda limit: room[limit.name])
    raise ConfigError(
        f"blend.{tightest.name}: max_epochs leaves {tightest.windows:,} windows, too few for one step of "
        f"{step:,} at its share; raise max_epochs or lower the share"
    )


SHORTFALLS: dict[str, Callable[[Shares, Sequence[Limit], int, int], dict[str, int]]] = {
    "fail": fail_short,
    "redistribute": redistribute,
    "cap": cap_budget,
}
"Windows per source from shares, limits, windows asked for and windows in a step, by ``StageSettings.shortfall``."


def fill_up(shares: Shares, ceilings: Mapping[str, float], total: int | Fraction) -> dict[str, Fraction]:
    """Split ``total`` in proportion to ``shares``, none above its ceiling; they must have room for it."""
    parts: dict[str, Fraction] = {}
    left, weight = Fraction(total), _sum(shares)
    # In this order, once a ceiling is not reached no later one is.
    for name in sorted(shares, key=lambda name: ceilings[name] / shares[name]):
        part = shares[name] * left / weight
        parts[name] = part if part <= ceilings[name] else Fraction(int(ceilings[name]))
        left, weight = left - parts[name], weight - shares[name]
    return {name: parts[name] for name in shares}


# ---------------------------------------------------------------- rounding


def round_nested(exact: Shares, total: int) -> dict[str, int]:
    """Round the parts of the sources to whole numbers that sum to ``total``, as their exact sum does.

    Every source, and every language as the sum of its sources, is rounded down or up, never further.
    """
    groups = _group(exact)
    languages = _round_parts({language: _sum(group) for language, group in groups.items()}, total)
    rounded: dict[str, int] = {}
    for language, group in groups.items():
        rounded |= _round_parts(group, languages[language])
    return rounded


def _round_parts(exact: Shares, total: int) -> dict[str, int]:
    """Round down, and those with the largest remainders up; equal remainders fall to the one named first."""
    parts = {name: math.floor(part) for name, part in exact.items()}
    by_remainder = sorted(exact, key=lambda name: parts[name] - exact[name])
    for name in by_remainder[: total - sum(parts.values())]:
        parts[name] += 1
    return parts
