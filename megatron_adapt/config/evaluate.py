"""Settings of the evaluate stage."""

from dataclasses import dataclass, field
from pathlib import Path

from megatron_adapt.config.require import require


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """How exported models are scored (table ``[evaluate]``)."""

    seq_length: int = 512
    "Tokens of a document scored at once; a longer document is cut into such windows."
    batch_size: int = 8
    "Windows in one forward pass."
    max_bytes: int = 200_000
    "Text scored per language, in bytes, an equal part of it from each file; 0 scores all."

    def __post_init__(self) -> None:
        for name in ("seq_length", "batch_size"):
            require(getattr(self, name) >= 1, f"evaluate.{name}: {getattr(self, name)} is below 1")


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Score Hugging Face folders on text in bits per byte, per language."""

    models: tuple[str, ...]
    "NAME=DIR of every model."
    corpora: tuple[str, ...]
    "LANG=FILE of every corpus; give a language several times for several files."
    json: Path | None = None
    "Also write the figures to this file."
    text_key: str = "text"
    "Key of the text in a JSON document."
    settings: EvaluateSettings = field(default_factory=EvaluateSettings)
