"""Settings of the vocab stage."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from megatron_adapt.config.require import require

Method = Literal[
    "subtoken_mean",
    "subtoken_weighted",
    "mean",
    "normal",
    "align",
    "merge_tree",
    "similarity_topk",
    "focus",
    "linear_transform",
    "clp",
    "omp",
]
_BY_DONOR = ("linear_transform", "clp", "omp")
_BY_TRAINED_VECTORS = ("similarity_topk", "focus")
# The methods that read a setting; all read those that are not here.
_READ_BY = {
    "piece_weights": ("subtoken_weighted",),
    "vectors": ("similarity_topk",),
    "base_vectors": ("similarity_topk",),
    "dictionary": ("similarity_topk",),
    "encoder": ("similarity_topk",),
    "vector_size": _BY_TRAINED_VECTORS,
    "num_neighbors": ("similarity_topk",),
    "temperature": ("similarity_topk",),
    "donor": _BY_DONOR,
    "estimator": ("linear_transform",),
    "anchor_weights": ("linear_transform",),
    "num_atoms": ("omp",),
    "seed": ("normal", "linear_transform", *_BY_TRAINED_VECTORS),
}


@dataclass(frozen=True, kw_only=True)
class VocabSettings:
    """How the rows of new tokens are filled (table ``[vocab]``)."""

    method: Method = "subtoken_mean"
    """subtoken_mean: mean of the rows of the old pieces that spell the token; subtoken_weighted: the same, weighted.
    mean: mean of all old rows. normal: drawn from their normal distribution. align: mean over the old pieces seen under
    the token in --corpus. merge_tree: halves of the two parts that merge into it. similarity_topk: weighted mean of the
    rows of the most similar old tokens, by vectors of their text. focus: the same over shared tokens, by vectors
    trained on --corpus cut by the new tokenizer. linear_transform, clp, omp: by the rows of --donor, a model of the new
    language: through the best linear map onto the rows of shared tokens; mean of shared rows weighted by the cosine in
    the donor; the few shared rows that the donor's row is a sum of."""
    piece_weights: Literal["length", "position"] = "length"
    """What subtoken_weighted weighs a piece by. length: its bytes. position: its place, the last heaviest for input
    rows and the first for rows of the head."""
    vectors: Path | None = None
    """Word vectors that similarity_topk compares tokens by: the text format of fastText (.vec, also .gz) or its .bin.
    Without this and --encoder they are trained on --corpus."""
    base_vectors: Path | None = None
    "Word vectors of the old language, if --vectors holds the new one alone; --dictionary aligns the two."
    dictionary: Path | None = None
    "Translations that align base_vectors with vectors: a line is a word of the old language, a tab, one of the new."
    encoder: str | None = None
    "Hugging Face text encoder, a folder or a name, whose vectors of token texts similarity_topk compares."
    vector_size: int = 100
    "Columns of the vectors that are trained on --corpus."
    num_neighbors: int = 10
    "Old tokens that similarity_topk takes the mean of."
    temperature: float = 0.1
    "Of the softmax over their cosines; small ones give the nearest more."
    donor: Path | None = None
    "Hugging Face folder of a model of the new language, with its tokenizer; any hidden size."
    estimator: Literal["auto", "ols", "ridge", "procrustes"] = "auto"
    """The linear map. ols: least squares. ridge: with a penalty. procrustes: a rotation and one scale. auto: what
    predicts held-out shared tokens best."""
    anchor_weights: Literal["none", "frequency"] = "none"
    "What a shared token weighs in the fit of linear_transform. frequency: how often it occurs in --corpus."
    num_atoms: int = 64
    "Shared rows that omp makes a row of."
    norm: Literal["none", "median", "quantile"] = "none"
    """Length of the new rows. none: as the method gives it. median: that of the median old row. quantile: as spread as
    the old rows', ranks kept."""
    seed: int = 1234
    "Of what is drawn at random."

    def __post_init__(self) -> None:
        require(self.seed >= 0, f"vocab.seed: {self.seed} is below 0; use 0 or more")
        require(self.temperature > 0, f"vocab.temperature: {self.temperature} is not positive; 0.1 is usual")
        for name in ("vector_size", "num_neighbors", "num_atoms"):
            require(getattr(self, name) >= 1, f"vocab.{name}: {getattr(self, name)} is below 1; use 1 or more")
        for item in fields(self):
            methods = _READ_BY.get(item.name, (self.method,))
            value = getattr(self, item.name)
            require(
                value == item.default or self.method in methods,
                f"vocab.{item.name}: {value} has no effect with method {self.method}; leave it out, or use "
                f"{' or '.join(methods)}",
            )
        require(
            self.donor is not None or self.method not in _BY_DONOR,
            f"vocab.donor: missing; name the folder of the model whose rows {self.method} reads",
        )
        self._check_vectors()

    def _check_vectors(self) -> None:
        """Refuse sources of vectors that exclude or lack each other."""
        require(
            self.encoder is None or self.vectors is None,
            f"vocab.encoder: {self.encoder} and vectors {self.vectors} are two sources of vectors; name one",
        )
        require(
            self.base_vectors is None or (self.vectors is not None and self.dictionary is not None),
            f"vocab.base_vectors: {self.base_vectors} needs vectors to align with and a dictionary; name both",
        )
        require(
            self.dictionary is None or self.base_vectors is not None,
            f"vocab.dictionary: {self.dictionary} has no effect without base_vectors; name them or leave it out",
        )
        # Also the seed and size of vectors that are not trained.
        has_vectors = self.method == "similarity_topk" and not self.reads_corpus
        for item in fields(self):
            value = getattr(self, item.name)
            require(
                not has_vectors or item.name not in ("vector_size", "seed") or value == item.default,
                f"vocab.{item.name}: {value} has no effect on vectors that are not trained; leave it out",
            )

    @property
    def reads_corpus(self) -> bool:
        """Whether the method reads documents in the new language."""
        if self.method == "similarity_topk":
            return self.vectors is None and self.encoder is None
        return self.method in ("align", "focus") or self.anchor_weights == "frequency"

    def list_sources(self) -> list[Path]:
        """List the files and folders that the settings name."""
        return [path for path in (self.vectors, self.base_vectors, self.dictionary, self.donor) if path is not None]


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
    "Documents in the new language, for the methods that read some."
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
        is_read, method = self.settings.reads_corpus, self.settings.method
        require(
            bool(self.corpus) or not is_read, f"corpus: missing; name documents in the new language for method {method}"
        )
        require(is_read or not self.corpus, f"corpus: has no effect with method {method} as it is set; leave it out")

    def list_sources(self) -> list[Path]:
        """List what the method reads besides model and tokenizer."""
        return [*self.corpus, *self.settings.list_sources()]
