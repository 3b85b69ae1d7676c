import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_adapt.data.dataset import BlendedWindows, ValidationWindows
from megatron_adapt.data.index import bin_path, idx_path
from megatron_adapt.data.plan import BlendPlan, make_plan
from megatron_adapt.data.record import record_path
from megatron_adapt.errors import ConfigError, DataError
from tests.data.token_files import count_up, make_tokens

_T = 10


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory) -> dict[str, Path]:
    """Ids tell source and place: ja counts up from 0, en from 500."""
    folder = tmp_path_factory.mktemp("tokens")
    return {
        "ja": make_tokens(folder / "ja", count_up(0, 205)),  # 20 windows, 4 tokens of tail
        "en": make_tokens(folder / "en", count_up(500, 311)),  # 31 windows
    }


def _plan(tokens: int = 2000, seed: int = 3) -> BlendPlan:
    return make_plan(
        {"ja": 0.75, "en": 0.25}, tokens, {"ja": 205, "en": 311}, seq_length=_T, global_batch_size=8, seed=seed
    )


def test_windows_are_slices_of_the_source_with_one_token_of_overlap(prefixes):
    windows = BlendedWindows(_plan(), prefixes)
    ids_NT1, sources_N, _ = windows.read_windows(0, len(windows))
    assert ids_NT1.shape == (200, _T + 1)
    assert ids_NT1.dtype == np.int64
    # Ids count up; a window that reaches the last token goes on at the first one.
    size_N, first_N = np.where(sources_N == 1, 311, 205), np.where(sources_N == 1, 500, 0)
    steps_NT = np.diff(ids_NT1, axis=1)
    assert ((steps_NT == 1) | (steps_NT == 1 - size_N[:, None])).all()
    assert ((ids_NT1 >= first_N[:, None]) & (ids_NT1 < (first_N + size_N)[:, None])).all()


def test_token_totals_and_epochs_are_those_of_the_plan(prefixes):
    windows = BlendedWindows(_plan(), prefixes)
    ids_NT1, sources_N, _ = windows.read_windows(0, len(windows))
    assert np.bincount(sources_N).tolist() == [150, 50]
    targets_NT = ids_NT1[sources_N == 0, 1:]
    assert sorted(targets_NT[:20].ravel()) == list(range(1, 201))
    cuts = set()
    for epoch in range(7):  # 150 windows are 7.5 passes over 20
        read = np.sort(targets_NT[epoch * 20 : epoch * 20 + 20].ravel())
        assert len(np.unique(read)) == 200  # each token once, but the tail of 5
        cuts.add(targets_NT[epoch * 20, 0] % _T)
    assert len(cuts) > 2


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, 200), max_size=8))
def test_any_way_of_reading_gives_the_same_run(prefixes, cuts):
    whole, sources, _ = BlendedWindows(_plan(), prefixes).read_windows(0, 200)
    windows = BlendedWindows(_plan(), prefixes)
    for first, last in zip([0, *sorted(cuts)], [*sorted(cuts), 200], strict=True):
        ids, found, _ = windows.read_windows(first, last - first)
        np.testing.assert_array_equal(ids, whole[first:last])
        np.testing.assert_array_equal(found, sources[first:last])


def test_windows_read_so_far_are_counted_at_every_place(prefixes):
    windows = BlendedWindows(_plan(), prefixes)
    sources_N = windows.read_windows(0, 200)[1]
    for place in range(201):
        assert windows.count_before(place).tolist() == np.bincount(sources_N[:place], minlength=2).tolist()


@pytest.mark.parametrize("shares", [{"ja": 0.75, "en": 0.25}, {"ja": 0.123457, "en": 0.876543}])
def test_a_longer_run_begins_with_the_same_windows(shares, prefixes):
    """From 0.9 epochs of the smaller source to 3.6: the whole order is the same, not only that of each source."""
    available = {"ja": 205, "en": 311}

    def read(tokens):
        plan = make_plan(shares, tokens, available, seq_length=_T, global_batch_size=8, seed=3)
        return BlendedWindows(plan, prefixes).read_windows(0, plan.num_windows)[:2]

    (short, sources), (long, others) = read(240), read(960)
    assert len(long) == 4 * len(short)
    np.testing.assert_array_equal(long[: len(short)], short)
    np.testing.assert_array_equal(others[: len(short)], sources)


def test_a_run_resumed_at_fifty_random_steps_reads_the_same_batches(prefixes):
    plan = _plan(tokens=80_000)
    whole = BlendedWindows(plan, prefixes).read_windows(0, plan.num_windows)[0]
    rng = np.random.default_rng(0)
    reused = BlendedWindows(plan, prefixes)
    for step in rng.integers(0, plan.num_steps, 50).tolist():
        for windows in (BlendedWindows(plan, prefixes), reused):
            np.testing.assert_array_equal(windows.read_windows(step * 8, 8)[0], whole[step * 8 : step * 8 + 8])


def test_an_epoch_reads_each_document_once_but_the_counted_tail(prefixes):
    """Over three epochs of one source: every token is a target three times, less the tails, which differ."""
    plan = make_plan({"en": 1}, 31 * 3 * _T, {"en": 311}, seq_length=_T, global_batch_size=31, seed=5)
    targets_NT = BlendedWindows(plan, prefixes).read_windows(0, 93)[0][:, 1:] - 500
    tails = []
    for epoch in range(3):
        counts = np.bincount(targets_NT[epoch * 31 : (epoch + 1) * 31].ravel(), minlength=311)
        assert counts.max() == 1
        assert (counts == 0).sum() == 1
        tails.append(int(np.flatnonzero(counts == 0)[0]))
    assert tails[0] == 0
    assert len(set(tails)) > 1


