"""Tables on the terminal and plots of what ``diagnose`` found."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_adapt.plots import draw_plot
from megatron_adapt.vocab.geometry import PERCENTS

_WIDTH = 120
_MAX_LISTED = 10
_NUM_BINS = 60
_BAR_WIDTH = 0.8
_COLORS = {"base": "black", "kept": "tab:blue", "moved": "tab:green", "new": "tab:orange"}


def show_diagnosis(figures: Mapping[str, Any]) -> None:
    """Show the figures on standard output; bits per byte are shown by what measured them."""
    console = Console()
    console = console if console.is_terminal else Console(width=_WIDTH)
    tables = [_tabulate_vocabulary(figures["vocabulary"]), _tabulate_norms(figures["matrices"])]
    tables += [_tabulate_odd(figures["matrices"])]
    tables += [_tabulate_use(figures["use"])] if figures["use"] else []
    tables += [_tabulate_nearest(role, matrix["nearest"]) for role, matrix in figures["matrices"].items()]
    tables += [_tabulate_donor(figures["donor"])] if figures["donor"] else []
    tables += [_tabulate_lexicon(figures["lexicon"])] if figures["lexicon"] else []
    for table in tables:
        console.print(table)


def _make_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], num_names: int = 1) -> Table:
    table = Table(title=Text(title))
    for at, heading in enumerate(headings):
        table.add_column(heading, justify="left" if at < num_names else "right")
    for row in rows:
        table.add_row(*map(Text, row))  # pieces may look like markup
    return table


def _tabulate_vocabulary(found: Mapping[str, Any]) -> Table:
    ways = ("kept", "moved", "new", "dropped")
    rows = [[name, *(f"{counts[way]:,}" for way in ways)] for name, counts in found["scripts"].items()]
    rows.append(["all", *(f"{found[way]:,}" for way in ways)])
    title = (
        f"tokens: {found['base_vocab_size']:,} before, {found['vocab_size']:,} now; "
        f"{found['pieces_per_new_token']:.2f} old pieces per new token"
    )
    return _make_table(title, ["script", *ways], rows)


def _tabulate_norms(matrices: Mapping[str, Any]) -> Table:
    rows = [
        [role, name, *(f"{norms[str(percent)]:.4g}" if norms else "-" for percent in PERCENTS)]
        for role, matrix in matrices.items()
        for name, norms in matrix["norms"].items()
    ]
    return _make_table("length of rows", ["matrix", "rows", *(f"{percent} %" for percent in PERCENTS)], rows, 2)


def _tabulate_odd(matrices: Mapping[str, Any]) -> Table:
    rows = []
    for role, matrix in matrices.items():
        kept = matrix["kept_rows"]
        cosine = "-" if kept["mean_cosine"] is None else f"{kept['mean_cosine']:.4f}"
        rows.append([role, "kept, as in the base", f"{kept['identical']:.1%}", f"mean cosine {cosine}"])
        for kind, label in {"not_finite": "not finite", "zero": "zero", "tiny": "new and tiny"}.items():
            found = matrix["odd_rows"][kind]
            listed = ", ".join(f"{item['id']} {item['token']!r}" for item in found["tokens"][:_MAX_LISTED])
            more = ", ..." if found["count"] > _MAX_LISTED else ""
            rows.append([role, label, f"{found['count']:,}", listed + more])
    table = _make_table("rows to look at (tiny: shorter than 99 % of the old)", ["matrix", "rows", "", ""], rows, 2)
    table.columns[3].justify = "left"
    return table


def _tabulate_use(use: Mapping[str, Any]) -> Table:
    rows = [
        [
            language,
            f"{item['tokens']:,}",
            f"{item['share_of_new_tokens']:.1%}",
            f"{item['new_tokens_seen']:.1%}",
            f"{item['vocabulary_used']:.1%}",
        ]
        for language, item in use.items()
    ]
    headings = ["language", "tokens", "of these new", "new tokens seen", "ids used"]
    return _make_table("use of the vocabulary", headings, rows)


def _tabulate_nearest(role: str, nearest: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        [
            f"{item['id']} {item['token']!r}",
            "-" if item["occurrences"] is None else f"{item['occurrences']:,}",
            "  ".join(f"{near['token']!r} {near['cosine']:.2f}" for near in item["nearest"]) or "-",
        ]
        for item in nearest
    ]
    table = _make_table(f"old tokens nearest to new ones, {role}", ["new token", "seen", "nearest, cosine"], rows)
    table.columns[2].justify = "left"
    return table


def _tabulate_donor(donor: Mapping[str, Any]) -> Table:
    by_occurrence = donor["new_in_donor_by_occurrence"]
    title = (
        f"donor: {donor['shared']:,} of its {donor['tokens']:,} tokens shared, it has {donor['new_in_donor']:.1%} of "
    )
    title += "the new ones" + ("" if by_occurrence is None else f" ({by_occurrence:.1%} by occurrence)")
    rows = [
        [
            role,
            item["estimator"],
            f"{item['fitted']:,}",
            f"{item['held_out']:,}",
            "-" if item["r2"] is None else f"{item['r2']:.3f}",
            f"{item['mean_cosine']:.3f}",
        ]
        for role, item in donor["maps"].items()
    ]
    return _make_table(title, ["matrix", "map", "fitted", "held out", "R2", "mean cosine"], rows, 2)


def _tabulate_lexicon(lexicon: Mapping[str, Any]) -> Table:
    left_out = lexicon["left_out"]
    title = (
        f"translations found by the input rows, of {lexicon['entries']:,} (left out: {left_out['long']:,} long, "
        f"{left_out['no_new_token']:,} without a new token, {left_out['new_token_in_old']:,} old words with one)"
    )
    rows = [
        [
            label,
            kind,
            f"{lexicon[way]['queries']:,}",
            f"{lexicon[way]['candidates']:,}",
            *(f"{lexicon[way][kind][rank]:.2%}" for rank in ("1", "5")),
            f"{lexicon[way][kind]['above']:.1%}",
        ]
        for way, label in {"to_old": "new to old", "to_new": "old to new"}.items()
        for kind in ("cosine", "csls", "chance")
    ]
    headings = ["search", "by", "queries", "candidates", "first", "in first 5", "others that score higher"]
    return _make_table(title, headings, rows, 2)


# ---------------------------------------------------------------- plots


def draw_diagnosis(figures: Mapping[str, Any], norms: Mapping[str, Mapping[str, np.ndarray]], folder: Path) -> None:
    """Draw the figures into a folder: ``norms-input.png``, ``norms-head.png``, ``scripts.png`` and what else there is.

    Args:
        figures: as ``diagnose_vocab`` returns them.
        norms: lengths of rows by matrix and ``base``, ``kept`` and ``new``.
        folder: written into; made if missing.
    """
    for role, lengths in norms.items():
        _draw_norms(role, lengths, folder / f"norms-{role}.png")
    _draw_scripts(figures["vocabulary"]["scripts"], folder / "scripts.png")
    if figures["bits_per_byte"]:
        scores = {
            model: {language: score["bits_per_byte"] for language, score in found.items()}
            for model, found in figures["bits_per_byte"].items()
        }
        labels = {"title": "Bits per byte before and after", "y_label": "bits per byte (lower is better)"}
        _draw_groups(scores, folder / "bits_per_byte.png", **labels)
    if figures["lexicon"]:
        found = {
            f"{kind} @{rank}": {
                label: figures["lexicon"][way][kind][rank]
                for way, label in {"to_old": "new to old", "to_new": "old to new"}.items()
            }
            for kind in ("cosine", "csls", "chance")
            for rank in ("1", "5")
        }
        labels = {"title": "Translations found by the input rows", "y_label": "precision (higher is better)"}
        _draw_groups(found, folder / "lexicon.png", **labels)


def _draw_norms(role: str, lengths: Mapping[str, np.ndarray], path: Path) -> None:
    finite = {name: lengths[name][np.isfinite(lengths[name])] for name in ("base", "kept", "new")}
    largest = max((part.max() for part in finite.values() if len(part)), default=0.0)
    edges = np.linspace(0, largest or 1.0, _NUM_BINS + 1)
    with draw_plot(path, title=f"Length of rows, {role}", x_label="length", y_label="share of the rows") as axes:
        for name, part in finite.items():
            shares = np.histogram(part, edges)[0] / max(1, len(part))
            label = f"{name} ({len(part):,})"
            axes.stairs(shares, edges, label=label, color=_COLORS[name], fill=name != "base", alpha=0.6)
        axes.set_xlim(0, edges[-1])


def _draw_scripts(scripts: Mapping[str, Mapping[str, int]], path: Path) -> None:
    names = list(scripts)
    with draw_plot(path, title="Tokens by script", x_label="tokens", y_label="") as axes:
        left = np.zeros(len(names))
        for way in ("kept", "moved", "new"):
            counts = np.array([scripts[name][way] for name in names])
            if counts.any():
                axes.barh(names, counts, _BAR_WIDTH, left=left, label=way, color=_COLORS[way], zorder=2)
            left = left + counts
        axes.invert_yaxis()
        axes.margins(x=0.05)
        axes.grid(visible=False, axis="y")


def _draw_groups(found: Mapping[str, Mapping[str, float]], path: Path, *, title: str, y_label: str) -> None:
    """Draw bars, a group for each inner key and a colour for each outer one."""
    groups = list(next(iter(found.values())))
    width = _BAR_WIDTH / len(found)
    with draw_plot(path, title=title, x_label="", y_label=y_label) as axes:
        for at, (name, row) in enumerate(found.items()):
            places = [group + (at - (len(found) - 1) / 2) * width for group in range(len(groups))]
            bars = axes.bar(places, [row[group] for group in groups], 0.92 * width, label=name, zorder=2)
            axes.bar_label(bars, fmt="%.3g", padding=2, fontsize=8)
        axes.set_xticks(range(len(groups)), groups)
        axes.margins(y=0.12)
        axes.grid(visible=False, axis="x")
