"""A dictionary out of translated documents: old words and new tokens that keep occurring together.

Of an old word in ``n_w`` pairs of documents and a new token in ``n_t``, both in ``n`` of them, the Dice coefficient is
``2 n / (n_w + n_t)``. A word and a token are taken for translations when each is the other's best: the greedy first
step of competitive linking (Melamed 2000, Computational Linguistics 26(2)). An old word is a run of letters, so the old
language must be one that writes spaces.

1. ``_read_pairs`` notes the distinct words and tokens of every pair, at most 200,000 pairs;
2. ``_count_together`` counts those of five pairs and more, in blocks;
3. ``_link_best`` keeps the mutual best of what occurs together in at least five.

Costs: 30,000 pairs of sentences take seconds, 18 with two cores busy otherwise; memory of the distinct pairs of word
and token.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
import numpy.typing as npt
import regex

from megatron_adapt.tokenizer.figures import take_batches
from megatron_adapt.tokenizer.pieces import LoadedTokenizer

_Ids = npt.NDArray[np.int64]
MIN_PAIRS = 5
"Pairs that a word and a token must occur in together."
_MAX_PAIRS = 200_000
_MAX_DISTINCT = 500  # words of a document: a product of both sides is counted
_BLOCK_KEYS = 4_000_000
_WORD = regex.compile(r"\p{L}[\p{L}\p{M}]+")
_NO_LETTERS = regex.compile(r"[^\p{L}\p{M}]*")


def link_words(pairs: Iterable[tuple[str, str]], tokenizer: LoadedTokenizer, texts: dict[int, str]) -> dict[str, int]:
    """Find the new token that each old word keeps occurring with.

    Args:
        pairs: documents in the old language with their translations; read once.
        tokenizer: cuts the translations.
        texts: the new tokens to link, with their text; those without letters are left out.

    Returns:
        The ids by word, the word of the highest Dice coefficient first. A word that is spelt as its token is left out.
    """
    bare = {index: text.strip() for index, text in texts.items() if not _NO_LETTERS.fullmatch(text)}
    words, sides = _read_pairs(pairs, tokenizer, np.isin(np.arange(tokenizer.vocab_size), list(bare)))
    counts = [np.bincount(np.concatenate(side), minlength=1) if side else np.zeros(1, np.int64) for side in sides]
    keys, together = _count_together(sides, [count >= MIN_PAIRS for count in counts])
    keys, together = keys[together >= MIN_PAIRS], together[together >= MIN_PAIRS]
    width = len(counts[1])
    heads, tails = keys // width, keys % width
    dice = 2 * together / (counts[0][heads] + counts[1][tails])
    is_best = _link_best(heads, dice) & _link_best(tails, dice)
    order = np.flatnonzero(is_best)[np.argsort(-dice[is_best], kind="stable")]
    named = list(words)
    found = ((named[heads[at]], int(tails[at])) for at in order)
    return {word: index for word, index in found if word != bare[index]}


def _read_pairs(
    pairs: Iterable[tuple[str, str]], tokenizer: LoadedTokenizer, is_wanted: npt.NDArray[np.bool_]
) -> tuple[dict[str, int], tuple[list[_Ids], list[_Ids]]]:
    """Number the words; return for each pair of documents the numbers of its words, and its wanted tokens."""
    words: dict[str, int] = {}
    sides: tuple[list[_Ids], list[_Ids]] = ([], [])
    olds: list[str] = []

    def split_off(pairs: Iterable[tuple[str, str]]) -> Iterator[str]:
        for old, new in pairs:
            olds.append(old)
            yield new

    for batch in take_batches(split_off(islice(pairs, _MAX_PAIRS))):
        encoded = tokenizer.tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        for old, item in zip(olds, encoded, strict=True):
            found = [words.setdefault(word, len(words)) for word in dict.fromkeys(_WORD.findall(old))]
            sides[0].append(np.array(found[:_MAX_DISTINCT], np.int64))
            tokens = np.unique(np.array(item.ids, np.int64))
            sides[1].append(tokens[is_wanted[tokens]][:_MAX_DISTINCT])
        olds.clear()
    return words, sides


def _count_together(
    sides: tuple[list[_Ids], list[_Ids]], is_frequent: Sequence[npt.NDArray[np.bool_]]
) -> tuple[_Ids, _Ids]:
    """Return word x number of tokens + token of all that occur together, ascending, and in how many pairs they do."""
    width = len(is_frequent[1])
    keys, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
    waiting: list[_Ids] = []

    def merge() -> tuple[_Ids, _Ids]:
        every = np.concatenate([keys, *waiting])
        weights = np.concatenate([counts, np.ones(len(every) - len(keys), np.int64)])
        merged, places = np.unique(every, return_inverse=True)
        return merged, np.bincount(places, weights, minlength=len(merged)).astype(np.int64)

    num_waiting = 0
    for words, tokens in zip(*sides, strict=True):
        words, tokens = words[is_frequent[0][words]], tokens[is_frequent[1][tokens]]
        waiting.append((words[:, None] * width + tokens).ravel())
        num_waiting += len(waiting[-1])
        if num_waiting >= _BLOCK_KEYS:
            keys, counts = merge()
            waiting, num_waiting = [], 0
    return merge()


def _link_best(groups: _Ids, dice: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Tell which entry is the best of its group, of equals the first."""
    order = np.lexsort((-dice, groups))  # stable, so of equals the first
    is_first = np.ones(len(order), bool)
    is_first[1:] = groups[order][1:] != groups[order][:-1]
    is_best = np.zeros(len(order), bool)
    is_best[order[is_first]] = True
    return is_best
