import gzip
import logging
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import orjson
import pytest
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from megatron_adapt import logs
from megatron_adapt.corpus.documents import DocumentWriter
from megatron_adapt.data.encode import preprocess_data
from megatron_adapt.data.index import bin_path, read_tokens
from megatron_adapt.data.record import read_record, record_path
from megatron_adapt.data.windows import count_windows
from megatron_adapt.errors import ConfigError, DataError
from megatron_adapt.files import read_json
from megatron_adapt.tokenizer.pieces import read_tokenizer
from tests.data.corpora import TEXTS, expect_ids, make_config, make_tokenizer, read_files, write_lines

KEPT = [text for text in TEXTS if text.strip()]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizers") / "plain")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "c.jsonl.zst"
    with DocumentWriter(path) as writer:
        for text in TEXTS:
            writer.write({"text": text})
    return path


@pytest.fixture(scope="module")
def prefix(corpus, tokenizer, tmp_path_factory) -> Path:
    """The output of one worker and one chunk."""
    prefix = tmp_path_factory.mktemp("tokens") / "ja.v1"
    preprocess_data(make_config(corpus, tokenizer=tokenizer, prefix=prefix))
    return prefix


def test_documents_are_read_back_as_the_tokenizer_wrote_them(prefix, tokenizer):
    loaded = read_tokenizer(tokenizer)
    expected = expect_ids(tokenizer, TEXTS)
    dataset = IndexedDataset(str(prefix))
    assert [dataset[at].tolist() for at in range(len(dataset))] == expected
    record = read_record(prefix)
    assert record.documents == len(KEPT) == 303
    assert record.skipped_documents == 2
    assert record.tokens == sum(map(len, expected))
    assert record.bytes == sum(len(text.encode()) for text in KEPT)
    assert (record.tokenizer_fingerprint, record.vocab_size) == (loaded.fingerprint, 300)
    assert record.eod_id == loaded.eos_id == 1
    assert read_json(record_path(prefix))["counts"]["backend"] == "tokenizers"
    assert sorted(path.name for path in prefix.parent.iterdir()) == ["ja.v1.bin", "ja.v1.idx", "ja.v1.stage.json"]


def test_megatrons_dataset_builds_on_the_output(prefix):
    class Tokenizer:
        unique_identifiers = {"class": "test"}  # noqa: RUF012
        vocab_size, eod, pad = 300, 1, -1

    config = GPTDatasetConfig(
        random_seed=1, sequence_length=32, split="1,0,0", blend=([str(prefix)], None), tokenizer=Tokenizer(),
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, mid_level_dataset_surplus=0,
    )  # fmt: skip
    indexed = GPTDataset.build_low_level_dataset(str(prefix), config)
    numbers = np.arange(indexed.sequence_lengths.shape[0], dtype=np.int32)
    dataset = GPTDataset(indexed, str(prefix), numbers, None, Split.train, config)
    file = read_tokens(prefix)
    assert len(dataset) == count_windows(file.num_tokens, 32) > 10
    ends = [-1, *np.flatnonzero(file.tokens_N == 1).tolist()]
    stretches = {tuple(file.tokens_N[a + 1 : b].tolist()) for a, b in pairwise(ends)}
    found = 0
    for at in range(len(dataset)):
        window = dataset[at]["tokens"].tolist()
        for a, b in pairwise(place for place, token in enumerate(window) if token == 1):
            assert tuple(window[a + 1 : b]) in stretches
            found += 1
    assert found > 100


@pytest.mark.parametrize(
    "settings",
    [{"workers": 3, "partitions": 20}, {"workers": 2, "partitions": 1}, {"partitions": 400}],
    ids=lambda settings: "-".join(f"{name}{value}" for name, value in settings.items()),
)
def test_workers_and_chunks_do_not_show(corpus, tokenizer, prefix, tmp_path, settings):
    preprocess_data(make_config(corpus, tokenizer=tokenizer, prefix=tmp_path / "p", **settings))
    assert read_files(tmp_path / "p") == read_files(prefix)
    assert read_record(tmp_path / "p") == read_record(prefix)


