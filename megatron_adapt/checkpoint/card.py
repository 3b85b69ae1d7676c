"""The model card (``README.md``) of a Hugging Face folder: what is known of a model, and what only its publisher knows.

Guarantees: nothing stands in a card that was not measured or recorded; what the tools cannot know (licence, data, use)
is named and left open with ``OPEN``, which a public release refuses (``release``). The file is made to be edited: no
checksum covers it.

Format: Markdown under YAML that the Hub reads (https://huggingface.co/docs/hub/model-cards).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import megatron_adapt
from megatron_adapt.files import replace_file
from megatron_adapt.shape import LlamaShape

CARD_FILE = "README.md"
OPEN = "*to be filled in*"
"Stands where only the publisher knows what belongs there."
_LANGUAGE_CODE = re.compile(r"[a-z]{2,3}")
_ALWAYS_OPEN = ("licence", "training data: sources, licences, dates", "intended use and limits", "contact")
_OPEN_WITHOUT_RUN = ("base model", "languages, and tokens of each", "recipe", "bits per byte before and after")


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What a run knows of the model it made."""

    base_model: str
    "Name of the model it was made from."
    languages_old: tuple[str, ...]
    "Languages that model knew."
    languages_new: tuple[str, ...]
    "Languages it learned."
    report: str
    "Scores before and after, and the recipe, as Markdown with headings of the second level."


def write_card(folder: Path, *, name: str, shape: LlamaShape, step: int, facts: RunFacts | None = None) -> None:
    """Write the card; the file appears whole.

    Args:
        folder: Hugging Face folder.
        name: what the card calls the model.
        shape: the model.
        step: steps of its last training stage; 0 where it was only converted.
        facts: what is known of the run that made it.
    """
    with replace_file(folder / CARD_FILE) as partial:
        partial.write_text(render_card(name=name, shape=shape, step=step, facts=facts), encoding="utf-8")


def render_card(*, name: str, shape: LlamaShape, step: int, facts: RunFacts | None = None) -> str:
    """Return the card as Markdown."""
    languages = [*facts.languages_old, *facts.languages_new] if facts else []
    steps = f" after {step:,} steps of its last training stage" if step else ""
    origin = ""
    if facts:
        old, new = ", ".join(facts.languages_old), ", ".join(facts.languages_new)
        origin = f" It was adapted from {facts.base_model} ({old}) to {new}."
    sections = [
        _render_metadata([language for language in languages if _LANGUAGE_CODE.fullmatch(language)]),
        f"# {name}",
        f"A Llama-family language model of {shape.num_parameters:,} parameters, {shape.vocab_size:,} tokens and "
        f"{shape.max_position_embeddings:,} positions.{origin} Exported by megatron-adapt {megatron_adapt.__version__}"
        f"{steps}.",
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n'
        "```",
        "`sha256sum -c SHA256SUMS` checks the files.",
        *([facts.report.strip()] if facts else []),
        "## From the publisher",
        "The licences of the base model and of the training data decide what may be done with this model.",
        _render_open([*_ALWAYS_OPEN, *(() if facts else _OPEN_WITHOUT_RUN)]),
    ]
    return "\n\n".join(sections) + "\n"


def _render_metadata(languages: Sequence[str]) -> str:
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if languages:
        lines += ["language:", *(f'- "{language}"' for language in languages)]  # "no" without quotes is false
    return "\n".join([*lines, "---"])


def _render_open(fields: Sequence[str]) -> str:
    return "\n".join(["| field | value |", "| --- | --- |", *(f"| {field} | {OPEN} |" for field in fields)])
