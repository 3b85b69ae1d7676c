"""Every setting of every stage, in pipeline order. The string under a field is its ``--help``.

``...Settings`` is a table of a recipe: what a user decides. A class named like a tool adds the paths that
the tool reads and writes; on the command line both are flat flags. ``Recipe`` is a whole TOML file, read
by ``tools/adapt.py`` and ``tools/pretrain.py``.
Single values are checked here; checks against data live where the data is read.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_adapt.errors import ConfigError


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


# ---------------------------------------------------------------- corpus


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
        _require(0 < self.valid_share < 1, f"prepare.valid_share: {self.valid_share} is not between 0 and 1")


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


# ---------------------------------------------------------------- base (optional: a model from scratch)


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
            _require(getattr(self, name) >= 1, f"base.{name}: {getattr(self, name)} is below 1")


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


# ---------------------------------------------------------------- tokenizer


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
        _require(known is not None, f"tokenizer.size: {self.size!r} is no size; use a number or extend100")
        _require(self.min_frequency >= 1, f"tokenizer.min_frequency: {self.min_frequency} is below 1; use 2")


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


# ---------------------------------------------------------------- vocab


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


# ---------------------------------------------------------------- checkpoint


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
        _require(
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
    overwrite: bool = False
    "Replace the output folder if it exists."
    settings: CheckpointSettings = field(default_factory=CheckpointSettings)


# ---------------------------------------------------------------- data


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """How documents become tokens (table ``[data]``)."""

    workers: int = 1
    "Processes that tokenise."
    append_eod: bool = True
    "End every document with the tokenizer's end-of-document token."

    def __post_init__(self) -> None:
        _require(self.workers >= 1, f"data.workers: {self.workers} is below 1; use the number of cores")


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


# ---------------------------------------------------------------- train


@dataclass(frozen=True, kw_only=True)
class StageSettings:
    """One stage of training (``[[train.stages]]``); each starts from the weights of the one before."""

    name: str
    "Name of the stage; its checkpoints go to checkpoints/NAME."
    tokens: int
    "Tokens to train on; rounded up to whole steps."
    blend: dict[str, float]
    "Share of tokens per language; the shares are divided by their sum."
    trainable: Literal["embeddings", "all"] = "all"
    "embeddings: input embedding and output head only; all: every parameter."
    lr: float = 1e-4
    "Peak learning rate."
    min_lr: float = 0.0
    "Learning rate of the last step, where the cosine ends."
    lr_warmup_fraction: float = 0.01
    "Share of the stage's steps over which the learning rate rises linearly."

    def __post_init__(self) -> None:
        where = f"train.stages {self.name}"
        _require(self.tokens > 0, f"{where}: tokens {self.tokens} is not positive")
        _require(bool(self.blend), f"{where}: blend is empty; name at least one language and its share")
        _require(re.fullmatch(r"\w[\w.-]*", self.name) is not None, f"{where}: the name must be a plain word")
        for language, share in self.blend.items():
            _require(share > 0, f"{where}: blend.{language} {share} is not positive; leave the language out")
        _require(
            self.lr > self.min_lr >= 0,
            f"{where}: lr {self.lr} and min_lr {self.min_lr} must fall and be >= 0",
        )
        _require(
            0 <= self.lr_warmup_fraction < 1,
            f"{where}: lr_warmup_fraction {self.lr_warmup_fraction} is not between 0 and 1",
        )


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The training runs (table ``[train]``)."""

    stages: tuple[StageSettings, ...] = ()
    "The stages, in order."
    nproc_per_node: int = 1
    "Ranks that tools/adapt.py starts with torchrun; a launch of tools/pretrain.py decides for itself."
    tensor_model_parallel_size: int = 1
    "Ranks that share every matrix."
    pipeline_model_parallel_size: int = 1
    "Ranks that share the layers."
    sequence_parallel: bool = False
    "Split norms and residuals over the tensor-parallel ranks along the sequence."
    use_distributed_optimizer: bool = True
    "Split the optimizer state over the data-parallel ranks."
    seq_length: int = 512
    "Tokens in a window."
    micro_batch_size: int = 4
    "Windows in one forward pass of a rank."
    global_batch_size: int = 16
    "Windows in one optimizer step of the whole job."
    bf16: bool = True
    "Train in bfloat16 with fp32 master weights; otherwise in fp32."
    adam_beta1: float = 0.9
    "Decay of Adam's first moment."
    adam_beta2: float = 0.95
    "Decay of Adam's second moment."
    adam_eps: float = 1e-8
    "Epsilon of Adam."
    weight_decay: float = 0.1
    "Weight decay of matrices; norms have none."
    clip_grad: float = 1.0
    "Largest norm of the gradient."
    seed: int = 1234
    "Seed of the data order."
    log_interval: int = 10
    "Steps between two lines of metrics."
    save_interval: int = 500
    "Steps between two checkpoints; the last step is always saved."
    eval_interval: int = 100
    "Steps between two validations; the first and last step are always validated."
    eval_windows: int = 64
    "Validation windows per language, always the same ones."
    stop_after_steps: int = 0
    "Save and stop cleanly after this many steps of this launch; 0 runs to the end of the stage."

    def __post_init__(self) -> None:
        positive = (
            "nproc_per_node tensor_model_parallel_size pipeline_model_parallel_size seq_length micro_batch_size "
            "global_batch_size log_interval save_interval eval_interval eval_windows"
        )
        for name in positive.split():
            _require(getattr(self, name) >= 1, f"train.{name}: {getattr(self, name)} is below 1")
        _require(self.stop_after_steps >= 0, f"train.stop_after_steps: {self.stop_after_steps} is below 0")
        names = [stage.name for stage in self.stages]
        _require(len(set(names)) == len(names), f"train.stages: a name occurs twice in {names}; rename one")


# ---------------------------------------------------------------- evaluate


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """How exported models are scored (table ``[evaluate]``)."""

    seq_length: int = 512
    "Tokens of a document scored at once; a longer document is cut into such windows."
    batch_size: int = 8
    "Windows in one forward pass."
    max_bytes: int = 200_000
    "Text scored per language, in bytes; 0 scores all."

    def __post_init__(self) -> None:
        for name in ("seq_length", "batch_size"):
            _require(getattr(self, name) >= 1, f"evaluate.{name}: {getattr(self, name)} is below 1")


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
