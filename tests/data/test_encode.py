import gzip
import logging
import lzma
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
from megatron_adapt.data import shuffle
from megatron_adapt.data.encode import preprocess_data
from megatron_adapt.data.index import bin_path, read_tokens
from megatron_adapt.data.prompts import prompts_path, read_prompts
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


@pytest.mark.parametrize("kind", ["plain", "gzip", "xz", "parquet", "text files", "a folder"])
def test_the_same_documents_give_the_same_output(tokenizer, prefix, tmp_path, kind):
    path = tmp_path / "raw" / "c.jsonl"
    path.parent.mkdir()
    config = {"workers": 2, "partitions": 9}
    paths = [path]
    if kind == "parquet":
        table = pytest.importorskip("pyarrow").Table.from_pylist([{"n": at, "text": t} for at, t in enumerate(TEXTS)])
        pytest.importorskip("pyarrow.parquet").write_table(table, path, row_group_size=20)
    elif kind == "text files":
        config["plain_text"] = "file"
        paths = [path.with_name(f"{at}.txt") for at in range(len(TEXTS))]
        for file, text in zip(paths, TEXTS, strict=True):
            file.write_text(text)
    elif kind == "a folder":
        bounds = [0, 3, 4, len(TEXTS)]
        paths = [path.parent]
        for a, b in pairwise(bounds):
            write_lines(path.with_name(f"{a}.jsonl"), TEXTS[a:b])
    else:
        data = write_lines(path, TEXTS).read_bytes()
        path.write_bytes({"plain": bytes, "gzip": gzip.compress, "xz": lzma.compress}[kind](data))
    preprocess_data(make_config(*paths, tokenizer=tokenizer, prefix=tmp_path / "p", **config))
    assert read_files(tmp_path / "p") == read_files(prefix)


def test_paragraphs_of_a_text_are_documents(tokenizer, tmp_path):
    (tmp_path / "c.txt").write_text("\n\n".join(f"{text}\nend" for text in TEXTS[5:]))
    config = {"tokenizer": tokenizer, "plain_text": "paragraphs", "workers": 2}
    preprocess_data(make_config(tmp_path / "c.txt", prefix=tmp_path / "p", partitions=30, **config))
    lines = write_lines(tmp_path / "c.jsonl", [f"{text}\nend" for text in TEXTS[5:]])
    preprocess_data(make_config(lines, prefix=tmp_path / "q", **config))
    assert read_files(tmp_path / "p") == read_files(tmp_path / "q")


def test_bad_rows_and_paragraphs_are_named_and_skipped_by_their_place(tokenizer, tmp_path):
    (tmp_path / "c.txt").write_bytes(b"".join(b"good\n\n" if at != 70 else b"bad \xff\n\n" for at in range(100)))
    config = {"tokenizer": tokenizer, "plain_text": "paragraphs", "partitions": 20}
    with pytest.raises(DataError, match=r"c\.txt:141: no valid JSON .*, or use --on-error skip"):
        preprocess_data(make_config(tmp_path / "c.txt", prefix=tmp_path / "p", **config))
    preprocess_data(make_config(tmp_path / "c.txt", prefix=tmp_path / "p", on_error="skip", **config))
    assert (tmp_path / "p.skipped.txt").read_text().startswith(f"{tmp_path}/c.txt:141: no valid JSON")
    rows = [{"text": "good" if at != 70 else None} for at in range(100)]
    table = pytest.importorskip("pyarrow").Table.from_pylist(rows)
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "c.parquet", row_group_size=8)
    with pytest.raises(DataError, match=r"c\.parquet:71: 'text' is NoneType, not a string"):
        preprocess_data(make_config(tmp_path / "c.parquet", prefix=tmp_path / "q", **config))


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


# ---------------------------------------------------------------- prompts


REQUESTS = [("Translate: one", " eins"), ("", "no prompt at all"), ("Say it again: ", "again"), ("only a prompt", "")]


