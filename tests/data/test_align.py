"""Windows that begin with documents: each token bears loss once, whatever the lengths."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_adapt.data import align
from megatron_adapt.data.align import cut_documents, cut_documents_twin, mask_targets
from megatron_adapt.data.dataset import BlendedWindows
from megatron_adapt.data.megatron_blend import MegatronWindows
from megatron_adapt.data.plan import describe_change
from megatron_adapt.data.stage_plans import plan_stage
from megatron_adapt.errors import ConfigError
from megatron_adapt.run_folder import RunFolder
from tests.data.recipes import SEQ_LENGTH, TOKENS, make_recipe, make_sources, make_stage


def starts_of(lengths):
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


_lengths = st.lists(st.integers(1, 40), min_size=1, max_size=60).filter(lambda lengths: sum(lengths) > 1)


@settings(max_examples=300, deadline=None)
@given(lengths=_lengths, seq_length=st.integers(1, 30))
def test_windows_begin_with_documents_and_give_each_target_once(lengths, seq_length):
    starts_D1 = starts_of(lengths)
    starts_W1 = cut_documents(starts_D1, seq_length)
    np.testing.assert_array_equal(starts_W1, cut_documents_twin(starts_D1, seq_length))
    assert starts_W1[0] == 0
    assert starts_W1[-1] == starts_D1[-1] - 1
    steps_W = np.diff(starts_W1)
    assert (steps_W >= 1).all()
    assert (steps_W <= seq_length).all()
    documents = set(starts_D1.tolist())
    for first, following in zip(starts_W1[:-1].tolist(), starts_W1[1:-1].tolist(), strict=False):
        # Inside a document only if that is longer than the window, and then after a full window.
        inside = following not in documents
        assert not inside or (following - first == seq_length and not documents & set(range(first + 1, following + 1)))


def test_cuts_counted_by_hand():
    # Documents 0-3, 4-6, 7-17 and 18-19, windows of 5 targets.
    assert cut_documents(starts_of([4, 3, 11, 2]), 5).tolist() == [0, 4, 7, 12, 17, 19]
    assert mask_targets(np.array([0, 4, 7, 12]), np.array([1, 0]), 5).tolist() == [
        [True, True, True, False, False],
        [True, True, True, True, False],
    ]


def test_missing_extension_cuts_alike(monkeypatch):
    starts_D1 = starts_of([4, 3, 11, 2])
    expected = cut_documents(starts_D1, 5).tolist()
    monkeypatch.setattr(align, "_csrc", None)
    assert cut_documents(starts_D1, 5).tolist() == expected


@pytest.fixture
def work_dir(tmp_path):
    make_sources(tmp_path)
    return tmp_path


def plan(work_dir, *, aligned=True, **changes):
    recipe = make_recipe(work_dir, make_stage(**changes), train={"align_documents": aligned})
    return plan_stage(recipe, "full")


def open_windows(work_dir, plan, engine=BlendedWindows, *more):
    return engine(plan, {source: RunFolder(work_dir).tokens(source, "train") for source in plan.sources}, *more)


def test_a_run_reads_every_token_with_loss_once_an_epoch(work_dir):
    """Documents of 7 tokens in windows of 10 targets: each window is one document and bears loss on 7 of 10."""
    made = plan(work_dir, tokens=2600, blend={"en": 1.0})
    assert made.available == (-(-TOKENS["en"] // 7),)
    batch = open_windows(work_dir, made).read_windows(0, made.num_windows)
    assert (batch.ids_NT1[:, 0] % 7 == 20000 % 7).all()
    seen = batch.ids_NT1[:, 1:][batch.loss_NT]
    for epoch in range(2):
        ids = batch.ids_NT1[epoch * 129 : (epoch + 1) * 129, 1:][batch.loss_NT[epoch * 129 : (epoch + 1) * 129]]
        assert sorted(ids.tolist()) == list(range(20001, 20000 + TOKENS["en"]))
    assert made.loss_tokens[0] == pytest.approx(len(seen), rel=0.02)
    assert len(seen) < 0.75 * made.num_windows * SEQ_LENGTH


def test_alignment_is_part_of_the_plan(work_dir):
    aligned, plain = plan(work_dir), plan(work_dir, aligned=False)
    assert aligned.plan_hash != plain.plan_hash
    assert describe_change(plain, aligned) == "aligned False, now True"
    with pytest.raises(ConfigError, match=r"megatron cuts documents anywhere; leave out train\.align_documents"):
        open_windows(work_dir, aligned, MegatronWindows, work_dir)
