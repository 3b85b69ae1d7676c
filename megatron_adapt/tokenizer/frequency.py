"""How often a BPE tokenizer builds each of its pieces while it cuts the words of a corpus.

A piece is built where it comes out as a token, and also inside every longer token that it is a part of: that is the
frequency at which BPE learned it. The parts of a piece are built at least as often as the piece and merge before it,
so the most frequent pieces, ties in the order of the merges, can always be built from one another.
Costs: a second for 300,000 distinct words, and one for 10,000 distinct tokens.
"""

from collections import Counter
from collections.abc import Mapping
from itertools import islice

import orjson
from tokenizers import Tokenizer

from megatron_adapt.tokenizer.pieces import split_merges

_BATCH_WORDS = 1 << 14


def count_uses(bare: Tokenizer, counts: Mapping[str, int]) -> Counter[int]:
    """Count how often each id comes out; the arguments are those of ``count_builds``, of any algorithm."""
    uses: Counter[int] = Counter()
    words = iter(counts.items())
    while batch := dict(islice(words, _BATCH_WORDS)):
        for item, count in zip(bare.encode_batch_fast(list(batch)), batch.values(), strict=True):
            for index in item.ids:
                uses[index] += count
    return uses


def count_builds(bare: Tokenizer, counts: Mapping[str, int]) -> Counter[str]:
    """Count the pieces that a tokenizer builds from words.

    Args:
        bare: a BPE without normaliser and pre-tokenizer (``words.strip_tokenizer``).
        counts: words, spelled as the tokenizer spells pieces, with their frequency.

    Returns:
        Frequency of every piece built: single characters first, then in the order of the merges.
    """
    ranks: dict[tuple[str, str], int] = {}
    for pair in split_merges(orjson.loads(bare.to_str())["model"]["merges"]):
        ranks.setdefault(pair, len(ranks))
    builds: Counter[str] = Counter()
    for index, count in count_uses(bare, counts).items():
        token = bare.id_to_token(index)
        for piece in _list_built(token, ranks) if token else ():
            builds[piece] += count
    places = {left + right: rank for (left, right), rank in reversed(ranks.items())}
    order = sorted(builds, key=lambda piece: (len(piece) > 1, places.get(piece, -1), bare.token_to_id(piece)))
    return Counter({piece: builds[piece] for piece in order})


def _list_built(piece: str, ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """List everything that exists at some time while the merges build a piece, itself and its characters included.

    Nothing for a token that merges do not make, such as a byte that SentencePiece falls back to.
    """
    parts = list(piece)
    built = list(parts)
    while len(parts) > 1:
        at = min(range(len(parts) - 1), key=lambda at: ranks.get((parts[at], parts[at + 1]), len(ranks)))
        if (parts[at], parts[at + 1]) not in ranks:
            return []
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        built.append(parts[at])
    return built
