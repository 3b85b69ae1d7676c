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
    "Hugging Face folder of the base model, or Megatron checkpoint, with its tokenizer."
    tokenizer: Path
    "Folder of the tokenizer that tools/build_tokenizer.py made from the model's."
    output: Path
    "Folder to write, of the same kind."
    vocab_pad_multiple: int = 1024
    "A Megatron checkpoint pads the vocabulary to a multiple of this, so that it loads at any TP up to 8."
    dry_run: bool = False
    "Check everything, print bytes, files, memory and time, and write nothing but an unnamed file to measure the disk."
    overwrite: bool = False
    "Replace the output folder if it exists."
    settings: VocabSettings = field(default_factory=VocabSettings)
