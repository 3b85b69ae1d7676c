"""Method ``transplant``: append the most useful pieces of another model's tokenizer, the donor.

The way of the Jais models: Arabic pieces of Jais 30B in Llama 2 (Gosal et al. 2024, arXiv:2407.12869). ``--adopt``,
which takes the donor whole, is in ``adopt``.

1. ``count_words`` finds the words of the corpus as the base cuts text; ``rank_pieces`` cuts them by the donor's
   merges. A piece counts wherever the donor builds it, so its parts rank before it, and the ranking may end anywhere.
   Pieces are compared by the bytes they stand for: the donor may be of the other family.
2. ``append_complete`` appends the most frequent pieces that the base lacks and the filters accept, in the order of the
   donor's merges: where the base has no merges of its own, text is then cut as the donor cuts it.

Costs: those of ``continue`` without the learning.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from megatron_adapt.config import BuildTokenizer
from megatron_adapt.corpus.documents import read_texts
from megatron_adapt.tokenizer.accept import make_acceptance
from megatron_adapt.tokenizer.adopt import adopt_donor
from megatron_adapt.tokenizer.complete import Choice, append_complete
from megatron_adapt.tokenizer.filters import make_filter
from megatron_adapt.tokenizer.frequency import count_builds
from megatron_adapt.tokenizer.made import Made, count_pieces, refuse_empty, warn_few
from megatron_adapt.tokenizer.pieces import (
    SPACE,
    Kind,
    LoadedTokenizer,
    from_letters,
    read_tokenizer,
    to_letters,
)
from megatron_adapt.tokenizer.words import count_words, strip_tokenizer


def make_transplanted(base: LoadedTokenizer, config: BuildTokenizer, folder: Path) -> Made:
    """Write ``base`` with pieces of ``settings.donor`` to ``folder``, or the donor itself if ``adopt``.

    Raises:
        ConfigError: a script is unknown.
        DataError: the donor is damaged or of an unknown kind, or it has no piece for the corpus.
    """
    settings = config.settings
    assert settings.donor is not None
    donor = read_tokenizer(settings.donor)
    if settings.adopt:
        return adopt_donor(base, donor, config, folder)
    allowed = make_filter(settings.scripts)
    num_asked = count_pieces(settings, base.vocab_size, base.vocab_size)
    words = count_words(base, read_texts(config.corpus, config.text_key), allowed)
    accept = make_acceptance(base, words.counts, allowed, frozenset())
    frequency = rank_pieces(base, donor, words.counts)
    choice = Choice(
        base.kind,
        accept,
        # ``sorted`` keeps the donor's order among equals.
        sorted(frequency, key=lambda piece: -frequency[piece]),
        order=list(frequency),
        rare={piece for piece, count in frequency.items() if count < settings.min_frequency},
        num_pieces=num_asked,
    )
    spelled = append_complete(base, choice, folder)
    if not spelled:
        raise refuse_empty(words.num_texts, settings, choice.reasons)
    warn_few("donor", len(spelled), num_asked, settings)
    return Made(
        keeps_ids=True,
        num_asked=num_asked,
        reasons=choice.reasons,
        sample=words.sample,
        num_texts=words.num_texts,
        num_bytes=words.num_bytes,
    )


def rank_pieces(base: LoadedTokenizer, donor: LoadedTokenizer, counts: Mapping[str, int]) -> Counter[bytes]:
    """Count the donor's pieces in words.

    Args:
        base: the tokenizer whose words they are.
        donor: the tokenizer that cuts them; its normaliser and pre-tokenizer play no part.
        counts: words with their frequency, spelled as the base spells pieces.

    Returns:
        Frequency of every piece, as bytes that the base spells so, in the order of the donor's merges.
    """
    words: Counter[str] = Counter()
    for word, count in counts.items():
        words[_spell(_read(word, base.kind), donor.kind)] += count
    frequency: Counter[bytes] = Counter()
    for piece, count in count_builds(strip_tokenizer(donor), words).items():
        data = _read(piece, donor.kind)
        frequency[data if base.kind == "byte_level" else data.replace(b" ", SPACE.encode())] += count
    return frequency


def _read(piece: str, kind: Kind) -> bytes:
    return from_letters(piece) if kind == "byte_level" else piece.replace(SPACE, " ").encode()


def _spell(data: bytes, kind: Kind) -> str:
    return to_letters(data) if kind == "byte_level" else data.decode(errors="ignore").replace(" ", SPACE)
