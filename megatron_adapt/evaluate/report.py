"""The result of an adaptation as a table: on the terminal and as ``report.md``.

Pure functions of plain figures: an evaluation (``evaluate``'s JSON), tokens per byte of the tokenizers, and facts
of the run as text. Old languages are compared with the base model (what was forgotten), new languages with the
resized model before training (what was learned).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_adapt.files import replace_file

Figures = Mapping[str, Mapping[str, float]]
Evaluation = dict[str, dict[str, dict[str, float]]]

BASE = "base"
RESIZED = "resized"


def write_report(path: Path, *, title: str, body: str) -> None:
    """Write ``report.md``: a title over what ``render_report`` returns; the file appears whole."""
    with replace_file(path) as partial:
        partial.write_text(f"# {title}\n\n{body}", encoding="utf-8")


def render_report(
    evaluation: Evaluation,
    tokens_per_byte: Figures,
    languages_old: Sequence[str],
    languages_new: Sequence[str],
    run_facts: Mapping[str, str],
) -> str:
    """Return the report as Markdown.

    Args:
        evaluation: ``{model: {language: {"bits_per_byte": x, ...}}}`` in the order of the run; the models called
            ``base`` and ``resized`` are what the changes refer to.
        tokens_per_byte: ``{tokenizer: {language: tokens per byte of text}}``, the base tokenizer first.
        languages_old: languages the base model knew.
        languages_new: languages it learned.
        run_facts: name and value of what a reader should know: tokens, blend, date, commit.
    """
    languages = [*languages_old, *languages_new]
    references = choose_references(evaluation, languages_old, languages_new)
    sections = [
        *_summarise(evaluation, references),
        "## Bits per byte",
        "Validation text the training never saw; lower is better. "
        "Change of an old language: against the base model; of a new one: against the resized model before training.",
        _to_markdown(tabulate_bits(evaluation, languages, references)),
        "## Bytes per token",
        "Higher is better: a token of the model covers more text.",
        _to_markdown(tabulate_bytes_per_token(tokens_per_byte, languages)),
        "## The run",
        _to_markdown([["fact", "value"], *([name, value] for name, value in run_facts.items())]),
    ]
    return "\n\n".join(sections) + "\n"


def choose_references(
    evaluation: Evaluation, languages_old: Sequence[str], languages_new: Sequence[str]
) -> dict[str, str]:
    """Return the model every language is compared with, as far as it was scored."""
    wanted = dict.fromkeys(languages_old, BASE) | dict.fromkeys(languages_new, RESIZED)
    return {language: model for language, model in wanted.items() if language in evaluation.get(model, {})}


def show_table(
    evaluation: Evaluation, languages_old: Sequence[str] = (), languages_new: Sequence[str] = (), width: int = 0
) -> None:
    """Show bits per byte of every model and language on standard output.

    Args:
        evaluation: as ``render_report`` takes it.
        languages_old: languages to show with their change against ``base``.
        languages_new: languages to show with their change against ``resized``.
        width: columns of the terminal; 0 takes those it has, or 120 where there is none.
    """
    scored = {language: None for scores in evaluation.values() for language in scores}
    languages = [*languages_old, *languages_new] or list(scored)
    header, *rows = tabulate_bits(
        evaluation, languages, choose_references(evaluation, languages_old, languages_new), with_bytes=True
    )
    table = Table(title="bits per byte of validation text")
    for at, name in enumerate(header):
        table.add_column(name, justify="right" if at else "left")
    for row in rows:
        table.add_row(*row)
    console = Console()
    if width or not console.is_terminal:
        console = Console(width=width or 120)
    console.print(table)


# ---------------------------------------------------------------- rows of text


def tabulate_bits(
    evaluation: Evaluation, languages: Sequence[str], references: Mapping[str, str], *, with_bytes: bool = False
) -> list[list[str]]:
    """Return header and rows: a model a row, bits per byte and change for every language.

    Args:
        evaluation: the scores.
        languages: the languages, in the order of the columns.
        references: the model a language's changes refer to; a language without one has no column of changes.
        with_bytes: also show bytes per token for every language.
    """
    header = ["model"]
    for language in languages:
        header += [language] + ["change"] * (language in references) + [f"{language} bytes/token"] * with_bytes
    rows = [header]
    for model, scores in evaluation.items():
        row = [model]
        for language in languages:
            score = scores.get(language)
            row.append(f"{score['bits_per_byte']:.4f}" if score else "-")
            if language in references:
                row.append(_describe_change(evaluation, model, language, references[language]))
            if with_bytes:
                row.append(f"{1 / score['tokens_per_byte']:.2f}" if score else "-")
        rows.append(row)
    return rows


def tabulate_bytes_per_token(tokens_per_byte: Figures, languages: Sequence[str]) -> list[list[str]]:
    """Return header and rows: a tokenizer a row, bytes per token and change against the first for every language."""
    header = ["tokenizer"]
    for language in languages:
        header += [language, "change"]
    rows = [header]
    first = next(iter(tokens_per_byte.values()), {})
    for name, figures in tokens_per_byte.items():
        row = [name]
        for language in languages:
            if language not in figures:
                row += ["-", "-"]
                continue
            is_other = figures is not first and language in first
            row.append(f"{1 / figures[language]:.2f}")
            row.append(_format_percent(first[language] / figures[language] - 1) if is_other else "-")
        rows.append(row)
    return rows


def compute_change(evaluation: Evaluation, model: str, language: str, reference: str) -> float:
    """Return the relative change of bits per byte of a model against another: -0.3 is 30 % fewer bits."""
    before = evaluation[reference][language]["bits_per_byte"]
    return evaluation[model][language]["bits_per_byte"] / before - 1


def _describe_change(evaluation: Evaluation, model: str, language: str, reference: str) -> str:
    models = list(evaluation)
    if models.index(model) <= models.index(reference) or language not in evaluation[model]:
        return "-"
    return _format_percent(compute_change(evaluation, model, language, reference))


def _summarise(evaluation: Evaluation, references: Mapping[str, str]) -> list[str]:
    """Return one line a language: from its reference to the last model."""
    if not evaluation:
        return []
    last = list(evaluation)[-1]
    lines = []
    for language, reference in references.items():
        if reference == last or language not in evaluation[last]:
            continue
        before = evaluation[reference][language]["bits_per_byte"]
        after = evaluation[last][language]["bits_per_byte"]
        change = _format_percent(compute_change(evaluation, last, language, reference))
        lines.append(f"- {language}: {before:.4f} ({reference}) to {after:.4f} ({last}) bits per byte, {change}")
    return ["\n".join(lines)] if lines else []


def _format_percent(share: float) -> str:
    return f"{100 * share:+.1f} %"


def _to_markdown(rows: Sequence[Sequence[str]]) -> str:
    header, *body = rows
    escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (header, *body)]
    rule = ["---"] + ["--:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in (escaped[0], rule, *escaped[1:]))
