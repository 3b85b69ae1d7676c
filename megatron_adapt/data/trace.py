"""Answer what a training step was made of: sources, windows, documents.

Reads: a recipe, the plan its stage was trained on (or would be), the token files. Writes: the terminal, and JSON when
asked. Guarantee: what is printed is found by the code that training reads its windows with.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from megatron_adapt.config import TraceStep
from megatron_adapt.data.batches import Batches
from megatron_adapt.data.dataset import BlendedWindows
from megatron_adapt.data.inspect import check_tokenizer
from megatron_adapt.data.plan import BlendPlan, read_plan
from megatron_adapt.data.sources import Source
from megatron_adapt.data.stage_plans import plan_stage
from megatron_adapt.errors import ConfigError
from megatron_adapt.files import write_json
from megatron_adapt.recipe import Recipe, read_recipe
from megatron_adapt.run_folder import StagePlace, find_stage
from megatron_adapt.tokenizer.pieces import LoadedTokenizer, read_tokenizer

_SHOWN = 60  # characters of a document


@dataclass(frozen=True, kw_only=True)
class TracedDocument:
    """A piece of a document in a window."""

    document: int
    "Number of the document in its source, from 0."
    first: int
    "Place of the piece's first token in the document."
    tokens: int
    text: str
    "Where it begins, if a tokenizer was named."


@dataclass(frozen=True, kw_only=True)
class TracedWindow:
    """A window of a step."""

    place: int
    "Number of the window in the stage, from 0."
    source: str
    epoch: int
    "How often the source was read through before."
    window: int
    "Number of the window in the epoch's cut of its source."
    start: int
    "First token in the source."
    documents: list[TracedDocument]


def trace_step(config: TraceStep) -> list[TracedWindow]:
    """Print the windows of one step, with the documents in them.

    Raises:
        ConfigError: the recipe has no such stage, the stage no such step, or megatron-core ordered it.
        DataError: token files are missing, damaged or of another tokenizer.
    """
    recipe = read_recipe(config.recipe)
    place = find_stage(recipe, config.stage)
    if recipe.train.blend_engine != "adapt":
        raise ConfigError("trace: the recipe has train.blend_engine = megatron, whose order is not known here")
    plan = _find_plan(recipe, place)
    batches = Batches.of(place.settings, num_windows=plan.num_windows, global_batch_size=plan.global_batch_size)
    first_step, last_step = batches.find_step(plan.begin), batches.num_steps
    if not first_step <= config.step <= last_step:
        raise ConfigError(f"--step: {config.step} is not from {first_step} to {last_step}, the steps of this plan")
    blend = BlendedWindows(plan, {source: place.run.tokens(source, "train") for source in plan.sources})
    tokenizer = None if config.tokenizer is None else read_tokenizer(config.tokenizer)
    traced = trace_windows(blend, *batches.find(config.step), tokenizer)
    _show(config.step, traced)
    if config.json:
        write_json(config.json, [asdict(window) for window in traced])
    return traced


def trace_windows(
    blend: BlendedWindows, first: int, count: int, tokenizer: LoadedTokenizer | None = None
) -> list[TracedWindow]:
    """Return ``count`` windows of a stage from window ``first`` on, with the documents in them.

    Raises:
        DataError: the token files are of another tokenizer.
    """
    plan = blend.plan
    sources_N, windows = blend.locate(first, count)
    traced = []
    for at in range(count):
        name = plan.sources[sources_N[at]]
        source = blend.sources[name]
        if tokenizer is not None:
            check_tokenizer(source.prefix, source.record, tokenizer)
        documents = []
        for document, begin, ids in _list_pieces(source, int(windows.starts_N[at]), plan.seq_length + 1):
            text = "" if tokenizer is None else tokenizer.tokenizer.decode(ids.tolist(), skip_special_tokens=False)
            documents.append(TracedDocument(document=document, first=begin, tokens=len(ids), text=text[:_SHOWN]))
        traced.append(
            TracedWindow(
                place=first + at,
                source=name,
                epoch=int(windows.epochs_N[at]),
                window=int(windows.windows_N[at]),
                start=int(windows.starts_N[at]),
                documents=documents,
            )
        )
    return traced


def _find_plan(recipe: Recipe, place: StagePlace) -> BlendPlan:
    """Return the plan that the stage was trained on, or the one it would be."""
    path = place.run.plan(place.settings.name)
    return read_plan(path) if path.is_file() else plan_stage(recipe, place.settings.name)


def _list_pieces(source: Source, start: int, count: int) -> Iterator[tuple[int, int, np.ndarray[Any, Any]]]:
    """Yield document, place in it and ids of every piece of a window; behind the last document comes the first."""
    starts_D1 = source.starts_D1
    while count:
        start %= source.record.tokens
        document = int(np.searchsorted(starts_D1, start, side="right")) - 1
        end = min(int(starts_D1[document + 1]), start + count)
        yield document, start - int(starts_D1[document]), np.asarray(source.file.tokens_N[start:end])
        count -= end - start
        start = end


def _show(step: int, windows: list[TracedWindow]) -> None:
    table = Table(title=f"step {step}")
    for heading in ("place", "source", "epoch", "window", "first token", "document", "from", "tokens", "text"):
        table.add_column(heading, justify="left" if heading in ("source", "text") else "right", overflow="fold")
    for window in windows:
        cells = [f"{window.place:,}", window.source, *(f"{n:,}" for n in (window.epoch, window.window, window.start))]
        for document in window.documents:
            piece = [f"{n:,}" for n in (document.document, document.first, document.tokens)]
            table.add_row(*cells, *piece, repr(document.text) if document.text else "")
            cells = [""] * len(cells)
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)
