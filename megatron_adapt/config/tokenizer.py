"""Settings of the tokenizer stage."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_adapt.config.require import require


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """How the vocabulary grows (table ``[tokenizer]``)."""

    method: Literal["continue"] = "continue"
    "continue: learn new merges on top of the frozen base merges; old ids never move."
    size: str = "extend100"
    "How many pieces to add: a number, or extendNN for NN per cent of the base vocabulary."
    scripts: tuple[str, ...] = ()
    "Unicode scripts a new piece may use, for example Arabic or Han Hiragana Katakana; empty allows all."
    min_frequency: int = 2
    "A pair seen less often in the corpus is never merged."

    def __post_init__(self) -> None:
        known = re.fullmatch(r"[1-9]\d*|extend[1-9]\d*", self.size)
        require(known is not None, f"tokenizer.size: {self.size!r} is no size; use a number or extend100")
        require(self.min_frequency >= 1, f"tokenizer.min_frequency: {self.min_frequency} is below 1; use 2")


@dataclass(frozen=True, kw_only=True)
class BuildTokenizer:
    """Extend a base tokenizer by pieces learned from a corpus."""

    base: Path
    "Hugging Face folder of the base tokenizer (tokenizer.json, or a tokenizer.model)."
    corpus: tuple[Path, ...]
    "Documents in the new language to learn from."
    output: Path
    "Folder to write the extended tokenizer into."
    text_key: str = "text"
    "Key of the text in a JSON document."
    overwrite: bool = False
    "Replace the output folder if it exists."
    settings: TokenizerSettings = field(default_factory=TokenizerSettings)


@dataclass(frozen=True, kw_only=True)
class MeasureTokenizer:
    """Compare tokenizers on corpora: fertility, bytes per token, use of the vocabulary."""

    tokenizers: tuple[str, ...]
    "NAME=DIR of every tokenizer."
    corpora: tuple[str, ...]
    "LANG=FILE of every corpus; give a language several times for several files."
    json: Path | None = None
    "Also write the figures to this file."
    text_key: str = "text"
    "Key of the text in a JSON document."
    max_bytes: int = 0
    "Read at most this many bytes of text per language; 0 reads all."
