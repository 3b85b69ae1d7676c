"""Method ``replace``: a new vocabulary for both languages, around the special tokens and settings of the base.

The replacement studied for Jais (Gosal et al. 2024, arXiv:2407.12869) and the scenarios BPE and Unigram of LEP
(Tikhomirov and Chernyshev 2024, arXiv:2412.21140).

1. ``count_mixed_words`` counts the words of both languages, in the shares asked for (``mix``): pre-tokens of a
   byte-level base, else what stands between spaces.
2. ``learn_scores`` learns a few more pieces than asked, with the trainer of ``tokenizers`` for a byte-level base, else
   with SentencePiece's.
3. ``Vocabulary.choose`` drops what the filters refuse, what is unreachable and what is rare, then the last ones. What
   is left keeps all its parts.
4. ``Vocabulary.write`` writes the pieces behind the special tokens that stood at the start, the others behind them.

A Unigram piece whose text is worth more in several pieces is chosen in no context; it is dropped as unreachable.
Unigram scores are rounded to sixteenths. SentencePiece adds them in single precision, ``tokenizers`` in double, and
that alone makes them choose differently in long text; sums of sixteenths are exact in both up to about 400 kB of text.
Costs: 20 MB and 32,000 pieces take 20 s by BPE, 45 s by Unigram, and 0.6 GB (2 cores).
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from string import ascii_letters, digits, punctuation
from typing import Any, Literal

import regex

from megatron_adapt.config import BuildTokenizer
from megatron_adapt.errors import ConfigError, DataError
from megatron_adapt.logs import show_progress
from megatron_adapt.tokenizer.accept import make_acceptance
from megatron_adapt.tokenizer.cut import write_breaks
from megatron_adapt.tokenizer.filters import PieceFilter, make_filter
from megatron_adapt.tokenizer.learn import train_on_words
from megatron_adapt.tokenizer.made import Made, count_pieces, refuse_empty, warn_few
from megatron_adapt.tokenizer.merge import learn_alone
from megatron_adapt.tokenizer.mix import read_mix
from megatron_adapt.tokenizer.model_proto import NORMAL, PieceModel
from megatron_adapt.tokenizer.pieces import SPACE, LoadedTokenizer, piece_bytes, to_letters
from megatron_adapt.tokenizer.segment import make_segmenter
from megatron_adapt.tokenizer.vocabulary import Vocabulary
from megatron_adapt.tokenizer.words import CountedWords, Reading, count_words

_SURPLUS = 1.05
_MAX_CHARACTERS = 4096  # of a word; the trainer leaves out longer lines
_STEPS = 16  # of a Unigram score
_WORD = regex.compile(rf"{SPACE}*[^{SPACE}\p{{Cc}}\p{{Zl}}\p{{Zp}}]{{1,{_MAX_CHARACTERS}}}|{SPACE}+")
_ANYTHING = PieceFilter(regex.compile(r".", regex.DOTALL), regex.compile(r".*", regex.DOTALL))
_TWO_DIGITS = regex.compile(r"\p{N}{2}")


def make_replaced(base: LoadedTokenizer, config: BuildTokenizer, folder: Path) -> Made:
    """Write a tokenizer to ``folder`` that shares with ``base`` all but its learned pieces.

    Raises:
        ConfigError: there is no old corpus, a script is unknown, the size leaves no room for pieces, or a Unigram is
            asked of a byte-level base.
        DataError: the corpora give no piece.
    """
    settings = config.settings
    if settings.model == "unigram" and base.kind == "byte_level":
        raise ConfigError(
            f"tokenizer.model: 'unigram' is for a SentencePiece base, and {base.folder} is a byte-level BPE; use bpe"
        )
    allowed = make_filter(settings.scripts)
    num_asked = count_pieces(settings, base.vocab_size, kept=0)
    vocabulary = Vocabulary(base)
    num_wanted = num_asked - vocabulary.num_fixed
    if num_wanted < 1:
        raise ConfigError(
            f"tokenizer.size: {num_asked} ids leave no room beside the {vocabulary.num_fixed} special tokens and bytes "
            "of the base; ask for more"
        )
    words = count_mixed_words(base, config)
    accept = make_acceptance(base, words.counts, allowed, frozenset())
    num_learned = int(_SURPLUS * num_wanted)
    for _ in range(2 if words.counts else 0):
        scores, model = learn_scores(base, words.counts, num_learned, settings.model)
        vocabulary.choose(
            scores,
            model,
            refuse=accept.refuse,
            counts=words.counts,
            min_frequency=settings.min_frequency,
            num_pieces=num_wanted,
        )
        found = len(vocabulary.scores)
        if found == num_wanted or len(scores) < num_learned or vocabulary.reasons["rare"]:
            break
        num_learned = int(_SURPLUS * num_learned * num_wanted / max(1, found))
    if not vocabulary.scores:
        raise refuse_empty(words.num_texts, settings, vocabulary.reasons)
    vocabulary.write(folder)
    warn_few("corpus", len(vocabulary.scores) + vocabulary.num_fixed, num_asked, settings)
    return Made(
        keeps_ids=False,
        num_asked=num_asked,
        reasons=vocabulary.reasons,
        sample=words.sample,
        num_texts=words.num_texts,
        num_bytes=words.num_bytes,
    )


def count_mixed_words(base: LoadedTokenizer, config: BuildTokenizer) -> CountedWords:
    """Count the words of both corpora, spelled as ``base`` spells pieces, white space included.

    Raises:
        ConfigError: there is no old corpus, or no such segmenter.
        DataError: a corpus is damaged or empty, or the segmenter fails on a text.
    """
    texts, segmenter = read_mix(config), config.settings.segmenter
    if base.kind == "byte_level":
        return count_words(base, texts, _ANYTHING, segmenter)
    segment = make_segmenter(segmenter) if segmenter else None
    normalizer, reading = base.tokenizer.normalizer, Reading()
    counts: Counter[str] = Counter()
    with show_progress("reading the corpora", None, "MB") as advance:
        for batch in reading.batch(texts, advance):
            for text in batch:
                normal = normalizer.normalize_str(text) if normalizer else text
                spaced = (write_breaks(normal, segment) if segment else normal).replace(" ", SPACE)
                counts.update(_WORD.findall(spaced if spaced.startswith(SPACE) else SPACE + spaced))
    return CountedWords(counts, reading.sample, reading.num_texts, reading.num_bytes)


def learn_scores(
    base: LoadedTokenizer, counts: Mapping[str, int], num_pieces: int, model_type: Literal["bpe", "unigram"]
) -> tuple[dict[str, float], PieceModel | None]:
    """Learn about ``num_pieces`` pieces beside bytes and special tokens; the text may give fewer.

    Args:
        base: the tokenizer of whose family they are; where it splits digits, no piece holds two.
        counts: words with their frequency.
        num_pieces: how many to learn.
        model_type: algorithm of a SentencePiece.

    Returns:
        The score of every piece, in the order of the ids, and the SentencePiece model they are from.

    Raises:
        ConfigError: there are more characters than pieces.
    """
    if base.kind == "byte_level":
        found = learn_alone(base.kind, counts, num_pieces, 1).scores
        return {to_letters(piece): score for piece, score in found.items()}, None
    holds_numbers = any(_TWO_DIGITS.search(data.decode(errors="ignore")) for data in piece_bytes(base))
    settings: dict[str, Any] = {"model_type": model_type, "split_digits": not holds_numbers}
    if model_type == "unigram":
        # tokenizers takes <0x41> for text: spelled in characters, it must be worth more than as a piece.
        settings["required_chars"] = ascii_letters + digits + punctuation
    try:
        model = train_on_words(counts, num_pieces, **settings)
    except DataError as error:
        if "required_chars" not in str(error):
            raise
        raise ConfigError(
            f"tokenizer.size: {num_pieces} pieces are fewer than the characters of the corpora ({error}); ask for more"
        ) from None
    learned = {piece.text: piece.score for piece in model.pieces if piece.kind == NORMAL}
    if model_type == "unigram":
        learned = {piece: round(score * _STEPS) / _STEPS for piece, score in learned.items()}
    return learned, model
