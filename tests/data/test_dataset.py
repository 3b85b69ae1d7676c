from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_adapt.data import dataset
from megatron_adapt.data.dataset import BlendedWindows, ValidationWindows
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
    ids_NT1, sources_N = windows.read_windows(0, len(windows))
    assert ids_NT1.shape == (200, _T + 1)
    assert ids_NT1.dtype == np.int64
    assert (np.diff(ids_NT1, axis=1) == 1).all()
    first_N = ids_NT1[:, 0] - np.where(sources_N == 1, 500, 0)
    assert (first_N % _T == 0).all()
    assert (ids_NT1[:, 0] >= 500).tolist() == (sources_N == 1).tolist()


def test_token_totals_and_epochs_are_those_of_the_plan(prefixes):
    windows = BlendedWindows(_plan(), prefixes)
    ids_NT1, sources_N = windows.read_windows(0, len(windows))
    assert np.bincount(sources_N).tolist() == [150, 50]
    ja = ids_NT1[sources_N == 0, 0]
    for epoch in range(7):  # 150 windows are 7.5 passes over 20
        assert sorted(ja[epoch * 20 : epoch * 20 + 20]) == list(range(0, 200, _T))


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, 200), max_size=8), block=st.sampled_from([1, 7, 64, 1 << 14]))
def test_any_way_of_reading_gives_the_same_run(prefixes, cuts, block):
    whole, sources = BlendedWindows(_plan(), prefixes).read_windows(0, 200)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "_BLOCK", block)
        windows = BlendedWindows(_plan(), prefixes)
        for first, last in zip([0, *sorted(cuts)], [*sorted(cuts), 200], strict=True):
            ids, found = windows.read_windows(first, last - first)
            np.testing.assert_array_equal(ids, whole[first:last])
            np.testing.assert_array_equal(found, sources[first:last])


@pytest.mark.parametrize("block", [1, 8, 50, 1 << 14])
def test_windows_read_so_far_are_counted_at_every_place(prefixes, monkeypatch, block):
    monkeypatch.setattr(dataset, "_BLOCK", block)
    windows = BlendedWindows(_plan(), prefixes)
    sources_N = windows.read_windows(0, 200)[1]
    for place in range(201):
        assert windows.count_before(place).tolist() == np.bincount(sources_N[:place], minlength=2).tolist()


def test_longer_run_reads_the_same_windows_of_each_source_first(prefixes):
    short, long = (BlendedWindows(_plan(tokens), prefixes).read_windows(0, tokens // _T) for tokens in (800, 4000))
    for source in (0, 1):
        first, second = (ids_NT1[sources_N == source] for ids_NT1, sources_N in (short, long))
        np.testing.assert_array_equal(first, second[: len(first)])


def test_seed_and_data_change_the_order(prefixes, tmp_path):
    first = BlendedWindows(_plan(), prefixes).read_windows(0, 200)[0]
    assert (BlendedWindows(_plan(seed=4), prefixes).read_windows(0, 200)[0] != first).any()
    moved = {"ja": make_tokens(tmp_path / "other", count_up(0, 205)), "en": prefixes["en"]}
    np.testing.assert_array_equal(BlendedWindows(_plan(), moved).read_windows(0, 200)[0], first)
    edited = {"ja": make_tokens(tmp_path / "edited", count_up(1, 205)), "en": prefixes["en"]}
    changed = BlendedWindows(_plan(), edited)
    assert (changed.read_windows(0, 200)[0] - first > 1).any()
    assert changed.data_fingerprints["ja"] != BlendedWindows(_plan(), prefixes).data_fingerprints["ja"]


def test_places_outside_the_plan_are_refused(prefixes):
    windows = BlendedWindows(_plan(), prefixes)
    with pytest.raises(ConfigError, match="windows 196 to 204 lie outside the plan of 200 windows"):
        windows.read_windows(196, 8)


def test_source_without_files_is_refused(prefixes):
    with pytest.raises(ConfigError, match=r"blend\.en: no token files were named"):
        BlendedWindows(_plan(), {"ja": prefixes["ja"]})


def test_data_that_do_not_fit_the_plan_are_refused(prefixes, tmp_path):
    grown = make_tokens(tmp_path / "grown", count_up(0, 300))
    with pytest.raises(DataError, match=r"grown\.bin: 29 windows of 10 tokens where the plan counted 20"):
        BlendedWindows(_plan(), prefixes | {"ja": grown})


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
