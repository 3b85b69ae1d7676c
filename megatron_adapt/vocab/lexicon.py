"""Find translations by the rows alone: do new tokens lie near the old tokens that mean the same?

A word is the mean of the input rows of its tokens. Every new word looks for its translation among all old tokens and
the old words of the dictionary, by cosine and by CSLS (Conneau et al. 2018, arXiv 1710.04087), which takes off what
lies near everything: ``2 cos(x, y) - mean cosine of y to its 10 nearest queries``; and every old word among the new.
Precision at k is the share of words whose translation, or one of them, is among the first k; candidates of equal score
stand in any order, and what that gives on average counts. The chance level is that of a random order. A small model
finds next to nothing; how much scores higher than the translation (chance: half of it) shows sooner that rows agree.

1. ``read_dictionary`` or ``cooccurrence.link_words`` gives words with their translations;
2. ``select_entries`` spells them in tokens and leaves out what says nothing of new rows;
3. ``search_words`` scores all queries against chunks of candidates, twice: once for the scores of the translations,
   once to count what scores higher.

Costs: two products of queries x candidates x width; memory of all queries and one chunk of 2048 candidates: 0.45 GB
for 5000 queries at width 4096.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path
from typing import Any

import torch

from megatron_adapt.errors import DataError
from megatron_adapt.files import require_file
from megatron_adapt.tokenizer.pieces import LoadedTokenizer, piece_bytes
from megatron_adapt.vocab.census import Census
from megatron_adapt.vocab.donor import list_surfaces
from megatron_adapt.vocab.norms import scale_to_unit
from megatron_adapt.vocab.rows import BaseRows, combine_rows

Spelling = tuple[int, ...]
RANKS = (1, 5)
_NUM_NEIGHBORS = 10  # as in the paper
_EQUAL = 1e-6  # cosines in fp32


@dataclass(frozen=True, kw_only=True)
class Lexicon:
    """Old words with their translations, spelt in tokens of the model."""

    entries: tuple[tuple[Spelling, Spelling], ...]
    "Spelling of the old word and of the new one; each once."
    left_out: Mapping[str, int]
    """Entries left out. long: a word of too many tokens. no_new_token: the new word is spelt without one, so that its
    rows are the base's. new_token_in_old: the old word is spelt with one."""


def read_dictionary(path: Path) -> list[tuple[str, str]]:
    """Read pairs of words: a line is a word of the old language, a tab, one of the new; blank lines are skipped.

    Raises:
        DataError: the file is missing or not in UTF-8, or a line is no pair.
    """
    require_file(path, "--dictionary")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not in UTF-8 ({error.reason} at byte {error.start}); convert the file") from None
    pairs = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        words = [word.strip() for word in line.split("\t")]
        if len(words) != 2 or not all(words):
            raise DataError(
                f"{path}:{number}: {line!r} is not two words with a tab between; correct or remove the line"
            )
        pairs.append((words[0], words[1]))
    return pairs


def spell_words(tokenizer: LoadedTokenizer, words: Sequence[str]) -> list[Spelling]:
    """Return the ids of each word as it is cut inside a text: behind a space, or without one if that takes fewer."""
    data = piece_bytes(tokenizer)

    def encode(words: list[str]) -> list[Spelling]:
        cut = tokenizer.tokenizer.encode_batch_fast(words, add_special_tokens=False)
        spelt = [tuple(item.ids) for item in cut]
        # A language without spaces has no pieces that begin with one.
        return [ids[1:] if len(ids) > 1 and data[ids[0]] == b" " else ids for ids in spelt]

    bare = encode(list(words))
    if tokenizer.kind == "sentencepiece":  # which puts the space there by itself
        return bare
    return [min(pair, key=len) for pair in zip(encode([f" {word}" for word in words]), bare, strict=True)]


def select_entries(census: Census, pairs: Iterable[tuple[Spelling, Spelling]], max_tokens: int) -> Lexicon:
    """Keep the translations that say something of new rows.

    Raises:
        DataError: there are none.
    """
    left_out = {"long": 0, "no_new_token": 0, "new_token_in_old": 0}
    entries: dict[tuple[Spelling, Spelling], None] = {}
    new = census.id_map.pieces.keys()
    for old_word, new_word in pairs:
        if not 0 < len(old_word) <= max_tokens or not 0 < len(new_word) <= max_tokens:
            left_out["long"] += 1
        elif new.isdisjoint(new_word):
            left_out["no_new_token"] += 1
        elif not new.isdisjoint(old_word):
            left_out["new_token_in_old"] += 1
        else:
            entries[old_word, new_word] = None
    if not entries:
        raise DataError(
            f"--dictionary, --parallel: no translation is left of {sum(left_out.values())} ({left_out['long']} of more "
            f"than {max_tokens} tokens, {left_out['no_new_token']} without a new token, {left_out['new_token_in_old']} "
            "with one in the old word); name translations from the old to the new language"
        )
    return Lexicon(entries=tuple(entries), left_out=left_out)


