import dataclasses
import multiprocessing
import os
import threading
from pathlib import Path

import orjson
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from megatron_adapt.config import DataSettings, PreprocessData
from megatron_adapt.corpus.documents import DocumentWriter
from megatron_adapt.data import encode
from megatron_adapt.data.encode import TextBatch, encode_batch, preprocess_data
from megatron_adapt.data.index import bin_path, idx_path, read_tokens
from megatron_adapt.data.record import read_record, record_path
from megatron_adapt.errors import ConfigError, DataError
from megatron_adapt.tokenizer.pieces import encode_texts, read_tokenizer

_TEXTS = [
    "the old language",
    "",
    "日本語の文書。" * 40,
    "  \n",
    "naïve café",
    *(f"document {n} of many" for n in range(300)),
]


def _make_tokenizer(folder: Path, *, eos: bool = True, bos: bool = False) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<|begin|>", "<|end|>"] if eos else ["<|begin|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_TEXTS, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
        )
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<|begin|>"} | ({"eos_token": "<|end|>"} if eos else {})
    (folder / "tokenizer_config.json").write_bytes(orjson.dumps(names))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return _make_tokenizer(tmp_path_factory.mktemp("tokenizers") / "plain")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "c.jsonl.zst"
    with DocumentWriter(path) as writer:
        for text in _TEXTS:
            writer.write({"text": text})
    return path


def _config(corpus: Path, tokenizer: Path, prefix: Path, *, workers: int = 1, append_eod: bool = True, **other):
    settings = DataSettings(workers=workers, append_eod=append_eod)
    return PreprocessData(input=(corpus,), tokenizer=tokenizer, output_prefix=prefix, settings=settings, **other)


def test_documents_are_read_back_as_the_tokenizer_wrote_them(corpus, tokenizer, tmp_path):
    record = preprocess_data(_config(corpus, tokenizer, tmp_path / "ja.v1"))
    loaded = read_tokenizer(tokenizer)
    kept = [text for text in _TEXTS if text.strip()]
    expected = [[*ids, loaded.eos_id] for ids in encode_texts(loaded, kept)]
    dataset = IndexedDataset(str(tmp_path / "ja.v1"))
    assert [dataset[at].tolist() for at in range(len(dataset))] == expected
    assert record.documents == len(kept) == 303
    assert record.skipped_documents == 2
    assert record.tokens == sum(map(len, expected))
    assert record.bytes == sum(len(text.encode()) for text in kept)
    assert (record.tokenizer_fingerprint, record.vocab_size) == (loaded.fingerprint, 300)
    assert record.eod_id == loaded.eos_id == 1
    assert read_record(tmp_path / "ja.v1") == record


def test_without_append_eod_no_token_is_added(corpus, tokenizer, tmp_path):
    preprocess_data(_config(corpus, tokenizer, tmp_path / "p", append_eod=False))
    loaded = read_tokenizer(tokenizer)
    assert loaded.tokenizer.decode(read_tokens(tmp_path / "p").tokens_N.tolist()) == "".join(
        text for text in _TEXTS if text.strip()
    )


def test_beginning_token_is_kept_where_the_tokenizer_adds_it(corpus, tmp_path):
    tokenizer = _make_tokenizer(tmp_path / "bos", bos=True)
    preprocess_data(_config(corpus, tokenizer, tmp_path / "p"))
    file = read_tokens(tmp_path / "p")
    starts = file.starts()
    assert (file.tokens_N[starts[:-1]] == 0).all()
    assert (file.tokens_N[starts[1:] - 1] == 1).all()


def test_any_number_of_workers_writes_the_same_bytes(corpus, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "_BATCH_BYTES", 500)
    records = [
        preprocess_data(_config(corpus, tokenizer, tmp_path / f"p{workers}", workers=workers)) for workers in (1, 2, 3)
    ]
    assert records[0] == records[1] == records[2]
    for path in (bin_path, idx_path):
        assert len({path(tmp_path / f"p{workers}").read_bytes() for workers in (1, 2, 3)}) == 1


