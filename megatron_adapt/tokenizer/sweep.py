"""Extend a tokenizer by several sizes, measure each, and say where more pieces stop paying.

Pieces are learned one after another, so a smaller extension is the beginning of a larger one: the corpus is read and
learned from once, at the largest size. Every size is then written as ``build_tokenizer`` with method ``continue`` and
``--size extendNN`` writes it, by the same functions, into a folder that is thrown away.

1. ``sweep_sizes`` builds and measures the base and every size.
2. ``find_flat`` applies the rule: the gain flattens at the first size, 0 for the base, after which the next step saves
   less than 1 % of the language's tokens for each 25 % of the base's vocabulary.
3. ``count_row_cost`` counts what the rows cost: parameters, and FLOPs of the output head.

Costs: the time of one build, and of encoding every corpus once for each size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

from megatron_adapt.config import SweepSettings, TokenizerSettings
from megatron_adapt.corpus.documents import read_texts
from megatron_adapt.errors import ConfigError
from megatron_adapt.files import read_json, require_file
from megatron_adapt.shape import LlamaShape, read_shape
from megatron_adapt.tokenizer.base import check_base
from megatron_adapt.tokenizer.extend import learn_pieces, write_reachable
from megatron_adapt.tokenizer.figures import TokenizerFigures
from megatron_adapt.tokenizer.filters import make_filter
from megatron_adapt.tokenizer.made import count_pieces, refuse_empty, warn_few
from megatron_adapt.tokenizer.pieces import LoadedTokenizer, read_tokenizer
from megatron_adapt.tokenizer.words import count_words

_MODEL_CONFIG = "config.json"
_STEP_SHARE = 0.25
_LEAST_SAVED = 0.01
RULE = f"the next step saves less than {_LEAST_SAVED:.0%} of the tokens for each {_STEP_SHARE:.0%} of the base's ids"

Measure = Callable[[LoadedTokenizer, str], dict[str, TokenizerFigures]]


@dataclass(frozen=True, kw_only=True)
class RowCost:
    """What new rows add to a model, without padding of the vocabulary."""

    parameters: int
    parameters_share: float
    "Of the model's."
    head_flops: int
    "Of the output head for one token, forward; with backward three times as many."
    flops_share: float
    "Of the model's for one token, attention over the context aside; forward and backward alike."


@dataclass(frozen=True, kw_only=True)
class SweepStep:
    """What one size saves of one language's tokens."""

    figures: TokenizerFigures
    saved: float
    "Share of the tokens of the size before that this one saves; 0 for the base."
    saved_per_1000_rows: float
    flops_per_byte: float | None
    "Compute for the same text, relative to the base: FLOPs per token x tokens per byte; None without a model."


@dataclass(frozen=True, kw_only=True)
class SweepSize:
    """One extension."""

    size: int
    "Per cent of the base's vocabulary that were asked for; 0 for the base."
    vocab_size: int
    rows: int
    "Pieces added; fewer than asked where the corpus gives no more."
    cost: RowCost | None
    "None without a model."
    languages: dict[str, SweepStep]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """All sizes of one base, the base first."""

    base: Path
    rule: str
    flattens_at: dict[str, int | None]
    "By language: the size after which the gain is flat by the rule, 0 for the base; None if it is not by the last."
    sizes: tuple[SweepSize, ...]


def sweep_sizes(settings: SweepSettings, text_key: str, measure: Measure) -> Sweep:
    """Build the extensions and measure them.

    Args:
        settings: the base, what to learn from, and the sizes.
        text_key: key of the text in a document.
        measure: gives the figures of a tokenizer, which is to be called by the name, by language.

    Raises:
        ConfigError: a script, a segmenter or the model's shape is unknown.
        DataError: the base or the corpus is damaged, or the corpus gives no piece.
    """
    if settings.base is None:
        raise ConfigError("--sweep: extends --base, and there is none; name its folder")
    for path in settings.corpus:
        require_file(path, "--corpus")
    shape = _read_shape(settings.model_shape) if settings.model_shape else None
    base = read_tokenizer(settings.base)
    check_base(base)
    choose = _learn_once(base, settings, text_key)
    found = {0: (base.vocab_size, measure(base, "base"))}
    for size in settings.sweep:
        num_asked = count_pieces(_of_size(settings, size), base.vocab_size, base.vocab_size)
        with TemporaryDirectory(prefix="sweep-") as folder:
            spelled = write_reachable(base, partial(choose, num_asked), Path(folder))
            warn_few("corpus", len(spelled), num_asked, _of_size(settings, size))
            tokenizer = read_tokenizer(Path(folder))
            found[size] = tokenizer.vocab_size, measure(tokenizer, f"extend{size}")
    return describe_sweep(settings.base, found, shape)


