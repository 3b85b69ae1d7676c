"""Settings of the corpus stage."""

from dataclasses import dataclass, field
from pathlib import Path

from megatron_adapt.config.require import require


@dataclass(frozen=True, kw_only=True)
class CorpusSettings:
    """Raw documents to a training and a validation part (table ``[prepare]``)."""

    text_key: str = "text"
    "Key of the text in a JSON document."
    id_key: str = "id"
    "Key of the document's name; it decides training or validation. Without it the text itself does."
    valid_share: float = 0.02
    "Share of documents held out for validation, chosen by a hash, so that appending files moves none."
    max_bytes: int = 0
    "Keep at most this many bytes of training text per language, in file order; 0 keeps all."

    def __post_init__(self) -> None:
        require(0 < self.valid_share < 1, f"prepare.valid_share: {self.valid_share} is not between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class PrepareCorpus:
    """Split raw text into training and validation documents, without exact duplicates."""

    input: tuple[Path, ...]
    "Files to read, in this order: .jsonl, .jsonl.gz or .jsonl.zst (recognised by content)."
    output: Path
    "Folder to write train-00000.jsonl.zst and valid-00000.jsonl.zst into."
    overwrite: bool = False
    "Replace the output folder if it exists."
    settings: CorpusSettings = field(default_factory=CorpusSettings)