def search_both(rows: BaseRows, census: Census, lexicon: Lexicon) -> dict[str, dict[str, Any]]:
    """Search the old word of every new one and the reverse: ``search_words`` for ``to_old`` and ``to_new``."""
    surfaces = sorted(list_surfaces(census.made).values())
    new = census.id_map.pieces.keys()
    olds = [(index,) for index in surfaces if index not in new]
    news = [(index,) for index in surfaces if index in new]
    return {
        "to_old": search_words(rows, [(after, before) for before, after in lexicon.entries], olds),
        "to_new": search_words(rows, lexicon.entries, news),
    }


def search_words(
    rows: BaseRows, entries: Sequence[tuple[Spelling, Spelling]], tokens: Sequence[Spelling]
) -> dict[str, Any]:
    """Search the translation of each first word among tokens and the second words.

    Returns:
        ``queries`` and ``candidates``, how many there are, and for ``cosine``, ``csls`` and ``chance`` the precision at
        1 and 5 and the mean share of the other candidates that score higher: ``{"1": ..., "5": ..., "above": ...}``.
    """
    candidates = {spelling: at for at, spelling in enumerate(dict.fromkeys([*tokens, *(gold for _, gold in entries)]))}
    golds: dict[Spelling, set[int]] = {}
    for query, gold in entries:
        golds.setdefault(query, set()).add(candidates[gold])
    owners, places = (
        torch.tensor(side)
        for side in zip(*((at, gold) for at, group in enumerate(golds.values()) for gold in sorted(group)), strict=True)
    )
    best: dict[str, torch.Tensor] = {}
    for start, scores in _score_chunks(rows, list(golds), list(candidates)):
        for kind, scores_NQ in scores.items():
            best_Q = best.setdefault(kind, torch.full((len(golds),), -torch.inf))
            is_here = (places >= start) & (places < start + len(scores_NQ))
            found = scores_NQ[places[is_here] - start, owners[is_here]]
            best_Q.scatter_reduce_(0, owners[is_here], found, "amax")
    ranks = {kind: torch.zeros(2, len(golds), dtype=torch.float64) for kind in best}
    for start, scores in _score_chunks(rows, list(golds), list(candidates)):
        for kind, scores_NQ in scores.items():
            is_here = (places >= start) & (places < start + len(scores_NQ))
            scores_NQ[places[is_here] - start, owners[is_here]] = -torch.inf  # they do not compete with one another
            ranks[kind][0] += (scores_NQ > best[kind] + _EQUAL).sum(0)
            ranks[kind][1] += ((scores_NQ - best[kind]).abs() <= _EQUAL).sum(0)
    total, sizes = len(candidates), [len(group) for group in golds.values()]
    num_others_Q = torch.tensor([max(1, total - size) for size in sizes])
    chances = {
        k: sum(1 - comb(total - size, k) / comb(total, k) for size in sizes) / len(sizes) for k in RANKS if k <= total
    }
    return {
        "queries": len(golds),
        "candidates": total,
        **{
            kind: {
                **{str(k): float(((k - better_Q) / (1 + equal_Q)).clamp(0, 1).mean()) for k in RANKS},
                "above": float(((better_Q + equal_Q / 2) / num_others_Q).mean()),
            }
            for kind, (better_Q, equal_Q) in ranks.items()
        },
        "chance": {**{str(k): chances.get(k, 1.0) for k in RANKS}, "above": 0.5},
    }


def _score_chunks(
    rows: BaseRows, queries: Sequence[Spelling], candidates: Sequence[Spelling]
) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """Yield the number of the first candidate of a chunk, and the scores of the chunk by kind: [n, Q]."""
    queries_QH = torch.cat([scale_to_unit(rows_NH) for _, rows_NH in combine_rows(rows, dict(enumerate(queries)))])
    num_neighbors = min(_NUM_NEIGHBORS, len(queries))
    for ids, rows_NH in combine_rows(rows, dict(enumerate(candidates))):
        cosines_NQ = scale_to_unit(rows_NH) @ queries_QH.T
        nearness_N = cosines_NQ.topk(num_neighbors, dim=1).values.mean(1)
        yield ids[0], {"cosine": cosines_NQ, "csls": 2 * cosines_NQ - nearness_N[:, None]}
