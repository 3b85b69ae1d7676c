"""Method ``merge``: learn a tokenizer of the new language alone and append the pieces that the base lacks.

The way of Chinese-LLaMA (Cui et al. 2023, arXiv:2304.08177), Swallow (Fujii et al. 2024, arXiv:2404.17790) and the
extension study of LEP (Tikhomirov and Chernyshev 2024, arXiv:2412.21140).

1. ``count_words`` finds the words of the corpus that hold a character of the scripts.
2. ``learn_alone`` learns a vocabulary from them with SentencePiece's trainer, or ``tokenizers``' for a byte-level base.
   It is larger than asked, since the base has some of the pieces and the filters refuse some. BPE learns in order, so
   a larger vocabulary begins with the smaller one; where the surplus does not suffice, a second round learns more.
3. ``append_complete`` appends them in the order learned. SentencePiece's characters are taken first, wherever its
   trainer lists them: what is cut off is the last merges.

SentencePiece scores: with ``below`` the files are those that ``continue`` writes. ``zero`` and ``learned`` repeat
published models: pieces that do not come out stay, readers of the files disagree, and ``check`` measures how much.
Costs: 10 MB and 4,000 pieces take about 20 s.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path

from tokenizers import Tokenizer, models, trainers

from megatron_adapt.config import BuildTokenizer
from megatron_adapt.corpus.documents import read_texts
from megatron_adapt.errors import ConfigError
from megatron_adapt.tokenizer.accept import make_acceptance
from megatron_adapt.tokenizer.append import write_extended
from megatron_adapt.tokenizer.complete import Choice, append_complete
from megatron_adapt.tokenizer.filters import MAX_PIECE_CHARACTERS, make_filter
from megatron_adapt.tokenizer.frequency import count_builds
from megatron_adapt.tokenizer.learn import train_on_words
from megatron_adapt.tokenizer.made import Made, count_pieces, refuse_empty, warn_few
from megatron_adapt.tokenizer.model_proto import NORMAL, list_by_score, list_merges
from megatron_adapt.tokenizer.pieces import MODEL_FILE, Kind, LoadedTokenizer, byte_letters, from_letters
from megatron_adapt.tokenizer.words import count_words

_SURPLUS = 1.25


@dataclass(frozen=True, kw_only=True)
class LearnedPieces:
    """The vocabulary of a new language."""

    scores: dict[bytes, float]
    "SentencePiece score of every piece, in the order of the ids."
    rare: frozenset[bytes]
    "Those built less often than the minimum frequency."
    is_exhausted: bool
    "Whether the text has no more pieces that are frequent enough."


def make_merged(base: LoadedTokenizer, config: BuildTokenizer, folder: Path) -> Made:
    """Write ``base`` to ``folder``, with pieces appended that were learned from ``config.corpus`` alone.

    Raises:
        ConfigError: a script is unknown, or the base has no scores that could be set.
        DataError: the corpus gives no piece.
    """
    settings = config.settings
    is_safe = settings.scores == "below"
    if not is_safe and not (base.kind == "sentencepiece" and (base.folder / MODEL_FILE).is_file()):
        raise ConfigError(
            f"tokenizer.scores: {settings.scores!r} is for a base with a SentencePiece {MODEL_FILE}, and {base.folder} "
            "has none; leave the setting out"
        )
    allowed = make_filter(settings.scripts)
    num_asked = count_pieces(settings, base.vocab_size, base.vocab_size)
    words = count_words(base, read_texts(config.corpus, config.text_key), allowed, settings.segmenter)
    reasons: Counter[str] = Counter()
    spelled: list[str] = []
    num_learned = int(_SURPLUS * num_asked) + (len(set(chain(*words.counts))) if base.kind == "sentencepiece" else 0)
    accept = make_acceptance(base, words.counts, allowed, frozenset())
    for _ in range(2 if words.counts else 0):
        learned = learn_alone(base.kind, words.counts, num_learned, settings.min_frequency)
        pieces = list(learned.scores)
        ranked = sorted(pieces, key=lambda piece: base.kind == "sentencepiece" and len(piece.decode()) > 1)
        choice = Choice(base.kind, accept, ranked, order=pieces, rare=learned.rare, num_pieces=num_asked)
        if is_safe:
            spelled = append_complete(base, choice, folder)
        elif pieces := choice.take():
            scores = [learned.scores[piece] if settings.scores == "learned" else 0.0 for piece in pieces]
            spelled = write_extended(base, pieces, folder, scores)
        reasons = choice.reasons
        if len(spelled) == num_asked or learned.is_exhausted:
            break
        num_learned = int(_SURPLUS * num_learned * num_asked / max(1, len(spelled)))
    if not spelled:
        raise refuse_empty(words.num_texts, settings, reasons)
    warn_few("corpus", len(spelled), num_asked, settings)
    return Made(
        keeps_ids=True,
        is_safe=is_safe,
        num_asked=num_asked,
        reasons=reasons,
        sample=words.sample,
        num_texts=words.num_texts,
        num_bytes=words.num_bytes,
    )


def learn_alone(kind: Kind, counts: Mapping[str, int], num_pieces: int, min_frequency: int) -> LearnedPieces:
    """Learn a vocabulary of about ``num_pieces`` pieces, beside bytes and special tokens, from words alone.

    Args:
        kind: family of the tokenizer that the pieces are for.
        counts: words, spelled as that family spells pieces, with their frequency.
        num_pieces: how many to learn; the text may give fewer.
        min_frequency: a piece that is built less often is rare.
    """
    learn = _learn_byte_level if kind == "byte_level" else _learn_sentencepiece
    bare, scores = learn(counts, num_pieces)
    frequency = count_builds(bare, counts)
    rare = [piece for piece in scores if frequency[piece] < min_frequency]
    spell = from_letters if kind == "byte_level" else str.encode
    return LearnedPieces(
        scores={spell(piece): score for piece, score in scores.items()},
        rare=frozenset(map(spell, rare)),
        # The most frequent merges are learned first; characters come along however rare they are.
        is_exhausted=len(scores) < num_pieces or any(len(piece) > 1 for piece in rare),
    )


def _learn_sentencepiece(counts: Mapping[str, int], num_pieces: int) -> tuple[Tokenizer, dict[str, float]]:
    model = train_on_words(counts, num_pieces)
    ids = {piece.text: index for index, piece in enumerate(model.pieces)}
    order = list_by_score(model)
    merges = list_merges(order, {text: ids[text] for text in order})
    bare = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    return bare, {piece.text: piece.score for piece in model.pieces if piece.kind == NORMAL}


def _learn_byte_level(counts: Mapping[str, int], num_pieces: int) -> tuple[Tokenizer, dict[str, float]]:
    # The words are cut already, so this tokenizer needs no pre-tokenizer: every text it reads is one word.
    letters = sorted(byte_letters().values())
    bare = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=len(letters) + num_pieces,
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        max_token_length=4 * MAX_PIECE_CHARACTERS,
        show_progress=False,
    )
    bare.train_from_iterator(chain.from_iterable(repeat(word, count) for word, count in counts.items()), trainer)
    ids = sorted(bare.get_vocab().items(), key=lambda item: item[1])
    return bare, {piece: -float(index) for piece, index in ids[len(letters) :]}
