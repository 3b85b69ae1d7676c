"""Settings of Learned Embedding Propagation."""

from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Literal

from megatron_adapt.config.require import require


@dataclass(frozen=True, kw_only=True)
class PropagateSettings:
    """How the vocabulary that a base model learned goes to its instruct model."""

    method: Literal["swap", "overlap", "conversion"] = "conversion"
    """What takes the adapted rows to the instruct model. swap: nothing, they are copied. overlap: the linear map of the
    base's rows onto the instruct model's, fitted on the tokens that both tokenizers have. conversion: the same, fitted
    on all new tokens, each the mean of the old pieces that spell it."""
    body_delta: float = 0.0
    """How much of what training changed in the body (adapted minus base) is added to the instruct model's: 0 leaves its
    body as it is, byte by byte; 1 adds all."""

    def __post_init__(self) -> None:
        require(
            isfinite(self.body_delta) and abs(self.body_delta) <= 2,
            f"propagate.body_delta: {self.body_delta} is not between -2 and 2; 0.3 to 1 are usual",
        )


@dataclass(frozen=True, kw_only=True)
class PropagateEmbeddings:
    """Give an instruct model the vocabulary that its base model learned, without training (LEP)."""

    base: Path
    "Hugging Face folder of the base model as it was, with its tokenizer."
    adapted: Path
    "Hugging Face folder of the base model after training with the new tokenizer, which it holds."
    instruct: Path
    "Hugging Face folder of the instruct model made from the base, with the base's tokenizer plus tokens of its own."
    output: Path
    "Folder to write: the instruct model with the new vocabulary."
    dry_run: bool = False
    "Check everything, print bytes, files, memory and time, and write nothing but an unnamed file to measure the disk."
    overwrite: bool = False
    "Replace the output folder if it exists."
    settings: PropagateSettings = field(default_factory=PropagateSettings)
