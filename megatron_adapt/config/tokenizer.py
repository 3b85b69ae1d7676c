"""Settings of the tokenizer stage."""

import re
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Literal

from megatron_adapt.config.require import require

# The methods that read a setting; all read those that are not here.
_READ_BY = {
    "segmenter": ("continue", "merge", "replace", "optimize"),
    "scores": ("merge",),
    "model": ("replace",),
    "old_share": ("replace", "optimize"),
    "kept_share": ("optimize",),
    "donor": ("transplant",),
    "adopt": ("transplant",),
}
_NOT_READ_TO_ADOPT = ("size", "size_multiple", "scripts", "min_frequency")


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """How the vocabulary changes (table ``[tokenizer]``)."""

    method: Literal["continue", "merge", "replace", "optimize", "transplant"] = "continue"
    """continue: learn new merges on top of the frozen base merges. merge: learn a tokenizer of the new language alone
    and append the pieces the base lacks. transplant: append pieces of --donor. These three never move an old id.
    replace: learn a new vocabulary. optimize: drop the base's least used pieces, then continue."""
    size: str = "extend100"
    """How many pieces to add (replace: size of the new vocabulary): a number, or extendNN for NN per cent of the base
    vocabulary."""
    size_multiple: int = 1
    "Add more pieces until the whole vocabulary is a multiple of this."
    scripts: tuple[str, ...] = ()
    "Unicode scripts a new piece may use, for example Arabic or Han Hiragana Katakana; empty allows all."
    min_frequency: int = 2
    "A pair seen less often in the corpus is never merged; a donor's piece seen less often is not taken."
    segmenter: str = ""
    "Cut the training text into words first, for languages without spaces: fugashi (MeCab), or MODULE:FUNCTION."
    scores: Literal["below", "zero", "learned"] = "below"
    """SentencePiece scores of merged pieces. below: falling below the lowest old one, the only choice that all readers
    agree on; zero (Chinese-LLaMA) and learned (Swallow) reproduce the papers and are not safe."""
    model: Literal["bpe", "unigram"] = "bpe"
    "Algorithm of a replaced SentencePiece vocabulary."
    old_share: float = 0.5
    "Weight of the old language, by bytes of text, where replace and optimize count both languages."
    kept_share: float = 0.5
    "Share of the base's learned pieces that optimize keeps."
    donor: Path | None = None
    "Folder of the tokenizer whose pieces transplant takes."
    adopt: bool = False
    "transplant the donor whole, ids and all, instead of appending its pieces."
    max_drift: float = 1.0
    "Refuse a tokenizer that changes the ids of a larger share of the documents in --old-corpus."

    def __post_init__(self) -> None:
        known = re.fullmatch(r"[1-9]\d*|extend[1-9]\d*", self.size)
        require(known is not None, f"tokenizer.size: {self.size!r} is no size; use a number or extend100")
        require(
            self.size_multiple >= 1, f"tokenizer.size_multiple: {self.size_multiple} is below 1; use 1 for any size"
        )
        require(self.min_frequency >= 1, f"tokenizer.min_frequency: {self.min_frequency} is below 1; use 2")
        for name in ("old_share", "kept_share", "max_drift"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"tokenizer.{name}: {value} is not between 0 and 1")
        for name in self.list_changed():
            methods = _READ_BY.get(name, (self.method,))
            require(
                self.method in methods,
                f"tokenizer.{name}: {getattr(self, name)!r} has no effect with method {self.method}; leave it out, or "
                f"use {' or '.join(methods)}",
            )
            require(
                not self.adopt or name not in _NOT_READ_TO_ADOPT,
                f"tokenizer.{name}: {getattr(self, name)!r} has no effect with adopt, which takes the donor as it is; "
                "leave it out",
            )
        require(
            self.donor is not None or self.method != "transplant",
            "tokenizer.donor: missing; name the folder of the tokenizer whose pieces transplant takes",
        )

    def list_changed(self) -> list[str]:
        """List the settings that are not at their defaults."""
        return [item.name for item in fields(self) if getattr(self, item.name) != item.default]


@dataclass(frozen=True, kw_only=True)
class BuildTokenizer:
    """Make the tokenizer of a new language out of a base tokenizer."""

    base: Path
    "Hugging Face folder of the base tokenizer (tokenizer.json, or a tokenizer.model)."
    corpus: tuple[Path, ...]
    "Documents in the new language to learn from."
    output: Path
    "Folder to write the tokenizer into."
    old_corpus: tuple[Path, ...] = ()
    "Documents in the old language: drift is measured on them, replace and optimize count them too."
    text_key: str = "text"
    "Key of the text in a JSON document."
    overwrite: bool = False
    "Replace the output folder if it exists."
    settings: TokenizerSettings = field(default_factory=TokenizerSettings)


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """Extensions of one base by several sizes, to choose from."""

    sweep: tuple[int, ...] = ()
    "Extend --base by these per cents of its vocabulary, for example 25 50 75 100, and measure each."
    base: Path | None = None
    "Hugging Face folder of the tokenizer that --sweep extends."
    corpus: tuple[Path, ...] = ()
    "Documents in the new language that --sweep learns from."
    scripts: tuple[str, ...] = ()
    "Unicode scripts a new piece may use; empty allows all."
    min_frequency: int = 2
    "A pair seen less often in the corpus is never merged."
    segmenter: str = ""
    "Cut the text that --sweep learns from into words first: fugashi (MeCab), or MODULE:FUNCTION."
    model_shape: Path | None = None
    "Hugging Face folder of a model; its config.json says what new rows cost."

    def __post_init__(self) -> None:
        for item in fields(self):
            is_given = getattr(self, item.name) != item.default
            flag = f"--{item.name.replace('_', '-')}"
            require(bool(self.sweep) or not is_given, f"{flag}: has no effect without --sweep; leave it out")
        if self.sweep:
            named = " ".join(map(str, self.sweep))
            require(
                self.sweep[0] > 0 and all(small < large for small, large in pairwise(self.sweep)),
                f"--sweep: {named} are no rising per cents; use for example 25 50 75 100",
            )
            require(self.base is not None, "--sweep: extends --base, and there is none; name its folder")
            require(bool(self.corpus), "--sweep: learns from --corpus, and there is none; name its files")


@dataclass(frozen=True, kw_only=True)
class MeasureTokenizer:
    """Compare tokenizers on corpora, or extensions of one by several sizes (--sweep): fertility, parity, cost."""

    tokenizers: tuple[str, ...] = ()
    "NAME=DIR of every tokenizer."
    corpora: tuple[str, ...]
    "LANG=FILE of every corpus; give a language several times for several files."
    json: Path | None = None
    "Also write the figures to this file."
    plot: Path | None = None
    "Also draw to this PNG: bytes per token of every tokenizer, with --sweep tokens per byte by size."
    parity_reference: str = ""
    "Language to compare the others with on documents of the same id: tokens for the same content."
    id_key: str = "id"
    "Key of a document's id, for --parity-reference."
    text_key: str = "text"
    "Key of the text in a JSON document."
    max_bytes: int = 0
    "Read at most this many bytes of text per language; 0 reads all."
    settings: SweepSettings = field(default_factory=SweepSettings)

    def __post_init__(self) -> None:
        require(
            bool(self.tokenizers or self.settings.sweep),
            "--tokenizers: names none; give NAME=DIR of each, or --sweep to make extensions of --base",
        )
