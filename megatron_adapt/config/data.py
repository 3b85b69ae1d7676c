"""Settings of the data stage."""

from dataclasses import dataclass, field
from pathlib import Path

from megatron_adapt.config.require import require


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """How documents become tokens (table ``[data]``)."""

    workers: int = 1
    "Processes that tokenise."
    append_eod: bool = True
    "End every document with the tokenizer's end-of-document token."

    def __post_init__(self) -> None:
        require(self.workers >= 1, f"data.workers: {self.workers} is below 1; use the number of cores")


@dataclass(frozen=True, kw_only=True)
class PreprocessData:
    """Tokenise documents into PREFIX.bin and PREFIX.idx, readable by megatron-core."""

    input: tuple[Path, ...]
    "Files to read, in this order."
    tokenizer: Path
    "Folder of the tokenizer."
    output_prefix: Path
    "Path of the output without .bin and .idx."
    json_key: str = "text"
    "Key of the text in a JSON document."
    overwrite: bool = False
    "Replace the output files if they exist."
    settings: DataSettings = field(default_factory=lambda: DataSettings(append_eod=False))
