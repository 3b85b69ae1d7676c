import dataclasses
from collections import Counter

import orjson
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from megatron_adapt.errors import ConfigError, DataError
from megatron_adapt.tokenizer.id_map import map_ids
from megatron_adapt.tokenizer.pieces import piece_bytes, read_tokenizer
from megatron_adapt.vocab.align import count_segments, weigh_segments
from megatron_adapt.vocab.fill import plan_fill
from tests.helpers.tiny import write_byte_tokenizer
from tests.tokenizer.bases import write_corpus
from tests.vocab.matrices import Rows, collect, make_sources


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """An old tokenizer that merges a b, and a new one that merges b c instead, and then b c d."""
    root = tmp_path_factory.mktemp("align")
    own = write_byte_tokenizer(root / "own", merges=[("a", "b")])
    made = write_byte_tokenizer(root / "made", merges=[("b", "c"), ("bc", "d")])
    return read_tokenizer(own), read_tokenizer(made)


def names(tokenizer, run):
    return tuple(tokenizer.tokenizer.id_to_token(index) for index in run)


def test_the_pieces_under_a_token_are_those_that_overlap_it_in_the_text(pair):
    own, made = pair
    bc = made.tokenizer.token_to_id("bc")
    segments = count_segments(own, made, {bc}, ["abc bc", "abc é<s>", "bcd"])
    assert set(segments) == {bc}
    assert {names(own, run): count for run, count in segments[bc].items()} == {("ab", "c"): 2, ("b", "c"): 1}


@given(st.lists(st.text("abcd é", max_size=12), min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_every_occurrence_counts_once_and_its_pieces_cover_it_without_a_spare_one(pair, texts):
    own, made = pair
    new_ids = {made.tokenizer.token_to_id(piece) for piece in ("bc", "bcd")}
    segments = count_segments(own, made, new_ids, texts)
    seen = Counter(index for text in texts for index in made.tokenizer.encode(text).ids if index in new_ids)
    assert {new: counts.total() for new, counts in segments.items()} == seen
    old_bytes, new_bytes = piece_bytes(own), piece_bytes(made)
    for new, counts in segments.items():
        for run in counts:
            data = b"".join(old_bytes[old] for old in run)
            start = data.find(new_bytes[new])
            assert start >= 0
            assert start < len(old_bytes[run[0]])
            assert len(data) - start - len(new_bytes[new]) < len(old_bytes[run[-1]])


def test_pieces_weigh_their_share_of_each_run_by_its_frequency():
    assert weigh_segments(Counter({(5, 6): 2, (7, 6): 1, (8,): 1})) == pytest.approx(
        {5: 1 / 4, 6: 3 / 8, 7: 1 / 8, 8: 1 / 4}
    )


def make_align_sources(pair, corpus):
    own, made = pair
    sources = make_sources({}, own.vocab_size, method="align")
    return dataclasses.replace(sources, id_map=map_ids(own, made), own=own, made=made, corpus=(corpus,))


def test_rows_follow_the_corpus_and_tokens_it_lacks_take_the_subtoken_mean(pair, tmp_path, caplog):
    own, made = pair
    fill = plan_fill(make_align_sources(pair, write_corpus(tmp_path / "x.jsonl", ["abc", "abc", "bc", "a"])))
    rows_VH = torch.randn(own.vocab_size, 4)
    ids, rows = collect(fill, Rows(rows_VH))
    assert names(made, ids) == ("bc", "bcd")
    ab, b, c, d = (rows_VH[own.tokenizer.token_to_id(piece)] for piece in ("ab", "b", "c", "d"))
    assert torch.allclose(rows[0], (2 * (ab + c) / 2 + (b + c) / 2) / 3, atol=1e-6)
    assert torch.allclose(rows[1], (b + c + d) / 3, atol=1e-6)
    assert "input matrix: 1 of 2 new tokens have no row by align; 1 take the mean of their old pieces" in caplog.text


def test_texts_that_the_two_normalise_differently_are_left_out_and_counted(pair, tmp_path, caplog):
    own, made = pair
    lower = read_tokenizer(made.folder)
    lower.tokenizer.normalizer = normalizers.Lowercase()
    bc = made.tokenizer.token_to_id("bc")
    assert count_segments(own, lower, {bc}, ["bc", "BC bc"])[bc].total() == 1
    assert "align: 1 of 2 texts left out, normalised differently" in caplog.text
    with pytest.raises(
        DataError, match=r"corpus: none of its 1 texts is the same for .* and .*; name documents in the"
    ):
        count_segments(own, lower, {bc}, ["BC"])
    with pytest.raises(DataError, match="corpus: none of its 0 texts"):
        count_segments(own, made, {bc}, [])


def test_the_corpus_and_the_models_tokenizer_must_be_there(pair, tmp_path):
    with pytest.raises(DataError, match="missing"):
        plan_fill(make_align_sources(pair, tmp_path / "missing.jsonl"))
    (tmp_path / "x.jsonl").write_bytes(orjson.dumps({"other": 1}))
    with pytest.raises(DataError, match="no key 'text'"):
        plan_fill(make_align_sources(pair, tmp_path / "x.jsonl"))
    with pytest.raises(ConfigError, match="align reads the model's own tokenizer"):
        plan_fill(dataclasses.replace(make_align_sources(pair, tmp_path / "x.jsonl"), own=None))
