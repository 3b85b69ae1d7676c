"""Measure ways to fill new rows against each other: one base, one tokenizer, one corpus, one short training stage.

Reads: a recipe with tables ``[compare.NAME]``. Writes below ``work_dir``: what ``pipeline`` writes up to the token
files, ``compare/NAME/stage.json`` with the figures of each way, ``compare.json``, ``compare.md`` and a picture of the
curves of each language. Guarantees: all ways see the same windows in the same order; a way that is finished is not
repeated, so a comparison that was killed continues. Models are removed once they are measured.

1. ``plan_vocabulary`` and what goes before it (``pipeline``): base, tokenizer and tokens, once for all.
2. ``measure_method``: resize, convert, and the first training stage of the recipe, in a run folder of its own.
3. ``write_comparison``: table, JSON and pictures.
"""

import logging
import shutil
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megatron_adapt.commands import run_commands
from megatron_adapt.config import VocabSettings
from megatron_adapt.data.batches import Batches
from megatron_adapt.data.plan import read_plan
from megatron_adapt.errors import ConfigError
from megatron_adapt.files import STAGE_FILE, is_finished, read_json, replace_file, to_plain, write_json, write_stage
from megatron_adapt.logs import read_metrics
from megatron_adapt.pipeline import (
    check_recipe,
    find_base_model,
    plan_base,
    plan_corpus,
    plan_training,
    plan_vocabulary,
)
from megatron_adapt.plots import draw_plot
from megatron_adapt.recipe import Recipe
from megatron_adapt.run_folder import RunFolder

_logger = logging.getLogger(__name__)
_SHARED = ("corpus", "tokenizer", "tokens")
_MODELS = ("resized", "megatron", "checkpoints")
_COLUMNS = ("method", "fill s", "fill MiB")


def compare_init(recipe: Recipe, tools: Path) -> None:
    """Fill the new rows in every way of the recipe, train the first stage from each, and compare.

    Args:
        recipe: what to do; of its training stages the first is run, usually one that trains embeddings alone.
        tools: folder of the tools.

    Raises:
        ConfigError: the recipe is incomplete, or compares nothing.
        DataError: a file of the corpus is missing.
        CheckpointError: a way was measured under other settings.
    """
    if not recipe.compare or not recipe.new_languages:
        raise ConfigError("compare: the recipe needs new_languages and a table [compare.NAME] for each way to measure")
    check_recipe(recipe)
    run = RunFolder(recipe.work_dir)
    base_model = find_base_model(recipe, run)
    write_json(run.root / "recipe.json", recipe)
    prepared = [*plan_corpus(recipe, run), *plan_base(recipe, run), *plan_vocabulary(recipe, run, base_model)]
    run_commands(prepared, recipe, tools)
    found = {}
    for number, (name, settings) in enumerate(recipe.compare.items(), start=1):
        _logger.info("compare %d/%d: %s", number, len(recipe.compare), name)
        found[name] = measure_method(recipe, name, settings, base_model, tools)
    write_comparison(recipe, found)


def measure_method(recipe: Recipe, name: str, settings: VocabSettings, base_model: Path, tools: Path) -> dict[str, Any]:
    """Return what the fill took and the bits per byte of every validation of the stage.

    Raises:
        SystemExit: a tool failed; its message stands above, its exit code is passed on.
    """
    stage, shared = recipe.train.stages[0], RunFolder(recipe.work_dir)
    run = RunFolder(shared.root / "compare" / name)
    way = replace(recipe, work_dir=run.root, vocab=settings, compare={}, train=replace(recipe.train, stages=(stage,)))
    record, config = run.root / STAGE_FILE, to_plain(replace(way, work_dir=Path()))
    if record.is_file():
        if is_finished(record, config=config):
            _logger.info("%s: measured before", name)
            return dict(read_json(record)["counts"])
        shutil.rmtree(run.root)
    run.root.mkdir(parents=True, exist_ok=True)
    for part in _SHARED:
        if not (run.root / part).is_symlink():
            (run.root / part).symlink_to(Path("..") / ".." / part)
    write_json(run.root / "recipe.json", way)
    resize, convert, train, _ = plan_training(way, run, base_model)
    taken = run.root / "fill.json"
    if not taken.is_file():
        shutil.rmtree(run.resized, ignore_errors=True)
        write_json(taken, asdict(run_commands([resize], way, tools)["resize_vocab"]))
    run_commands([resize, convert, train], way, tools)
    rows = [row for row in read_metrics(run.checkpoints(stage.name) / "metrics.jsonl") if "valid_bits_per_byte" in row]
    plan = read_plan(run.plan(stage.name))
    batches = Batches.of(stage, num_windows=plan.num_windows, global_batch_size=plan.global_batch_size)
    curve = [
        {
            "tokens": batches.count_windows(row["step"]) * plan.seq_length,
            "bits_per_byte": row["valid_bits_per_byte"],
        }
        for row in rows
    ]
    found = {"fill": read_json(taken), "curve": curve}
    write_stage(record, config=config, inputs=[base_model, shared.tokenizer], counts=found)
    for part in _MODELS:
        shutil.rmtree(run.root / part)
    return found


def write_comparison(recipe: Recipe, found: dict[str, dict[str, Any]]) -> None:
    """Write ``compare.json``, ``compare.md`` and ``compare-LANGUAGE.png`` into the run folder, and log the table."""
    root = recipe.work_dir
    write_json(root / "compare.json", found)
    languages = [*recipe.new_languages, *recipe.old_languages]
    table = render_comparison(found, languages)
    with replace_file(root / "compare.md") as partial:
        partial.write_text(table + "\n", encoding="utf-8")
    for language in languages:
        draw_curves(root / f"compare-{language}.png", found, language)
    _logger.info("%s\nwrote %s", table, root / "compare.md")


def render_comparison(figures: dict[str, dict[str, Any]], languages: Iterable[str]) -> str:
    """Return a Markdown table: a row for each way, bits per byte before and after the stage."""
    languages = list(languages)
    last = max(item["curve"][-1]["tokens"] for item in figures.values())
    titles = [f"{language} at {tokens:,}" for language in languages for tokens in (0, last)]
    lines = [_join([*_COLUMNS, *titles]), _join(["---", *["--:"] * (len(_COLUMNS) - 1 + len(titles))])]
    for name, item in figures.items():
        ends = (item["curve"][0]["bits_per_byte"], item["curve"][-1]["bits_per_byte"])
        bits = [f"{end[language]:.4f}" for language in languages for end in ends]
        lines.append(_join([name, f"{item['fill']['seconds']:.1f}", f"{item['fill']['peak_mib']:.0f}", *bits]))
    return "\n".join(lines)


def _join(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def draw_curves(path: Path, figures: dict[str, dict[str, Any]], language: str) -> None:
    """Draw bits per byte of a language over tokens, a curve for each way."""
    title = f"{language}: new rows filled in {len(figures)} ways"
    with draw_plot(path, title=title, x_label="tokens trained on", y_label="bits per byte") as axes:
        for number, (name, item) in enumerate(figures.items()):
            tokens = [point["tokens"] for point in item["curve"]]
            bits = [point["bits_per_byte"][language] for point in item["curve"]]
            # Ten colours, then the same ones dashed.
            axes.plot(tokens, bits, f"C{number % 10}", linestyle="-" if number < 10 else "--", label=name)
