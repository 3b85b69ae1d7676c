"""Settings of the vocab stage."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class VocabSettings:
    """How the rows of new tokens are filled (table ``[vocab]``)."""

    method: Literal["subtoken_mean", "mean"] = "subtoken_mean"
    "subtoken_mean: mean of the rows of the old pieces that spell the token; mean: mean of all old rows."


@dataclass(frozen=True, kw_only=True)
class ResizeVocab:
    """Give a model the rows of an extended tokenizer; old rows stay bit-identical."""

    model: Path
    "Hugging Face folder of the base model, with its tokenizer."
    tokenizer: Path
    "Folder of the extended tokenizer."
    output: Path
    "Hugging Face folder to write."
    overwrite: bool = False
    "Replace the output folder if it exists."
    settings: VocabSettings = field(default_factory=VocabSettings)