def test_batch_size_does_not_show(corpus, tokenizer, tmp_path, monkeypatch):
    preprocess_data(_config(corpus, tokenizer, tmp_path / "whole"))
    monkeypatch.setattr(encode, "_BATCH_BYTES", 1)
    preprocess_data(_config(corpus, tokenizer, tmp_path / "single"))
    for path in (bin_path, idx_path):
        assert path(tmp_path / "whole").read_bytes() == path(tmp_path / "single").read_bytes()


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{'text': 1}", r"c\.jsonl:41: no valid JSON"),
        (b'{"txt": "a"}', r"c\.jsonl:41: no key 'text' \(keys: txt\)"),
        (b'{"text": 7}', r"c\.jsonl:41: 'text' is int, not a string"),
    ],
)
def test_wrong_line_is_named_and_nothing_is_left(tokenizer, tmp_path, monkeypatch, workers, line, message):
    monkeypatch.setattr(encode, "_BATCH_BYTES", 100)
    path = tmp_path / "c.jsonl"
    path.write_bytes(b'{"text": "some good text"}\n' * 40 + line + b"\n")
    with pytest.raises(DataError, match=message):
        preprocess_data(_config(path, tokenizer, tmp_path / "out" / "p", workers=workers))
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("lines", [b"", b'{"text": ""}\n{"text": " "}\n'])
def test_corpus_without_text_is_refused(tokenizer, tmp_path, lines):
    path = tmp_path / "c.jsonl"
    path.write_bytes(lines)
    with pytest.raises(DataError, match=rf"c\.jsonl: no documents \({lines.count(b'text')} empty ones\)"):
        preprocess_data(_config(path, tokenizer, tmp_path / "out" / "p"))
    assert list((tmp_path / "out").iterdir()) == []


def test_missing_input_is_refused_before_any_work(tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"--input: .*none\.jsonl is not a file"):
        preprocess_data(_config(tmp_path / "none.jsonl", tokenizer, tmp_path / "out" / "p"))
    assert not (tmp_path / "out").exists()


def test_append_eod_without_such_a_token_is_refused(corpus, tmp_path):
    tokenizer = _make_tokenizer(tmp_path / "plain", eos=False)
    with pytest.raises(DataError, match=r"plain: the tokenizer has no end-of-document token \(eos_token\)"):
        preprocess_data(_config(corpus, tokenizer, tmp_path / "p"))
    assert preprocess_data(_config(corpus, tokenizer, tmp_path / "p", append_eod=False)).eod_id is None


def test_existing_output_is_kept_unless_overwritten(corpus, tokenizer, tmp_path):
    prefix = tmp_path / "p"
    preprocess_data(_config(corpus, tokenizer, prefix))
    before = bin_path(prefix).read_bytes()
    with pytest.raises(ConfigError, match=r"p\.bin: exists already; name another prefix or add --overwrite"):
        preprocess_data(_config(corpus, tokenizer, prefix, append_eod=False))
    assert bin_path(prefix).read_bytes() == before
    preprocess_data(_config(corpus, tokenizer, prefix, append_eod=False, overwrite=True))
    assert len(bin_path(prefix).read_bytes()) == len(before) - 2 * 303
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.bin", "p.idx", "p.stage.json"]


def test_failure_of_the_tokenizer_names_the_place(tokenizer):
    class Broken:
        def encode_batch_fast(self, texts):
            raise Exception("index out of range")

    broken = dataclasses.replace(read_tokenizer(tokenizer), tokenizer=Broken())
    with pytest.raises(DataError, match=r"c\.jsonl:7: the tokenizer failed on this or one of the next 1 documents"):
        encode_batch(broken, TextBatch("c.jsonl:7", ["a", "b"], 2, 0), None)


def test_ended_worker_is_one_line(corpus, tokenizer, tmp_path, monkeypatch):
    collect = encode._collect_batches
    # The engine keeps a process of its own, once a test of this session has saved a checkpoint.
    others = multiprocessing.active_children()

    def end_workers(paths, text_key):
        for number, batch in enumerate(collect(paths, text_key)):
            if number == 3:
                for child in set(multiprocessing.active_children()).difference(others):
                    child.kill()
                    child.join()
            yield batch

    monkeypatch.setattr(encode, "_BATCH_BYTES", 300)
    monkeypatch.setattr(encode, "_collect_batches", end_workers)
    with pytest.raises(DataError, match="--workers: one of 2 processes was ended from outside"):
        preprocess_data(_config(corpus, tokenizer, tmp_path / "out" / "p", workers=2))
    assert list((tmp_path / "out").iterdir()) == []
    assert threading.active_count() < 10


def test_settings_of_this_process_are_left_alone(corpus, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    preprocess_data(_config(corpus, tokenizer, tmp_path / "p"))
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"
    monkeypatch.delenv("TOKENIZERS_PARALLELISM")
    preprocess_data(_config(corpus, tokenizer, tmp_path / "q"))
    assert "TOKENIZERS_PARALLELISM" not in os.environ


def test_failed_overwriting_keeps_files_and_record(corpus, tokenizer, tmp_path):
    prefix = tmp_path / "p"
    preprocess_data(_config(corpus, tokenizer, prefix))
    empty = tmp_path / "c.jsonl"
    empty.write_bytes(b"")
    with pytest.raises(DataError, match="no documents"):
        preprocess_data(_config(empty, tokenizer, prefix, overwrite=True))
    assert record_path(prefix).is_file()
    assert read_tokens(prefix).num_documents == read_record(prefix).documents