def _of_size(settings: SweepSettings, size: int) -> TokenizerSettings:
    return TokenizerSettings(
        size=f"extend{size}",
        scripts=settings.scripts,
        min_frequency=settings.min_frequency,
        segmenter=settings.segmenter,
    )


def _learn_once(
    base: LoadedTokenizer, settings: SweepSettings, text_key: str
) -> Callable[[int, frozenset[bytes]], list[bytes]]:
    """Return the function that gives the first pieces in the order learned, so many of them, without banned ones."""
    largest = _of_size(settings, settings.sweep[-1])
    words = count_words(base, read_texts(settings.corpus, text_key), make_filter(settings.scripts), settings.segmenter)
    num_pieces = count_pieces(largest, base.vocab_size, base.vocab_size)
    known: dict[frozenset[bytes], list[bytes]] = {}

    def choose(num_asked: int, banned: frozenset[bytes]) -> list[bytes]:
        if banned not in known:
            learned, reasons = learn_pieces(base, words.counts, num_pieces, largest, banned)
            if not learned:
                raise refuse_empty(words.num_texts, largest, reasons)
            known[banned] = [piece for piece, _ in learned]
        return known[banned][:num_asked]

    return choose


def _read_shape(folder: Path) -> LlamaShape:
    path = folder / _MODEL_CONFIG
    require_file(path, "--model-shape")
    return read_shape(read_json(path), str(path))


def describe_sweep(
    base: Path, found: Mapping[int, tuple[int, dict[str, TokenizerFigures]]], shape: LlamaShape | None
) -> Sweep:
    """Compare every size with the one before and with the base.

    Args:
        base: folder of the base.
        found: size of the vocabulary and figures by language, for each size in rising order; the base is size 0.
        shape: the model that the rows are for.
    """
    base_vocab, base_figures = found[0]
    sizes: list[SweepSize] = []
    before, rows_before = base_figures, 0
    for size, (vocab_size, figures) in found.items():
        rows = vocab_size - base_vocab
        cost = count_row_cost(shape, rows) if shape else None
        languages = {}
        for language, item in figures.items():
            saved = 1 - item.tokens / max(1, before[language].tokens)
            languages[language] = SweepStep(
                figures=item,
                saved=saved,
                saved_per_1000_rows=1000 * saved / max(1, rows - rows_before),
                flops_per_byte=(1 + cost.flops_share) * item.tokens / max(1, base_figures[language].tokens)
                if cost
                else None,
            )
        sizes.append(SweepSize(size=size, vocab_size=vocab_size, rows=rows, cost=cost, languages=languages))
        before, rows_before = figures, rows
    flattens_at = {language: find_flat(sizes, language, base_vocab) for language in base_figures}
    return Sweep(base=base, rule=RULE, flattens_at=flattens_at, sizes=tuple(sizes))


def find_flat(sizes: Sequence[SweepSize], language: str, base_vocab_size: int) -> int | None:
    """Return the first size after which the next step saves too little (``RULE``), or None if each pays."""
    for smaller, larger in pairwise(sizes):
        steps = (larger.rows - smaller.rows) / base_vocab_size / _STEP_SHARE
        if not steps or larger.languages[language].saved / steps < _LEAST_SAVED:
            return smaller.size
    return None


def count_row_cost(shape: LlamaShape, rows: int) -> RowCost:
    """Count what ``rows`` more ids add to a model.

    A row is ``hidden_size`` parameters in the input embedding and, unless tied, as many in the head. A token takes two
    FLOPs, a multiplication and an addition, for every parameter but those of the input embedding, which is looked up.
    """
    matrices = 1 if shape.tied else 2
    parameters = matrices * rows * shape.hidden_size
    looked_up = 0 if shape.tied else shape.vocab_size * shape.hidden_size
    head_flops = 2 * rows * shape.hidden_size
    return RowCost(
        parameters=parameters,
        parameters_share=parameters / shape.num_parameters,
        head_flops=head_flops,
        flops_share=head_flops / (2 * (shape.num_parameters - looked_up)),
    )
