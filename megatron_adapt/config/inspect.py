"""Settings of ``tools/inspect_data.py``, a class per command."""

from dataclasses import dataclass
from pathlib import Path

from megatron_adapt.config.require import require


@dataclass(frozen=True, kw_only=True)
class ShowTokens:
    """Decode a document or a window of tokenised data."""

    prefix: Path
    "Path of the data without .bin and .idx."
    tokenizer: Path
    "Folder of the tokenizer that made it."
    document: int | None = None
    "Number of the document, from 0."
    window: int | None = None
    "Number of the window in stored order, from 0."
    seq_length: int = 512
    "Tokens to predict in a window."
    pieces: bool = False
    "Print one token a line: place, id, piece."

    def __post_init__(self) -> None:
        one = (self.document is None) != (self.window is None)
        require(one, "--document, --window: give one of the two")
        require(self.seq_length >= 1, f"--seq-length: {self.seq_length} is below 1")


@dataclass(frozen=True, kw_only=True)
class DescribeTokens:
    """Count documents, tokens, lengths and the use of the vocabulary."""

    prefix: tuple[Path, ...]
    "Paths of the data without .bin and .idx."
    json: Path | None = None
    "Also write the figures to this file."


@dataclass(frozen=True, kw_only=True)
class CheckTokens:
    """Look for what is wrong with tokenised data; ends with exit code 2 if anything is."""

    prefix: tuple[Path, ...]
    "Paths of the data without .bin and .idx."
    tokenizer: Path | None = None
    "Folder of the tokenizer the data should have been made with."


@dataclass(frozen=True, kw_only=True)
class MergeTokens:
    """Join tokenised data of one tokenizer, in the order given."""

    prefix: tuple[Path, ...]
    "Paths of the data without .bin and .idx."
    output_prefix: Path
    "Path of the output without .bin and .idx."
    overwrite: bool = False
    "Replace the output files if they exist."


@dataclass(frozen=True, kw_only=True)
class TraceStep:
    """Say which documents a training step was made of."""

    recipe: Path
    "Recipe of the run; recipe.json in its work_dir is the resolved one."
    stage: str
    "Name of the training stage."
    step: int
    "Number of the step, from 1, as in metrics.jsonl."
    tokenizer: Path | None = None
    "Folder of the tokenizer, to show how every piece of text begins."
    json: Path | None = None
    "Also write the windows to this file."
