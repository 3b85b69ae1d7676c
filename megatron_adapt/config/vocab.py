"""Settings of the vocab stage."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from megatron_adapt.config.require import require

# The methods that read a setting; all read those that are not here.
_READ_BY = {
    "piece_weights": ("subtoken_weighted",),
    "donor": ("linear_transform",),
    "estimator": ("linear_transform",),
    "seed": ("normal", "linear_transform"),
}


@dataclass(frozen=True, kw_only=True)
class VocabSettings:
    """How the rows of new tokens are filled (table ``[vocab]``)."""

    method: Literal[
        "subtoken_mean", "subtoken_weighted", "mean", "normal", "align", "merge_tree", "linear_transform"
    ] = "subtoken_mean"
    """subtoken_mean: mean of the rows of the old pieces that spell the token; subtoken_weighted: the same, weighted.
    mean: mean of all old rows. normal: drawn from their normal distribution. align: mean over the old pieces seen under
    the token in --corpus. merge_tree: halves of the two parts that merge into it. linear_transform: rows of --donor, a
    model of the new language, through the best linear map onto the rows of shared tokens."""
    piece_weights: Literal["length", "position"] = "length"
    """What subtoken_weighted weighs a piece by. length: its bytes. position: its place, the last heaviest for input
    rows and the first for rows of the head."""
    donor: Path | None = None
    "Hugging Face folder of the model whose rows linear_transform maps, with its tokenizer; any hidden size."
    estimator: Literal["auto", "ols", "ridge", "procrustes"] = "auto"
    """The linear map. ols: least squares. ridge: with a penalty. procrustes: a rotation and one scale. auto: what
    predicts held-out shared tokens best."""
    norm: Literal["none", "median", "quantile"] = "none"
    """Length of the new rows. none: as the method gives it. median: that of the median old row. quantile: as spread as
    the old rows', ranks kept."""
    seed: int = 1234
    "Of what is drawn at random."

    def __post_init__(self) -> None:
        require(self.seed >= 0, f"vocab.seed: {self.seed} is below 0; use 0 or more")
        for item in fields(self):
            methods = _READ_BY.get(item.name, (self.method,))
            value = getattr(self, item.name)
            require(
                value == item.default or self.method in methods,
                f"vocab.{item.name}: {value} has no effect with method {self.method}; leave it out, or use "
                f"{' or '.join(methods)}",
            )
        require(
            self.donor is not None or self.method != "linear_transform",
            "vocab.donor: missing; name the folder of the model whose rows linear_transform maps",
        )


@dataclass(frozen=True, kw_only=True)
class ResizeVocab:
    """Give a model the rows of an extended tokenizer; old rows stay bit-identical."""

    model: Path
    "Hugging Face folder of the base model, or Megatron checkpoint, with its tokenizer."
    tokenizer: Path
    "Folder of the tokenizer that tools/build_tokenizer.py made from the model's."
    output: Path
    "Folder to write, of the same kind."
    corpus: tuple[Path, ...] = ()
    "Documents in the new language, for method align."
    text_key: str = "text"
    "Key of the text in a JSON document."
    vocab_pad_multiple: int = 1024
    "A Megatron checkpoint pads the vocabulary to a multiple of this, so that it loads at any TP up to 8."
    dry_run: bool = False
    "Check everything, print bytes, files, memory and time, and write nothing but an unnamed file to measure the disk."
    overwrite: bool = False
    "Replace the output folder if it exists."
    settings: VocabSettings = field(default_factory=VocabSettings)

    def __post_init__(self) -> None:
        is_read = self.settings.method == "align"
        require(
            bool(self.corpus) or not is_read, "corpus: missing; name documents in the new language for method align"
        )
        require(
            is_read or not self.corpus,
            f"corpus: has no effect with method {self.settings.method}; leave it out, or use align",
        )

    def list_sources(self) -> list[Path]:
        """List what the method reads besides model and tokenizer."""
        return [*self.corpus, *([] if self.settings.donor is None else [self.settings.donor])]
