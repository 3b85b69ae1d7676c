"""Settings of the data stage."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_adapt.config.corpus import PlainText
from megatron_adapt.config.require import require


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """How documents become tokens (table ``[data]``)."""

    workers: int = 1
    "Processes that tokenise; the number of cores is best."
    append_eod: bool = True
    "End every document with the tokenizer's end-of-document token."
    backend: Literal["auto", "tokenizers", "gigatoken"] = "auto"
    """auto: gigatoken where it is installed and gives the same ids on a sample of the corpus, else tokenizers.
    gigatoken: stop if it does not."""
    on_error: Literal["fail", "skip"] = "fail"
    """fail: stop at the first line that is no document. skip: leave such lines out, count them and list them in
    PREFIX.skipped.txt. A damaged compressed file stops both."""
    prompt_key: str = ""
    """Key of a text that is put in front of the others and bears no loss in training, such as 'prompt'; PREFIX.prompts
    says how many tokens it is."""
    shuffle_seed: int | None = None
    "Write the documents in a random order that this number decides; otherwise in the order of the input."
    partitions: int = 0
    "Cut the input into at least this many chunks, the units of work and of restart; 0: as many as the workers need."

    def __post_init__(self) -> None:
        require(self.workers >= 1, f"data.workers: {self.workers} is below 1; use the number of cores")
        require(self.partitions >= 0, f"data.partitions: {self.partitions} is below 0; use 0 or a number of chunks")


@dataclass(frozen=True, kw_only=True)
class PreprocessData:
    """Tokenise documents into PREFIX.bin and PREFIX.idx, readable by megatron-core. A run that was killed goes on."""

    input: tuple[Path, ...]
    """Files, folders or patterns ('raw/*.jsonl.gz'), in this order: JSON lines or parquet, or plain text with
    --plain-text; also compressed by gzip, zstd or xz. Recognised by content; in a folder also by name."""
    tokenizer: Path
    "Folder of the tokenizer."
    output_prefix: Path
    "Path of the output without .bin and .idx."
    json_keys: tuple[str, ...] = ("text",)
    "Key of the text in a JSON document. Several keys: an output each, PREFIX_KEY.bin and PREFIX_KEY.idx."
    plain_text: PlainText = "none"
    """What a document is in files of plain text: the whole file, or paragraphs, which blank lines separate. none: there
    are no such files."""
    split_sentences: bool = False
    """Write every sentence as a sequence of its document in PREFIX.idx, as Megatron-LM does, each encoded by itself;
    white space between sentences is dropped. The end-of-document token follows the last one."""
    keep_newlines: bool = False
    """With --split-sentences: keep the white space between sentences, newlines and blanks, at the end of the first; a
    document read end to end is its text."""
    lang: str = "learned"
    """With --split-sentences, where the abbreviations come from: learned, by Punkt from the input itself (its first
    50 MB; kept as PREFIX.sentences.json); such a FILE.json, to cut other data alike; or a language of an installed
    nltk_data, such as english. Nothing is downloaded."""
    overwrite: bool = False
    "Replace the output files if they exist, and an unfinished run that cannot be continued."
    settings: DataSettings = field(default_factory=lambda: DataSettings(append_eod=False))

    def __post_init__(self) -> None:
        require(bool(self.json_keys), "--json-keys: empty; name the key of the text")
        twice = sorted({key for key in self.json_keys if self.json_keys.count(key) > 1})
        require(not twice, f"--json-keys: {', '.join(twice)} twice; name each key once")
        for key in self.json_keys:
            require("/" not in key or len(self.json_keys) == 1, f"--json-keys: {key!r} is no part of a file name")
        require(bool(self.lang), "--lang: empty; name learned, a language of nltk_data or a FILE.json")
        for flag, is_set in (("--keep-newlines", self.keep_newlines), ("--lang", self.lang != "learned")):
            require(self.split_sentences or not is_set, f"{flag}: does nothing by itself; add --split-sentences")
        require(
            not (self.split_sentences and self.settings.prompt_key),
            f"--split-sentences: a prompt ({self.settings.prompt_key!r}) is encoded as one with its text, sentences by "
            "themselves; leave out --prompt-key",
        )
