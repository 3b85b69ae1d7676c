"""Settings of the checkpoint stage."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_adapt.config.require import require


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """How a checkpoint is laid out (table ``[checkpoint]``)."""

    vocab_pad_multiple: int = 1024
    "Megatron checkpoints pad the vocabulary to a multiple of this, so that they load at any TP up to 8."
    dtype: Literal["keep", "float32", "bfloat16"] = "keep"
    "Type of the weights in the output; keep takes that of the source."
    verify_logits_parameters: int = 2_000_000_000
    "Largest model whose logits --verify compares too: it holds two fp32 copies; larger ones by their tensors alone."

    def __post_init__(self) -> None:
        require(
            self.vocab_pad_multiple >= 1,
            f"checkpoint.vocab_pad_multiple: {self.vocab_pad_multiple} is below 1; use 1024",
        )


@dataclass(frozen=True, kw_only=True)
class ConvertCheckpoint:
    """Convert a Hugging Face folder to a Megatron checkpoint, or back."""

    source: Path
    "Hugging Face folder, or Megatron checkpoint (its root, or one iter_... folder)."
    to: Literal["megatron", "hf"]
    "Format to write."
    output: Path
    "Folder to write."
    tokenizer: Path | None = None
    "Tokenizer the output must fit and carry; by default the one that travels with the source."
    verify: bool = False
    "Afterwards convert back in memory and compare every tensor, and compare logits on random tokens."
    dry_run: bool = False
    "Check everything, print bytes, files, memory and time, and write nothing but an unnamed file to measure the disk."
    overwrite: bool = False
    "Replace the output folder if it exists."
    settings: CheckpointSettings = field(default_factory=CheckpointSettings)


@dataclass(frozen=True, kw_only=True)
class InspectCheckpoint:
    """Say what is in a checkpoint: model, vocabulary, training position, tensors."""

    folder: Path
    "Hugging Face folder, or Megatron checkpoint (its root, or one iter_... folder)."
    json: Path | None = None
    "Also write the figures to this file."


@dataclass(frozen=True, kw_only=True)
class ReleaseModel:
    """Check a Hugging Face folder, write or compare its checksums, and push it to the Hub."""

    model: Path
    "Hugging Face folder."
    push_to_hub: str = ""
    "USER/NAME of a repository of the Hub to upload the folder to; made, as a private one, if it is missing."
    public: bool = False
    "Make that repository a public one; the model card must have no open fields."

    def __post_init__(self) -> None:
        require(
            not self.push_to_hub or re.fullmatch(r"[\w.-]+/[\w.-]+", self.push_to_hub) is not None,
            f"--push-to-hub: {self.push_to_hub!r} names no repository; write USER/NAME",
        )
        require(bool(self.push_to_hub) or not self.public, "--public: has no effect without --push-to-hub; add it")


@dataclass(frozen=True, kw_only=True)
class StripCheckpoint:
    """Write the weights of a Megatron checkpoint alone, in another type or in smaller files."""

    source: Path
    "Megatron checkpoint (its root, or one iter_... folder)."
    output: Path
    "Folder to write."
    dtype: Literal["keep", "float32", "bfloat16"] = "keep"
    "Type of the weights in the output."
    max_file_mib: int = 1024
    "Begin another file behind so many MiB; many ranks read many files faster."
    overwrite: bool = False
    "Replace the output folder if it exists."

    def __post_init__(self) -> None:
        require(self.max_file_mib >= 1, f"--max-file-mib: {self.max_file_mib} is below 1; use 1024")


@dataclass(frozen=True, kw_only=True)
class AverageCheckpoints:
    """Write the mean of the weights of several Megatron checkpoints of one model."""

    sources: tuple[Path, ...]
    "Megatron checkpoints (roots, or iter_... folders)."
    output: Path
    "Folder to write."
    overwrite: bool = False
    "Replace the output folder if it exists."

    def __post_init__(self) -> None:
        require(len(self.sources) >= 2, f"--sources: {len(self.sources)} checkpoint; name at least two")


@dataclass(frozen=True, kw_only=True)
class ExpandBlocks:
    """Add blocks that change nothing yet (LLaMA Pro), to be trained on the new language."""

    source: Path
    "Megatron checkpoint (its root, or one iter_... folder)."
    output: Path
    "Folder to write."
    blocks: int
    "Blocks to add, evenly spread; a divisor of the number of layers."
    overwrite: bool = False
    "Replace the output folder if it exists."

    def __post_init__(self) -> None:
        require(self.blocks >= 1, f"--blocks: {self.blocks} is below 1; name how many to add")
