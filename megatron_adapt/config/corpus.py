"""Settings of the corpus stage."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_adapt.config.require import require

PlainText = Literal["none", "file", "paragraphs"]


@dataclass(frozen=True, kw_only=True)
class CorpusSettings:
    """Raw documents to a training and a validation part (table ``[prepare]``)."""

    text_key: str = "text"
    "Key of the text in a JSON document, or name of the column; of plain text it is text."
    plain_text: PlainText = "none"
    """What a document is in files of plain text: the whole file, or paragraphs, which blank lines separate. none: there
    are no such files."""
    id_key: str = "id"
    "Key of the document's name; it decides training or validation. Without it the text itself does."
    valid_share: float = 0.02
    "Share of documents held out for validation, chosen by a hash, so that appending files moves none."
    max_bytes: int = 0
    "Keep at most this many bytes of training text per source, in file order; 0 keeps all."
    normal_form: Literal["none", "NFC", "NFKC"] = "none"
    "Unicode normal form the text is brought into."
    min_characters: int = 0
    "Drop shorter documents."
    max_characters: int = 0
    "Drop longer documents; 0 keeps all."
    max_repeated_lines: float = 1.0
    "Drop a document when a larger share of its characters stands in lines that occurred before in it; 0.2 is usual."
    max_repeated_runs: float = 1.0
    "Drop a document when a larger share of its words lies in runs of ten that occurred before in it; 0.1 is usual."
    min_script_share: float = 0.0
    "Drop a document when a smaller share of its letters is of the language's scripts."
    sentences: str = ""
    """Also cut every document into sentences (key "sentences"): learned, by Punkt parameters learned from the input; or
    a language of an installed nltk_data, such as english."""
    near_duplicates: float = 0.0
    "Drop a document that resembles an earlier one this much (0.8 is usual); 0 drops only exact duplicates."

    def __post_init__(self) -> None:
        require(0 < self.valid_share < 1, f"prepare.valid_share: {self.valid_share} is not between 0 and 1")
        for name in ("max_repeated_lines", "max_repeated_runs", "min_script_share", "near_duplicates"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"prepare.{name}: {value} is not between 0 and 1")
        for name in ("min_characters", "max_characters", "max_bytes"):
            require(getattr(self, name) >= 0, f"prepare.{name}: {getattr(self, name)} is below 0")


@dataclass(frozen=True, kw_only=True)
class PrepareCorpus:
    """Split raw text into training and validation documents, without exact duplicates."""

    input: tuple[Path, ...]
    """Files, folders or patterns ('raw/*.jsonl.gz'), in this order: JSON lines or parquet, or plain text with
    --plain-text; also compressed by gzip, zstd or xz. Recognised by content; in a folder also by name."""
    output: Path
    "Folder to write train-00000.jsonl.zst and valid-00000.jsonl.zst into."
    scripts: tuple[str, ...] = ()
    "Unicode scripts of the language, for prepare.min_script_share."
    overwrite: bool = False
    "Replace the output folder if it exists."
    settings: CorpusSettings = field(default_factory=CorpusSettings)


@dataclass(frozen=True, kw_only=True)
class ParallelSettings:
    """Pairs of sentences to documents (table ``[parallel]``)."""

    languages: tuple[str, str]
    "Keys of the two texts in a JSON document; each pair is written in both directions."
    format: Literal["plain", "instruction"] = "plain"
    "plain: one text, then the other, the loss on both. instruction: a request to translate, the loss on the answer."
    separator: str = "\n"
    "Stands between the two texts."
    instructions: dict[str, str] = field(default_factory=dict)
    """The request per direction, for example en-ja = "Please translate the following English text into Japanese."."""
    id_key: str = "id"
    "Key of the pair's name; it decides training or validation."
    group_separator: str = ""
    """What separates the name of a page from the number of its sentence ("#" in "page#3"): a page is held out whole,
    together with the documents of that name. Empty: every pair for itself."""
    valid_share: float = 0.02
    "Share of pairs held out for validation; the same as prepare.valid_share keeps pages together."

    def __post_init__(self) -> None:
        require(0 < self.valid_share < 1, f"parallel.valid_share: {self.valid_share} is not between 0 and 1")
        first, second = self.languages
        require(first != second, f"parallel.languages: {first!r} twice; name two languages")
        directions = {f"{first}-{second}", f"{second}-{first}"} if self.format == "instruction" else set()
        require(
            set(self.instructions) == directions,
            f"parallel.instructions: given for {sorted(self.instructions)}, needed for {sorted(directions)}; "
            "name one request per direction, and none for the plain format",
        )


@dataclass(frozen=True, kw_only=True)
class PrepareParallel:
    """Turn pairs of translated sentences into training and validation documents."""

    input: tuple[Path, ...]
    "Files, folders or patterns, in this order: one JSON object a line, or a row of parquet, with a text per language."
    output: Path
    "Folder to write train-00000.jsonl.zst and valid-00000.jsonl.zst into."
    overwrite: bool = False
    "Replace the output folder if it exists."
    settings: ParallelSettings
