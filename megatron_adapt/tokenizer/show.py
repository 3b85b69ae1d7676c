"""Tables on the terminal and plots of what ``measure`` and ``sweep`` found."""

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_adapt.plots import draw_plot
from megatron_adapt.tokenizer.figures import TokenizerFigures
from megatron_adapt.tokenizer.sweep import Sweep, SweepSize

_WIDTH = 120
_GROUP_WIDTH = 0.8  # of the distance between two languages
_MAX_LABELS = 30  # more would overlap


def show_figures(figures: Mapping[str, Mapping[str, TokenizerFigures]]) -> None:
    """Show the figures on standard output, one row for each language and tokenizer."""
    rows = [(language, name, row[language]) for language in _list_languages(figures) for name, row in figures.items()]
    has_premium = any(item.premium is not None for _, _, item in rows)
    headings = ["text", "tokens per word", "tokens per char", "bytes per token", "1-token words"]
    headings += ["ids used", "Rényi eff."] + ["premium"] * has_premium
    table = _make_table("tokens of text", ["language", "tokenizer"], headings)
    for at, (language, name, item) in enumerate(rows):
        cells = [
            f"{item.bytes / 1e6:.2f} MB",
            f"{item.tokens_per_word:.2f}",
            f"{item.tokens_per_character:.3f}",
            f"{item.bytes_per_token:.2f}",
            f"{item.single_token_words:.1%}",
            f"{item.vocabulary_used:.1%}",
            f"{item.renyi_efficiency:.3f}",
        ]
        cells += ["-" if item.premium is None else f"{item.premium:.2f}"] * has_premium
        table.add_row(language, name, *cells, end_section=(at + 1) % len(figures) == 0)
    _print(table)


def draw_figures(figures: Mapping[str, Mapping[str, TokenizerFigures]], path: Path) -> None:
    """Draw bytes per token as bars, a group for each language and a colour for each tokenizer."""
    languages = _list_languages(figures)
    width = _GROUP_WIDTH / len(figures)
    with draw_plot(path, title="Bytes a token covers (more is better)", x_label="", y_label="bytes per token") as axes:
        for at, (name, row) in enumerate(figures.items()):
            places = [group + (at - (len(figures) - 1) / 2) * width for group in range(len(languages))]
            heights = [row[language].bytes_per_token for language in languages]
            bars = axes.bar(places, heights, 0.92 * width, label=name, zorder=2)
            if len(figures) * len(languages) <= _MAX_LABELS:
                axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
        axes.set_xticks(range(len(languages)), languages)
        axes.margins(y=0.12)
        axes.grid(visible=False, axis="x")


def show_sweep(sweep: Sweep) -> None:
    """Show the sizes on standard output, one row for each language and size, and where the gain flattens."""
    headings = ["ids", "tokens per byte", "saved", "saved per 1000 rows"]
    if sweep.sizes[0].cost:
        headings += ["weights added", "of the model", "head FLOPs per token", "of the model", "FLOPs per byte"]
    table = _make_table(f"{sweep.base.name} extended", ["language", "size"], headings)
    for language in sweep.flattens_at:
        for item in sweep.sizes:
            table.add_row(language, *_describe_size(item, language), end_section=item is sweep.sizes[-1])
    _print(table)
    _console().print(_say_where_flat(sweep), soft_wrap=True, highlight=False)


def _describe_size(item: SweepSize, language: str) -> list[str]:
    step, cost = item.languages[language], item.cost
    is_base = item.size == 0
    cells = ["base" if is_base else f"+{item.size}%", f"{item.vocab_size:,}", f"{step.figures.tokens_per_byte:.4f}"]
    cells += [""] * 2 if is_base else [f"{step.saved:.2%}", f"{step.saved_per_1000_rows:.3%}"]
    if cost:
        parameters, flops = (f"{count / 1e6:,.1f} M" for count in (cost.parameters, cost.head_flops))
        shares = parameters, f"{cost.parameters_share:.1%}", flops, f"{cost.flops_share:.1%}"
        cells += [""] * len(shares) if is_base else shares
        cells.append(f"{step.flops_per_byte:.0%}")
    return cells


def _say_where_flat(sweep: Sweep) -> str:
    last = sweep.sizes[-1].size
    places = [
        f"{language} not by +{last}%" if size is None else f"{language} at {f'+{size}%' if size else 'the base'}"
        for language, size in sweep.flattens_at.items()
    ]
    return f"The gain flattens ({sweep.rule}): {', '.join(places)}."


def draw_sweep(sweep: Sweep, path: Path) -> None:
    """Draw tokens per byte by size, a line for each language; a ring marks where the gain flattens."""
    sizes = [item.size for item in sweep.sizes]
    labels = {"x_label": "pieces added, % of the base's vocabulary", "y_label": "tokens per byte (fewer is better)"}
    with draw_plot(path, title="Tokens per byte by size of the extension", **labels) as axes:
        for language, flat_at in sweep.flattens_at.items():
            heights = [item.languages[language].figures.tokens_per_byte for item in sweep.sizes]
            (line,) = axes.plot(sizes, heights, marker="o", markersize=4, label=language)
            if flat_at is not None:
                place = sizes.index(flat_at)
                axes.plot(flat_at, heights[place], "o", markersize=12, markerfacecolor="none", color=line.get_color())
        axes.plot([], [], "o", markersize=12, markerfacecolor="none", color="gray", label="gain flattens")
        axes.set_xticks(sizes)
        axes.set_ylim(bottom=0)


def _list_languages(figures: Mapping[str, Mapping[str, TokenizerFigures]]) -> list[str]:
    return list({language: None for row in figures.values() for language in row})


def _make_table(title: str, names: list[str], headings: list[str]) -> Table:
    table = Table(title=title)
    for heading in names:
        table.add_column(heading, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _print(table: Table) -> None:
    _console().print(table)


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=_WIDTH)
