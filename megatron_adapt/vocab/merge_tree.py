"""Method ``merge_tree``: a token is half of each of the two parts that the new tokenizer merges into it.

The parts are old tokens, whose rows are there, or new ones, which are halved in turn (Yamaguchi et al. 2024, arXiv
2406.11477). A part weighs more the later it is merged, where ``subtoken_mean`` weighs all the same. Every matrix takes
its own rows: the head is never made of input rows.

1. ``list_parts`` replays the merges on the token's characters and notes the two parts of everything built.
2. ``weigh_olds`` halves until only old tokens are left. A new character takes the pieces that spelt it. A token that
   the merges do not build has no row by this method.

Costs: the replay takes half a second for 32,000 tokens, once for all matrices.
"""

from collections.abc import Iterator, Mapping, Sequence

import orjson
import torch

from megatron_adapt.errors import ConfigError
from megatron_adapt.tokenizer.pieces import split_merges
from megatron_adapt.tokenizer.words import strip_tokenizer
from megatron_adapt.vocab.rows import BaseRows, Fill, FillSources, combine_rows

Ranks = Mapping[tuple[str, str], int]


def plan_merge_tree(sources: FillSources) -> Fill:
    """Give each token the mean of its two parts, and these theirs, down to old tokens.

    Raises:
        ConfigError: the new tokenizer has no merges.
    """
    made, id_map = sources.require_made(), sources.id_map
    if made.algorithm != "BPE":
        raise ConfigError(
            f"vocab.method: merge_tree needs merges, and {made.folder} is a {made.algorithm}; use subtoken_mean"
        )
    bare = strip_tokenizer(made)
    ranks: dict[tuple[str, str], int] = {}
    for pair in split_merges(orjson.loads(bare.to_str())["model"]["merges"]):
        ranks.setdefault(pair, len(ranks))
    leaves: dict[str, Sequence[int]] = {}
    names: dict[int, str] = {}
    for piece, index in bare.get_vocab(with_added_tokens=False).items():
        old = id_map.old_id(index)
        names[index] = piece
        if old is not None:
            leaves[piece] = [old]
        elif len(piece) == 1:
            leaves[piece] = id_map.pieces[index]
    found = {new: weigh_olds(names.get(new, ""), ranks, leaves) for new in id_map.pieces}
    olds = {new: list(weights) for new, weights in found.items()}
    weights = {new: list(weights.values()) for new, weights in found.items()}

    def fill(base: BaseRows) -> Iterator[tuple[list[int], torch.Tensor]]:
        yield from combine_rows(base, olds, weights)

    return fill


def weigh_olds(piece: str, ranks: Ranks, leaves: Mapping[str, Sequence[int]]) -> dict[int, float]:
    """Return the weight of each old id in a piece; they sum to 1. Nothing where the merges do not build it.

    Args:
        piece: the token, as the tokenizer spells it.
        ranks: order of the merges.
        leaves: pieces that are not halved, with the old ids that stand for each in equal parts.
    """
    parts = list_parts(piece, ranks)
    weights: dict[int, float] = {}
    halved = [(piece, 1.0)]
    while halved:
        part, share = halved.pop()
        if part in leaves:
            for old in leaves[part]:
                weights[old] = weights.get(old, 0.0) + share / len(leaves[part])
        elif part in parts:
            halved += [(half, share / 2) for half in parts[part]]
        else:
            return {}
    return weights


def list_parts(piece: str, ranks: Ranks) -> dict[str, tuple[str, str]]:
    """Return the two parts of everything that the merges build from the characters of a piece."""
    rest = list(piece)
    parts: dict[str, tuple[str, str]] = {}
    while len(rest) > 1:
        at = min(range(len(rest) - 1), key=lambda at: ranks.get((rest[at], rest[at + 1]), len(ranks)))
        pair = rest[at], rest[at + 1]
        if pair not in ranks:
            break
        rest[at : at + 2] = ["".join(pair)]
        parts.setdefault(rest[at], pair)
    return parts
