import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
from megatron.core.datasets.utils import Split

from megatron_adapt.data.index import bin_path, idx_path, read_tokens, token_dtype, write_tokens
from megatron_adapt.data.windows import count_windows
from megatron_adapt.errors import DataError
from tests.data.token_files import count_up, make_tokens

_documents = st.lists(st.lists(st.integers(0, 999), max_size=20), min_size=1, max_size=20).filter(any)


@settings(max_examples=40, deadline=None)
@given(documents=_documents, vocab_size=st.sampled_from([1000, 65499, 65500, 200_000]))
def test_megatron_reads_every_document_back_equal(tmp_path_factory, documents, vocab_size):
    prefix = make_tokens(
        tmp_path_factory.mktemp("tokens") / "a.b", [np.array(d, int) for d in documents], vocab_size=vocab_size
    )
    dataset = IndexedDataset(str(prefix))
    assert [dataset[at].tolist() for at in range(len(dataset))] == documents
    assert dataset.document_indices.tolist() == list(range(len(documents) + 1))
    assert dataset.index.dtype == (np.uint16 if vocab_size < 65500 else np.int32)


@settings(max_examples=25, deadline=None)
@given(documents=_documents, vocab_size=st.sampled_from([1000, 65500]))
def test_files_are_those_of_megatrons_builder_byte_for_byte(tmp_path_factory, documents, vocab_size):
    folder = tmp_path_factory.mktemp("tokens")
    ours = make_tokens(folder / "ours", [np.array(d, int) for d in documents], vocab_size=vocab_size)
    builder = IndexedDatasetBuilder(str(folder / "theirs.bin"), dtype=DType.optimal_dtype(vocab_size))
    for document in documents:
        builder.add_document(torch.tensor(document, dtype=torch.int64), [len(document)])
    builder.finalize(str(folder / "theirs.idx"))
    assert bin_path(ours).read_bytes() == (folder / "theirs.bin").read_bytes()
    assert idx_path(ours).read_bytes() == (folder / "theirs.idx").read_bytes()


@settings(max_examples=40, deadline=None)
@given(documents=_documents, cut=st.integers(0, 20))
def test_reader_returns_what_was_written_in_any_portions(tmp_path_factory, documents, cut):
    prefix = tmp_path_factory.mktemp("tokens") / "p"
    with write_tokens(prefix, 1000) as writer:
        for part in (documents[:cut], documents[cut:]):
            ids = np.array([token for document in part for token in document], np.uint16)
            writer.add_documents(ids, np.array([len(document) for document in part], np.int32))
    file = read_tokens(prefix)
    starts = file.starts()
    found = [file.tokens_N[a:b].tolist() for a, b in pairwise(starts)]
    assert found == documents
    assert file.lengths().tolist() == [len(document) for document in documents]
    assert (file.num_documents, file.num_tokens) == (len(documents), sum(map(len, documents)))


def test_reader_understands_documents_of_several_sequences(tmp_path):
    builder = IndexedDatasetBuilder(str(tmp_path / "p.bin"), dtype=np.uint16)
    builder.add_document(torch.arange(5), [2, 3])
    builder.add_document(torch.arange(4), [4])
    builder.finalize(str(tmp_path / "p.idx"))
    file = read_tokens(tmp_path / "p")
    assert file.starts().tolist() == [0, 5, 9]
    assert file.tokens_N.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]


def test_megatrons_own_dataset_runs_on_our_files(tmp_path):
    class Tokenizer:
        unique_identifiers = {"class": "test"}  # noqa: RUF012
        vocab_size, eod, pad = 1000, 0, -1

    prefix = make_tokens(tmp_path / "p", count_up(1, 200))
    config = GPTDatasetConfig(
        random_seed=1, sequence_length=16, split="1,0,0", blend=([str(prefix)], None), tokenizer=Tokenizer(),
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, mid_level_dataset_surplus=0,
    )  # fmt: skip
    indexed = GPTDataset.build_low_level_dataset(str(prefix), config)
    numbers = np.arange(indexed.sequence_lengths.shape[0], dtype=np.int32)
    dataset = GPTDataset(indexed, str(prefix), numbers, None, Split.train, config)
    assert len(dataset) == count_windows(200, 16) == 12
    seen = np.concatenate([dataset[at]["tokens"].numpy() for at in range(len(dataset))])
    assert len(set(seen.tolist())) == 12 * 16
    assert set(seen.tolist()) <= set(range(1, 201))


