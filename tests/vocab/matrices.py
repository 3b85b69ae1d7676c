"""Old rows in memory, and sources that need no tokenizer."""

import torch

from megatron_adapt.config import VocabSettings
from megatron_adapt.tokenizer.id_map import IdMap
from megatron_adapt.vocab.fill import plan_fill
from megatron_adapt.vocab.rows import FillSources


class Rows:
    """``BaseRows`` of a tensor."""

    def __init__(self, rows_VH, is_head=False):
        self.rows_VH, self.is_head, self.num_rows = rows_VH, is_head, len(rows_VH)

    def read(self, start, stop):
        return self.rows_VH[start:stop]

    def gather(self, ids):
        return self.rows_VH[list(ids)]

    def mean(self):
        return self.rows_VH.double().mean(0)


def make_sources(pieces, num_olds, **settings):
    id_map = IdMap(base_vocab_size=num_olds, vocab_size=num_olds + len(pieces), moved={}, pieces=dict(pieces))
    return FillSources(id_map=id_map, settings=VocabSettings(**settings))


def collect(fill, base):
    """Run a fill on a matrix: ids and rows."""
    ids, rows = [], []
    for some_ids, some_rows in fill(base):
        assert some_rows.dtype == torch.float32
        ids += some_ids
        rows.append(some_rows)
    return ids, torch.cat(rows)


def fill_rows(method, rows_VH, pieces, *, is_head=False, **settings):
    """Fill the rows of tokens that have these pieces; ids must come in order."""
    sources = make_sources(pieces, len(rows_VH), method=method, **settings)
    ids, rows = collect(plan_fill(sources), Rows(rows_VH, is_head))
    assert ids == list(pieces)
    return rows