def test_seed_and_data_change_the_order(prefixes, tmp_path):
    first = BlendedWindows(_plan(), prefixes).read_windows(0, 200)[0]
    assert (BlendedWindows(_plan(seed=4), prefixes).read_windows(0, 200)[0] != first).any()
    moved = {"ja": make_tokens(tmp_path / "other", count_up(0, 205)), "en": prefixes["en"]}
    np.testing.assert_array_equal(BlendedWindows(_plan(), moved).read_windows(0, 200)[0], first)
    edited = {"ja": make_tokens(tmp_path / "edited", count_up(1, 205)), "en": prefixes["en"]}
    changed = BlendedWindows(_plan(), edited)
    assert (changed.read_windows(0, 200)[0] - first > 1).any()
    assert changed.sources["ja"].fingerprint != BlendedWindows(_plan(), prefixes).sources["ja"].fingerprint


def test_places_outside_the_plan_are_refused(prefixes):
    windows = BlendedWindows(_plan(), prefixes)
    with pytest.raises(ConfigError, match="windows 196 to 204 lie outside the plan of windows 0 to 200"):
        windows.read_windows(196, 8)


def test_source_without_files_is_refused(prefixes):
    with pytest.raises(ConfigError, match=r"blend\.en: no token files were named"):
        BlendedWindows(_plan(), {"ja": prefixes["ja"]})


def test_data_that_do_not_fit_the_plan_are_refused(prefixes, tmp_path):
    grown = make_tokens(tmp_path / "grown", count_up(0, 300))
    with pytest.raises(DataError, match=r"grown\.bin: 29 windows of 10 tokens where the plan counted 20"):
        BlendedWindows(_plan(), prefixes | {"ja": grown})


def test_a_file_of_another_size_is_refused_before_anything_is_read(prefixes, tmp_path):
    cut = make_tokens(tmp_path / "cut", count_up(500, 311))
    os.truncate(bin_path(cut), 600)
    with pytest.raises(DataError, match=r"cut\.bin: 600 bytes are not 311 tokens; a file was changed"):
        BlendedWindows(_plan(), prefixes | {"en": cut})


def test_a_source_is_opened_when_it_is_read(prefixes, tmp_path):
    damaged = make_tokens(tmp_path / "damaged", count_up(500, 311))
    idx_path(damaged).write_bytes(b"no index")
    windows = BlendedWindows(_plan(), prefixes | {"en": damaged})
    assert not windows.read_windows(0, 1).sources_N.any()
    with pytest.raises(DataError, match=r"damaged\.idx: no megatron-core index"):
        windows.read_windows(1, 8)


def test_two_tokenizers_are_refused_by_name(prefixes, tmp_path):
    other = make_tokens(tmp_path / "other", count_up(500, 311), tokenizer="two")
    with pytest.raises(DataError, match=r"other\.bin: made by tokenizer two, but .*ja\.bin by one; tokenise both"):
        BlendedWindows(_plan(), prefixes | {"en": other})


@pytest.mark.parametrize("wrong", [150, -3])
def test_ids_outside_the_vocabulary_are_refused(tmp_path, wrong):
    ids = np.arange(205) % 100
    ids[77] = wrong
    prefix = make_tokens(tmp_path / "ja", [ids], vocab_size=70_000)
    text = record_path(prefix).read_text().replace("70000", "100")
    record_path(prefix).write_text(text)
    plan = make_plan({"ja": 1}, 200, {"ja": 205}, seq_length=_T, global_batch_size=1, seed=1)
    with pytest.raises(DataError, match=rf"ja\.bin: holds id {wrong}, outside the vocabulary of 100"):
        BlendedWindows(plan, {"ja": prefix}).read_windows(0, 20)


def test_missing_or_foreign_record_is_refused(tmp_path):
    prefix = make_tokens(tmp_path / "ja", count_up(0, 205))
    record_path(prefix).write_text('{"counts": {"documents": 3}}')
    with pytest.raises(DataError, match=r"ja\.stage\.json: no counts of skipped_documents, tokens, bytes, tokenizer_"):
        ValidationWindows(prefix, 4, _T)
    record_path(prefix).unlink()
    with pytest.raises(DataError, match=r"ja\.stage\.json: no such file; tokenise the corpus with"):
        ValidationWindows(prefix, 4, _T)


def test_validation_reads_the_first_windows_in_stored_order(prefixes):
    windows = ValidationWindows(prefixes["ja"], 5, _T)
    assert len(windows) == 5
    ids = np.concatenate([windows.read_windows(0, 3), windows.read_windows(3, 3)])
    np.testing.assert_array_equal(ids, np.arange(5)[:, None] * _T + np.arange(_T + 1))
    assert windows.record.bytes_per_token == 3.0


def test_validation_on_a_small_source_uses_all_of_it(prefixes, tmp_path):
    assert len(ValidationWindows(prefixes["ja"], 64, _T)) == 20
    small = make_tokens(tmp_path / "small", count_up(0, 10))
    with pytest.raises(DataError, match=r"small\.bin: 10 tokens are less than one window of 10 \+ 1"):
        ValidationWindows(small, 64, _T)
