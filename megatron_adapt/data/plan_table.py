"""A blend plan for the eye: a table on the terminal, a picture, and both for all stages of a recipe.

Reads: a recipe and the token files in its run folder. Writes: ``plans/<stage>.json`` and ``plans/<stage>.png``.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_adapt.config.names import get_language
from megatron_adapt.data.plan import BlendPlan, write_plan
from megatron_adapt.data.stage_plans import plan_stages
from megatron_adapt.plots import draw_plot
from megatron_adapt.recipe import Recipe
from megatron_adapt.run_folder import RunFolder

_logger = logging.getLogger(__name__)
_NUM_BARS = 20


def show_plans(recipe: Recipe) -> None:
    """Plan every stage of a recipe, print the tables and write plans and pictures into the run folder.

    Raises:
        ConfigError: as ``plan_stages``.
        DataError: as ``plan_stages``.
    """
    plans, folder = plan_stages(recipe), RunFolder(recipe.work_dir).plans
    for name, plan in plans.items():
        sys.stdout.write(f"stage {name}\n{describe_plan(plan)}\n\n")
        write_plan(folder / f"{name}.json", plan)
        plot_plan(folder / f"{name}.png", plan, f"stage {name}: {plan.num_steps:,} steps")
    _logger.info("wrote %d plans, each with a picture, to %s", len(plans), folder)


# ---------------------------------------------------------------- the table


def describe_plan(plan: BlendPlan) -> str:
    """Return the plan as a table: a line per source, one per language of several sources, one for the sum.

    ``epochs`` are those of this stage, ``up to`` counts the stages it continues too; ``repeats`` are tokens read for
    the second time or later. ``asked``, ``up to`` and ``loss tokens`` appear where they say something new.
    """
    groups: dict[str, list[int]] = {}
    for at, source in enumerate(plan.sources):
        groups.setdefault(get_language(source), []).append(at)
    rows = []
    for language, members in groups.items():
        rows += [_make_row(plan, plan.sources[at], [at]) for at in members]
        rows += [_make_row(plan, f"{language}, all", members)] if len(members) > 1 else []
    everything = _make_row(plan, "all", range(len(plan.sources)))
    rows.append(everything | {"available": "", "epochs": "", "up to": ""})
    for column, is_news in (
        ("asked", plan.asked != plan.windows),
        ("up to", any(plan.first)),
        ("loss tokens", any(row["loss tokens"] != row["tokens"] for row in rows)),
    ):
        if not is_news:
            rows = [{name: cell for name, cell in row.items() if name != column} for row in rows]
    lines = _align([list(rows[0]), *([*row.values()] for row in rows)])
    return "\n".join([*lines, *_list_remarks(plan)])


def _make_row(plan: BlendPlan, name: str, members: Sequence[int]) -> dict[str, str]:
    """Return the cells of some sources together."""
    windows, available, first = (
        sum(column[at] for at in members) for column in (plan.windows, plan.available, plan.first)
    )
    asked, repeats = (sum(column[at] for at in members) for column in (plan.asked, plan.repeats))
    return {
        "source": name,
        "windows": f"{windows:,}",
        "tokens": f"{windows * plan.seq_length:,}",
        "loss tokens": f"{sum(plan.loss_tokens[at] for at in members):,}",
        "share": f"{windows / plan.num_windows:.4%}",
        "asked": f"{asked / sum(plan.asked):.4%}",
        "available": f"{available * plan.seq_length:,}",
        "epochs": f"{windows / available:.3f}",
        "up to": f"{(first + windows) / available:.3f}",
        "repeats": f"{repeats * plan.seq_length:,}",
    }


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Pad cells to columns: names to the left, numbers to the right."""
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    lines = []
    for name, *numbers in rows:
        cells = [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *cells]).rstrip())
    return lines


def _list_remarks(plan: BlendPlan) -> list[str]:
    """Say what a reader of the table should know before the stage runs."""
    remarks = []
    for source, count, asked in zip(plan.sources, plan.windows, plan.asked, strict=True):
        if count == 0:
            why = "max_epochs leaves nothing of it" if asked else "its share is less than a window"
            remarks.append(f"{source}: never read, {why}; raise it, or leave the source out")
    if sum(plan.asked) > plan.num_windows:
        asked_tokens = sum(plan.asked) * plan.seq_length
        remarks.append(f"max_epochs shortens the stage from {asked_tokens:,} tokens")
    steps = f"{plan.num_steps:,} steps of {plan.global_batch_size:,} windows of {plan.seq_length:,} tokens"
    return [*remarks, f"{steps}, plan {plan.plan_hash[:12]}"]


# ---------------------------------------------------------------- the picture


def plot_plan(path: Path, plan: BlendPlan, title: str) -> None:
    """Draw a bar per source, its first reads and its repeats, to a PNG; of many sources the largest."""
    largest = sorted(range(len(plan.sources)), key=lambda at: -plan.windows[at])[:_NUM_BARS]
    shown = sorted(largest, reverse=True)  # the first source on top
    left_out = len(plan.sources) - len(shown)
    title += f", the {len(shown)} largest of {len(plan.sources)} sources" if left_out else ""
    with draw_plot(path, title=title, x_label="tokens (millions)", y_label="") as axes:
        names = [plan.sources[at] for at in shown]
        repeats = [plan.repeats[at] * plan.seq_length / 1e6 for at in shown]
        whole = [plan.windows[at] * plan.seq_length / 1e6 for at in shown]
        fresh = [total - again for total, again in zip(whole, repeats, strict=True)]
        axes.barh(names, fresh, label="read for the first time")
        bars = axes.barh(names, repeats, left=fresh, label="repeats")
        labels = [f" {plan.windows[at] / plan.num_windows:.1%}, {plan.epochs[at]:.2f} epochs" for at in shown]
        axes.bar_label(bars, labels)
        axes.set_xlim(0, 1.7 * max(whole))  # room for the labels and the legend
        axes.set_axisbelow(True)
