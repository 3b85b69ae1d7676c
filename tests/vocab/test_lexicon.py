"""Dictionaries, spelling and the search for translations, on rows made by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_adapt.errors import DataError
from megatron_adapt.tokenizer.id_map import IdMap
from megatron_adapt.tokenizer.pieces import read_tokenizer
from megatron_adapt.vocab import rows
from megatron_adapt.vocab.census import Census
from megatron_adapt.vocab.lexicon import (
    read_dictionary,
    search_both,
    search_words,
    select_entries,
    spell_words,
)
from tests.helpers.tiny import write_byte_tokenizer, write_extended_tokenizer
from tests.tokenizer.bases import learn_base
from tests.vocab.matrices import Rows

E1, E2, E3 = torch.eye(3)


def make_census(num_old, num_new):
    new = range(num_old, num_old + num_new)
    id_map = IdMap(
        base_vocab_size=num_old, vocab_size=num_old + num_new, moved={}, pieces={index: [0] for index in new}
    )
    kept = np.arange(num_old)
    return Census(base=None, made=None, id_map=id_map, kept=kept, kept_before=kept, new=np.array(new))


# ---------------------------------------------------------------- dictionaries


def test_a_dictionary_is_pairs_of_words(tmp_path):
    path = tmp_path / "words.tsv"
    path.write_text("cat\t猫\n\nblack cat \t 黒猫\ncat\tネコ\n", encoding="utf-8")
    assert read_dictionary(path) == [("cat", "猫"), ("black cat", "黒猫"), ("cat", "ネコ")]


@pytest.mark.parametrize("line", ["cat 猫", "cat\t", "cat\t猫\tneko"])
def test_a_line_that_is_no_pair_is_named(tmp_path, line):
    path = tmp_path / "words.tsv"
    path.write_text(f"dog\t犬\n{line}\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"words.tsv:2: 'cat.* is not two words with a tab between; correct or remove"):
        read_dictionary(path)


def test_a_dictionary_must_be_there_and_in_utf8(tmp_path):
    with pytest.raises(DataError, match=r"--dictionary: .*words.tsv is not a file; check the path"):
        read_dictionary(tmp_path / "words.tsv")
    (tmp_path / "words.tsv").write_bytes("cat\t猫".encode("shift_jis"))
    with pytest.raises(DataError, match=r"words.tsv: not in UTF-8 \(invalid start byte at byte 4\); convert the file"):
        read_dictionary(tmp_path / "words.tsv")


# ---------------------------------------------------------------- spelling


def test_byte_level_words_are_spelt_behind_a_space_unless_that_takes_more(tmp_path):
    base = write_byte_tokenizer(tmp_path / "base", 258)
    made = write_extended_tokenizer(base, tmp_path / "made", [("Ġ", "t"), ("Ġt", "o"), ("x", "y"), ("xy", "z")])
    tokenizer = read_tokenizer(made)
    names = [
        [tokenizer.tokenizer.id_to_token(index) for index in ids] for ids in spell_words(tokenizer, ["to", "xyz", "t"])
    ]
    assert names == [["Ġto"], ["xyz"], ["Ġt"]]


def test_sentencepiece_words_lose_a_space_that_stands_alone(tmp_path):
    tokenizer = learn_base(tmp_path / "base", "sentencepiece")
    the, kana, space = spell_words(tokenizer, ["the", "ド", " "])
    assert len(the) == 1
    assert tokenizer.tokenizer.id_to_token(the[0]) == "▁the"
    assert [tokenizer.tokenizer.id_to_token(index) for index in kana] == ["<0xE3>", "<0x83>", "<0x89>"]
    assert space


# ---------------------------------------------------------------- entries


def test_entries_that_say_nothing_of_new_rows_are_left_out_and_counted():
    census = make_census(4, 3)
    pairs = [
        ((0,), (4,)),
        ((0,), (4,)),
        ((0, 1), (4, 2)),
        ((0, 1, 2), (5,)),
        ((0,), (4, 5, 6)),
        ((), (4,)),
        ((0,), (1, 2)),
        ((5,), (6,)),
    ]
    found = select_entries(census, pairs, max_tokens=2)
    assert found.entries == (((0,), (4,)), ((0, 1), (4, 2)))
    assert found.left_out == {"long": 3, "no_new_token": 1, "new_token_in_old": 1}


def test_a_dictionary_that_matches_nothing_is_refused():
    message = (
        r"--dictionary, --parallel: no translation is left of 3 \(1 of more than 2 tokens, 1 without a new token, "
        r"1 with one in the old word\); name translations"
    )
    with pytest.raises(DataError, match=message):
        select_entries(make_census(4, 3), [((0,) * 3, (4,)), ((0,), (1,)), ((5,), (6,))], max_tokens=2)
    with pytest.raises(DataError, match=r"no translation is left of 0 \("):
        select_entries(make_census(4, 3), [], max_tokens=2)


# ---------------------------------------------------------------- search


def test_a_translation_is_found_where_the_mean_of_its_rows_is_nearest():
    # The first query lies on the mean of 2 and 3, nearer than on either; the second is nearest to a wrong token.
    rows_VH = torch.stack([E1 + E2, E3, 2 * E1, 2 * E2, E3 + 0.1 * E1, E2 - E3])
    found = search_words(Rows(rows_VH), [((0,), (2, 3)), ((1,), (5,))], [(2,), (3,), (4,)])
    assert (found["queries"], found["candidates"]) == (2, 5)
    # Nothing scores higher than the first translation, all four others than the second.
    assert found["cosine"] == {"1": 0.5, "5": 1, "above": 0.5}
    assert found["chance"] == {"1": pytest.approx(1 / 5), "5": 1, "above": 0.5}


def test_csls_takes_off_what_is_near_everything():
    # Candidate 2 is a hub between both queries, nearer to each than its translation 3 or 4.
    rows_VH = torch.tensor([[1.0, 0.2, 0], [0.2, 1, 0], [1, 1, 0], [1, -0.5, 0], [-0.5, 1, 0]])
    entries = [((0,), (3,)), ((1,), (4,))]
    found = search_words(Rows(rows_VH), entries, [(2,)])
    unit = torch.nn.functional.normalize(rows_VH)
    cosines = unit[:2] @ unit[2:].T
    assert cosines[0, 0] > cosines[0, 1]
    scores = 2 * cosines - cosines.mean(0)
    assert scores[0, 1] > scores[0, 0]
    assert found["cosine"]["1"] == 0
    assert found["csls"]["1"] == 1


def test_equal_candidates_count_for_their_chance():
    # New rows that are all alike, as method "mean" makes them, find nothing beyond chance.
    rows_VH = torch.stack([E1, *[E1 + E2] * 20])
    found = search_words(Rows(rows_VH), [((0,), (3,))], [(index,) for index in range(1, 21)])
    assert found["cosine"] == found["csls"] == pytest.approx({"1": 1 / 20, "5": 5 / 20, "above": 1 / 2})
    assert found["chance"] == pytest.approx(found["cosine"])


def test_rows_that_are_zero_or_not_finite_find_only_by_chance():
    rows_VH = torch.stack([torch.zeros(3), torch.full((3,), torch.nan), E1, E2, E3, E1 + E2])
    found = search_words(Rows(rows_VH), [((0,), (2,)), ((1,), (3,))], [(2,), (3,), (4,), (5,)])
    assert found["cosine"]["1"] == pytest.approx(1 / 4)


def test_a_word_of_several_translations_needs_one_of_them():
    rows_VH = torch.stack([E1, E1 + 0.1 * E2, E1 + 0.2 * E2, E3])
    found = search_words(Rows(rows_VH), [((0,), (1,)), ((0,), (3,))], [(2,)])
    assert (found["queries"], found["candidates"], found["cosine"]["1"]) == (1, 3, 1)
    assert found["chance"]["1"] == pytest.approx(2 / 3)
    # The other translation, which is as near as the first, does not stand in its way.
    rows_VH = torch.stack([E1, E1, E1, E3])
    assert search_words(Rows(rows_VH), [((0,), (1,)), ((0,), (2,))], [(3,)])["cosine"]["1"] == 1


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(1, 9))
def test_chunks_do_not_change_what_is_found_and_ranks_are_those_of_a_full_sort(seed, chunk):
    rows_VH = torch.randn(40, 4, generator=torch.Generator().manual_seed(seed))
    entries = [((index,), (index + 20,)) for index in range(20)]
    candidates = [(index,) for index in range(20, 40)]
    whole = search_words(Rows(rows_VH), entries, candidates)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "CHUNK_ROWS", chunk)
        assert search_words(Rows(rows_VH), entries, candidates) == whole
    unit = torch.nn.functional.normalize(rows_VH)
    ranks = (unit[:20] @ unit[20:].T).argsort(dim=1, descending=True)
    for count in (1, 5):
        hits = (ranks[:, :count] == torch.arange(20)[:, None]).any(1)
        assert whole["cosine"][str(count)] == pytest.approx(hits.double().mean().item())
    places = (ranks == torch.arange(20)[:, None]).nonzero()[:, 1]
    assert whole["cosine"]["above"] == pytest.approx(places.double().mean().item() / 19)


def test_both_directions_search_the_tokens_of_the_other_side(tmp_path):
    base = read_tokenizer(write_byte_tokenizer(tmp_path / "base", 260))
    made = read_tokenizer(write_extended_tokenizer(base.folder, tmp_path / "made", [("x", "y"), ("xy", "z")]))
    census = Census.of(base, made)
    rows_VH = torch.randn(262, 8, generator=torch.Generator().manual_seed(0))
    rows_VH[260] = rows_VH[258]
    lexicon = select_entries(census, [((258,), (260,)), ((258, 259), (261,))], 2)
    found = search_both(Rows(rows_VH), census, lexicon)
    # Of 260 old ids two are special and 128 are no whole characters; a word of two tokens comes on top.
    assert (found["to_old"]["queries"], found["to_old"]["candidates"]) == (2, 130 + 1)
    assert (found["to_new"]["queries"], found["to_new"]["candidates"]) == (2, 2)
    assert found["to_old"]["cosine"]["1"] >= 0.5
