"""Settings of ``tools/diagnose_vocab.py``."""

from dataclasses import dataclass, field
from pathlib import Path

from megatron_adapt.config.evaluate import EvaluateSettings
from megatron_adapt.config.require import require


@dataclass(frozen=True, kw_only=True)
class DiagnoseVocab:
    """Measure the rows of a resized or trained model against those of the model before."""

    base: Path
    "Hugging Face folder of the model before the resize, with its tokenizer."
    model: Path
    "Hugging Face folder of the model after it, with its tokenizer; it may have been trained since."
    donor: Path | None = None
    "Hugging Face folder of a model of the new language, to say how well a linear map takes its rows to the base's."
    corpora: tuple[str, ...] = ()
    "LANG=FILE of every corpus: frequencies of tokens, and bits per byte of both models."
    text_key: str = "text"
    "Key of the text in a JSON document."
    count_bytes: int = 5_000_000
    "Text per language in which tokens are counted, in bytes; 0 counts in all."
    dictionary: Path | None = None
    "Translations to find by the rows: a line is a word of the old language, a tab, one of the new."
    parallel: Path | None = None
    "The same from translated documents: JSON lines with a text in each language; the old one puts spaces round words."
    parallel_keys: tuple[str, ...] = ()
    "Keys of the two texts of --parallel, the old language first."
    max_word_tokens: int = 4
    "Words of more tokens than this are left out of the search for translations."
    num_examples: int = 20
    "New tokens whose nearest old tokens are shown: the most frequent in --corpora, without these the first."
    json: Path | None = None
    "Also write the figures to this file."
    plots: Path | None = None
    "Also draw them, into this folder."
    settings: EvaluateSettings = field(default_factory=EvaluateSettings)

    def __post_init__(self) -> None:
        require(
            self.dictionary is None or self.parallel is None,
            f"--dictionary: {self.dictionary} and --parallel {self.parallel} are two sources of translations; name one",
        )
        num_keys = len(set(self.parallel_keys))
        is_pair = num_keys == len(self.parallel_keys) == 2
        if self.parallel is None:
            require(not self.parallel_keys, "--parallel-keys: has no effect without --parallel; leave it out")
        else:
            require(is_pair, f"--parallel-keys: {self.parallel_keys} are not two keys; name them: en ja")
        for name in ("max_word_tokens", "num_examples"):
            value = getattr(self, name)
            require(value >= 1, f"--{name.replace('_', '-')}: {value} is below 1; use 1 or more")
        require(self.count_bytes >= 0, f"--count-bytes: {self.count_bytes} is below 0; 0 counts in all")