@pytest.mark.parametrize("workers", [1, 2])
def test_prompts_stand_in_front_and_their_tokens_are_counted(tokenizer, tmp_path, workers):
    path = tmp_path / "c.jsonl"
    lines = [{"prompt": prompt, "text": text} if prompt else {"text": text} for prompt, text in REQUESTS * 50]
    path.write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    make = make_config(path, tokenizer=tokenizer, prefix=tmp_path / "p", prompt_key="prompt", workers=workers)
    preprocess_data(make)
    file = read_tokens(tmp_path / "p")
    loaded = read_tokenizer(tokenizer).tokenizer
    starts, prompts_D = file.starts(), read_prompts(file.prefix, file.num_documents)
    assert len(prompts_D) == file.num_documents == len(lines)
    for at, (prompt, text) in enumerate(REQUESTS):
        ids = file.tokens_N[starts[at] : starts[at + 1]].tolist()
        whole, alone = (loaded.encode(content).ids for content in (prompt + text, prompt))
        assert ids[: len(whole)] == whole
        count = int(prompts_D[at])
        assert count <= len(alone)
        assert whole[:count] == alone[:count]
        assert count == 0 if not prompt else count == len(alone) or whole[count] != alone[count]
    dataset = IndexedDataset(str(tmp_path / "p"))  # its arrays are unmapped with it
    assert dataset[0].tolist() == file.tokens_N[: starts[1]].tolist()


def test_without_prompts_there_is_no_file_and_an_old_one_goes(tokenizer, corpus, tmp_path):
    prompts_path(tmp_path / "p").write_bytes(b"left over")
    preprocess_data(make_config(corpus, tokenizer=tokenizer, prefix=tmp_path / "p", prompt_key="prompt"))
    assert not prompts_path(tmp_path / "p").exists()


def test_a_prompt_that_is_no_text_is_refused(tokenizer, tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_bytes(b'{"text": "x", "prompt": 3}\n')
    with pytest.raises(DataError, match=r"c\.jsonl:1: .*prompt"):
        preprocess_data(make_config(path, tokenizer=tokenizer, prefix=tmp_path / "p", prompt_key="prompt"))


# ---------------------------------------------------------------- shuffled


def list_documents(prefix):
    file = read_tokens(prefix)
    return [file.tokens_N[first:end].tolist() for first, end in pairwise(file.starts().tolist())]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_seed_decides_the_order_of_the_documents_and_nothing_else(prefix, corpus, tokenizer, tmp_path, workers):
    made = {}
    for name, seed in (("a", 1), ("again", 1), ("b", 2)):
        config = make_config(corpus, tokenizer=tokenizer, prefix=tmp_path / name, shuffle_seed=seed, workers=workers)
        preprocess_data(config)
        made[name] = list_documents(tmp_path / name)
    plain = list_documents(prefix)
    assert made["a"] == made["again"] != made["b"]
    assert sorted(made["a"]) == sorted(made["b"]) == sorted(plain)
    assert sum(left == right for left, right in zip(made["a"], plain, strict=True)) < len(plain) / 10
    assert read_record(tmp_path / "a").tokens == read_record(prefix).tokens


def test_prompts_follow_their_documents(tokenizer, tmp_path):
    path = tmp_path / "c.jsonl"
    lines = [{"prompt": "p " * at, "text": f"text {at}"} for at in range(1, 40)]
    path.write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    found = {}
    for name, seed in (("plain", None), ("shuffled", 5)):
        options = {"prompt_key": "prompt", "shuffle_seed": seed}
        preprocess_data(make_config(path, tokenizer=tokenizer, prefix=tmp_path / name, **options))
        prompts_D = read_prompts(tmp_path / name, 39).tolist()
        found[name] = list(zip(list_documents(tmp_path / name), prompts_D, strict=True))
    assert found["plain"] != found["shuffled"]
    assert sorted(found["plain"]) == sorted(found["shuffled"])


def test_a_run_killed_while_it_shuffles_goes_on_to_the_same_bytes(corpus, tokenizer, tmp_path, monkeypatch):
    config = make_config(corpus, tokenizer=tokenizer, prefix=tmp_path / "p", shuffle_seed=3)
    undisturbed = make_config(corpus, tokenizer=tokenizer, prefix=tmp_path / "q", shuffle_seed=3)
    preprocess_data(undisturbed)
    with monkeypatch.context() as patch:
        patch.setattr(shuffle, "permute", interrupt)
        with pytest.raises(KeyboardInterrupt):
            preprocess_data(config)
    assert not bin_path(tmp_path / "p").exists()
    preprocess_data(config)
    assert read_files(tmp_path / "p") == read_files(tmp_path / "q")


def interrupt(*_):
    raise KeyboardInterrupt
