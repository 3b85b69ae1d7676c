"""Settings of a base model made from scratch."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_adapt.config.require import require


@dataclass(frozen=True, kw_only=True)
class BaseSettings:
    """A small base model made from scratch, for demos and tests (table ``[base]``)."""

    vocab_size: int = 8192
    "Size of the base tokenizer, learned from the old language."
    tokenizer_kind: Literal["byte_level", "sentencepiece"] = "byte_level"
    "Family of the tokenizer: byte-level BPE (Llama 3) or SentencePiece BPE with byte fallback (Llama 2)."
    num_layers: int = 4
    "Transformer blocks."
    hidden_size: int = 128
    "Width of the model."
    ffn_hidden_size: int = 384
    "Width of the feed-forward part."
    num_attention_heads: int = 4
    "Query heads."
    num_query_groups: int = 2
    "Key-value heads."
    max_position_embeddings: int = 512
    "Longest sequence."
    tied: bool = False
    "Share the input embedding with the output head."
    seed: int = 1
    "Seed of the random weights."

    def __post_init__(self) -> None:
        sizes = "vocab_size num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups"
        for name in (*sizes.split(), "max_position_embeddings"):
            require(getattr(self, name) >= 1, f"base.{name}: {getattr(self, name)} is below 1")


@dataclass(frozen=True, kw_only=True)
class CreateBase:
    """Write a Hugging Face folder with a new tokenizer and random weights."""

    corpus: tuple[Path, ...]
    "Documents to learn the tokenizer from."
    output: Path
    "Folder to write."
    text_key: str = "text"
    "Key of the text in a JSON document."
    overwrite: bool = False
    "Replace the output folder if it exists."
    settings: BaseSettings = field(default_factory=BaseSettings)