def _fail_while_writing(prefix: Path) -> None:
    with write_tokens(prefix, 1000) as writer:
        writer.add_documents(np.zeros(3, np.uint16), np.array([3], np.int32))
        raise RuntimeError


def test_failure_while_writing_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError):
        _fail_while_writing(tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


def test_failure_while_overwriting_keeps_the_old_files(tmp_path):
    prefix = make_tokens(tmp_path / "p", count_up(0, 20))
    with pytest.raises(RuntimeError):
        _fail_while_writing(prefix)
    assert read_tokens(prefix).tokens_N.tolist() == list(range(20))


def test_index_appears_after_the_ids(tmp_path, monkeypatch):
    renamed = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, target: (renamed.append(target.name), replace(self, target))[1])
    with write_tokens(tmp_path / "p", 1000) as writer:
        writer.add_documents(np.zeros(3, np.uint16), np.array([3], np.int32))
    assert renamed == ["p.bin", "p.idx"]


@pytest.mark.parametrize("vocab_size", [1, 65499, 65500, 65536, 1 << 20])
def test_id_type_is_megatrons(vocab_size):
    assert token_dtype(vocab_size) == DType.optimal_dtype(vocab_size)


def test_cut_off_ids_are_refused(tmp_path):
    prefix = make_tokens(tmp_path / "p", count_up(0, 20))
    bin_path(prefix).write_bytes(bin_path(prefix).read_bytes()[:-2])
    with pytest.raises(DataError, match=r"p\.bin: 38 bytes where p\.idx describes 40.*tokenise the corpus again"):
        read_tokens(prefix)


def test_missing_files_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"p\.idx: no such file; check the prefix"):
        read_tokens(tmp_path / "p")
    bin_path(make_tokens(tmp_path / "q", count_up(0, 20))).unlink()
    with pytest.raises(DataError, match=r"q\.bin: no such file; check the prefix"):
        read_tokens(tmp_path / "q")


def test_index_without_documents_is_refused(tmp_path):
    with write_tokens(tmp_path / "p", 1000):
        pass
    with pytest.raises(DataError, match=r"p\.idx: holds no documents"):
        read_tokens(tmp_path / "p")
    with pytest.raises(DataError, match=r"q\.bin: holds no tokens"):
        read_tokens(make_tokens(tmp_path / "q", [np.empty(0, int)]))


@pytest.mark.parametrize(
    ("at", "change", "message"),
    [
        (0, b"X", r"p\.idx: no megatron-core index"),
        (9, struct.pack("<Q", 2), r"p\.idx: version 2 of the format is unknown"),
        (17, b"\x07", r"p\.idx: type code 7 is neither 4 \(int32\) nor 8 \(uint16\)"),
        (18, struct.pack("<Q", 1 << 62), r"p\.idx: 102 bytes instead of \d+, the file is cut off"),
        (34, struct.pack("<i", 6), r"p\.idx: lengths and places of the documents do not agree"),
        (70, struct.pack("<q", 1), r"p\.idx: its documents do not cover its 3 sequences"),
    ],
)
def test_damaged_index_is_refused(tmp_path, at, change, message):
    prefix = make_tokens(tmp_path / "p", count_up(0, 20))
    data = bytearray(idx_path(prefix).read_bytes())
    data[at : at + len(change)] = change
    idx_path(prefix).write_bytes(data)
    with pytest.raises(DataError, match=message):
        read_tokens(prefix)