@pytest.mark.parametrize("kind", ["plain", "gzip", "three files"])
def test_the_same_documents_give_the_same_output(tokenizer, prefix, tmp_path, kind):
    paths = [write_lines(tmp_path / "c.jsonl", TEXTS)]
    if kind == "gzip":
        paths[0].write_bytes(gzip.compress(paths[0].read_bytes()))
    elif kind == "three files":
        bounds = [0, 3, 4, len(TEXTS)]
        paths = [write_lines(tmp_path / f"{a}", TEXTS[a:b]) for a, b in pairwise(bounds)]
    preprocess_data(make_config(*paths, tokenizer=tokenizer, prefix=tmp_path / "p", workers=2, partitions=9))
    assert read_files(tmp_path / "p") == read_files(prefix)


def test_without_append_eod_no_token_is_added(corpus, tokenizer, tmp_path):
    preprocess_data(make_config(corpus, tokenizer=tokenizer, prefix=tmp_path / "p", append_eod=False))
    expected = [token for ids in expect_ids(tokenizer, TEXTS, eod=False) for token in ids]
    assert read_tokens(tmp_path / "p").tokens_N.tolist() == expected


def test_beginning_token_is_kept_where_the_tokenizer_adds_it(corpus, tmp_path):
    tokenizer = make_tokenizer(tmp_path / "bos", bos=True)
    preprocess_data(make_config(corpus, tokenizer=tokenizer, prefix=tmp_path / "p"))
    file = read_tokens(tmp_path / "p")
    starts = file.starts()
    assert (file.tokens_N[starts[:-1]] == 0).all()
    assert (file.tokens_N[starts[1:] - 1] == 1).all()


def test_several_keys_have_an_output_each(tokenizer, tmp_path):
    path = tmp_path / "c.jsonl"
    rows = [{"text": f"text {n}", "title": "" if n % 3 else f"title {n}"} for n in range(60)]
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    config = make_config(
        path, tokenizer=tokenizer, prefix=tmp_path / "p", json_keys=("text", "title"), workers=2, partitions=7
    )
    records = preprocess_data(config)
    for key in ("text", "title"):
        dataset = IndexedDataset(str(tmp_path / f"p_{key}"))
        expected = expect_ids(tokenizer, [row[key] for row in rows])
        assert [dataset[at].tolist() for at in range(len(dataset))] == expected
        assert records[key] == read_record(tmp_path / f"p_{key}")
    assert (records["title"].documents, records["title"].skipped_documents) == (20, 40)
    assert not bin_path(tmp_path / "p").exists()


def test_append_eod_without_such_a_token_is_refused(corpus, tmp_path):
    tokenizer = make_tokenizer(tmp_path / "plain", eos=False)
    with pytest.raises(DataError, match=r"plain: the tokenizer has no end-of-document token \(eos_token\)"):
        preprocess_data(make_config(corpus, tokenizer=tokenizer, prefix=tmp_path / "p"))
    assert (
        preprocess_data(make_config(corpus, tokenizer=tokenizer, prefix=tmp_path / "p", append_eod=False))[
            "text"
        ].eod_id
        is None
    )


def test_existing_output_is_kept_unless_overwritten(corpus, tokenizer, tmp_path):
    prefix = tmp_path / "p"
    preprocess_data(make_config(corpus, tokenizer=tokenizer, prefix=prefix))
    before = read_files(prefix)
    with pytest.raises(ConfigError, match=r"p\.bin: exists already; name another prefix or add --overwrite"):
        preprocess_data(make_config(corpus, tokenizer=tokenizer, prefix=prefix, append_eod=False))
    assert read_files(prefix) == before
    preprocess_data(make_config(corpus, tokenizer=tokenizer, prefix=prefix, append_eod=False, overwrite=True))
    assert len(bin_path(prefix).read_bytes()) == len(before[0]) - 2 * 303
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.bin", "p.idx", "p.stage.json"]


def test_settings_of_this_process_are_left_alone(corpus, tokenizer, tmp_path, monkeypatch):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    preprocess_data(make_config(corpus, tokenizer=tokenizer, prefix=tmp_path / "q"))
    assert "TOKENIZERS_PARALLELISM" not in os.environ


def test_progress_tells_speed_documents_tokens_and_time_left(tokenizer, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(logs, "_LINE_EVERY_SECONDS", 0.0)
    path = write_lines(tmp_path / "c.jsonl", TEXTS * 20)
    with caplog.at_level(logging.INFO):
        preprocess_data(make_config(path, tokenizer=tokenizer, prefix=tmp_path / "p", partitions=10))
    *_, last = [message for message in caplog.messages if "tokenising p" in message]
    record = read_record(tmp_path / "p")
    assert last.endswith(f" MB/s of text, {record.documents:,} documents, {record.tokens:,} tokens")
    assert "s left" in last
