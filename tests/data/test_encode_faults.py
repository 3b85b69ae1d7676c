"""What can be wrong with input, output or machine, and the one line that says so."""

import ctypes
import errno
import gzip
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import orjson
import pytest
import zstandard

from megatron_adapt.data import crew, encode
from megatron_adapt.data.encode import preprocess_data
from megatron_adapt.data.index import read_tokens
from megatron_adapt.data.manifest import lock_folder, unfinished_folder
from megatron_adapt.data.record import read_record, record_path
from megatron_adapt.errors import ConfigError, DataError
from megatron_adapt.files import read_json
from tests.data.corpora import TEXTS, expect_ids, make_config, make_tokenizer, read_files, write_lines

TOOL = Path(__file__).parents[2] / "tools" / "preprocess_data.py"
_PR_CAPBSET_DROP, _CAP_DAC_OVERRIDE = 24, 1
GOOD = b'{"text": "some good text"}\n'
BAD_LINES = {
    "no JSON": (b"{'text': 1}", r"no valid JSON \(.*\); correct or remove the line"),
    "no key": (b'{"txt": "a"}', r"no key 'text' \(keys: txt\); name the key of the text"),
    "no string": (b'{"text": 7}', r"'text' is int, not a string; correct the line"),
    "null": (b'{"text": null}', r"'text' is NoneType, not a string; correct the line"),
    "a list": (b'["text"]', r"a JSON list, not an object; write one object a line"),
    "invalid UTF-8": (b'{"text": "\xff\xfe"}', r"no valid JSON \(.*\); correct or remove the line"),
    "lone surrogate": (rb'{"text": "\ud800"}', r"no valid JSON \(.*\); correct or remove the line"),
    "NUL bytes": (b'{"text": "a' + b"\x00" * 30 + b'"}', r"no valid JSON \(.*\); correct or remove the line"),
    "a hole of NUL bytes": (b"\x00" * 200, r"no valid JSON \(.*\); correct or remove the line"),
    "half a line": (b'{"text": "a', r"no valid JSON \(.*\); correct or remove the line"),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizers") / "plain")


def start_tool(tokenizer: Path, path: Path, prefix: Path, *flags: str, **other) -> subprocess.CompletedProcess:
    command = [
        sys.executable, TOOL, "--input", path, "--tokenizer", tokenizer, "--output-prefix", prefix,
        "--backend", "tokenizers", *flags,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **other)


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_bad_line_is_named_and_nothing_is_left(tokenizer, tmp_path, kind):
    line, message = BAD_LINES[kind]
    path = tmp_path / "c.jsonl"
    path.write_bytes(GOOD * 40 + line + b"\n" + b"{bad too}\n" + GOOD)
    with pytest.raises(DataError, match=rf"c\.jsonl:41: {message}, or use --on-error skip"):
        preprocess_data(make_config(path, tokenizer=tokenizer, prefix=tmp_path / "out" / "p"))
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("packed", ["plain", "gzip"])
def test_the_first_of_several_mistakes_is_named(tokenizer, tmp_path, packed):
    lines = [GOOD] * 4000
    for at in (3999, 1731, 2500):
        lines[at] = b"{bad}\n"
    path = tmp_path / "c.jsonl"
    path.write_bytes(b"".join(lines) if packed == "plain" else gzip.compress(b"".join(lines)))
    for workers in (1, 3):
        config = make_config(path, tokenizer=tokenizer, prefix=tmp_path / "p", workers=workers, partitions=60)
        with pytest.raises(DataError, match=r"c\.jsonl:1732: no valid JSON"):
            preprocess_data(config)


def test_skipped_lines_are_counted_and_listed(tokenizer, tmp_path):
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    lines = [orjson.dumps({"text": text}) + b"\n" for text in TEXTS]
    expected = []
    for path in paths:
        content = list(lines)
        for at, (line, message) in enumerate(BAD_LINES.values()):
            content.insert(20 * at + 3, line + b"\n")
            expected.append((rf"{path}:{20 * at + 4}: ", message))
        path.write_bytes(b"".join(content))
    preprocess_data(
        make_config(*[write_lines(tmp_path / "good", TEXTS * 2)], tokenizer=tokenizer, prefix=tmp_path / "q")
    )
    for number, settings in enumerate(({}, {"workers": 2, "partitions": 30})):
        prefix = tmp_path / f"p{number}"
        preprocess_data(make_config(*paths, tokenizer=tokenizer, prefix=prefix, on_error="skip", **settings))
        listed = prefix.with_name(f"{prefix.name}.skipped.txt").read_text().splitlines()
        assert len(listed) == len(expected) == read_json(record_path(prefix))["counts"]["skipped_lines"]
        assert all(line.startswith(where) for line, (where, _) in zip(listed, expected, strict=True))
        assert read_files(prefix) == read_files(tmp_path / "q")
    assert not (tmp_path / "q.skipped.txt").exists()


def test_a_nul_character_written_as_json_is_text(tokenizer, tmp_path):
    path = write_lines(tmp_path / "c.jsonl", ["a\x00b"])
    assert b"\\u0000" in path.read_bytes()
    preprocess_data(make_config(path, tokenizer=tokenizer, prefix=tmp_path / "p"))
    assert read_tokens(tmp_path / "p").tokens_N.tolist() == expect_ids(tokenizer, ["a\x00b"])[0]


@pytest.mark.parametrize("content", [b"", b"\n \n", b'{"text": ""}\n{"text": " "}\n'])
def test_a_corpus_without_text_is_refused(tokenizer, tmp_path, content):
    path = tmp_path / "c.jsonl"
    path.write_bytes(content)
    message = rf"c\.jsonl: no documents under 'text' \({content.count(b'text')} empty ones, 0 lines skipped\)"
    with pytest.raises(DataError, match=message):
        preprocess_data(make_config(path, tokenizer=tokenizer, prefix=tmp_path / "out" / "p"))
    assert list((tmp_path / "out").iterdir()) == []


def test_an_empty_file_among_others_is_nothing(tokenizer, tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    paths = [tmp_path / "empty", write_lines(tmp_path / "c", ["a"]), tmp_path / "empty"]
    assert preprocess_data(make_config(*paths, tokenizer=tokenizer, prefix=tmp_path / "p"))["text"].documents == 1


def test_a_missing_input_is_refused_before_any_work(tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"--input: .*none\.jsonl is not a file"):
        preprocess_data(make_config(tmp_path / "none.jsonl", tokenizer=tokenizer, prefix=tmp_path / "out" / "p"))
    assert not (tmp_path / "out").exists()


def test_failed_overwriting_keeps_files_and_record(tokenizer, tmp_path):
    prefix = tmp_path / "p"
    preprocess_data(make_config(write_lines(tmp_path / "c", ["a"]), tokenizer=tokenizer, prefix=prefix))
    (tmp_path / "c").write_bytes(b"")
    with pytest.raises(DataError, match="no documents"):
        preprocess_data(make_config(tmp_path / "c", tokenizer=tokenizer, prefix=prefix, overwrite=True))
    assert read_tokens(prefix).num_documents == read_record(prefix).documents


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress], ids=["gzip", "zstd"])
def test_a_truncated_file_stops_even_where_lines_may_be_skipped(tokenizer, tmp_path, pack):
    path = tmp_path / "c.packed"
    path.write_bytes(pack(b"".join(b'{"text": "%d"}\n' % (n * 7919 % 1000) for n in range(50_000)))[:-9])
    config = make_config(path, tokenizer=tokenizer, prefix=tmp_path / "p", on_error="skip")
    with pytest.raises(DataError, match=r"c\.packed:\d+: the compressed file is damaged \(.*\); fetch it again"):
        preprocess_data(config)
    assert {item.name for item in tmp_path.glob("p.*")} <= {"p.unfinished"}


def test_a_mistake_before_the_damage_is_named_first(tokenizer, tmp_path):
    lines = [b'{"text": "%d"}\n' % (n * 7919 % 1000) for n in range(50_000)]
    lines[40] = b"{bad}\n"
    path = tmp_path / "c.packed"
    path.write_bytes(gzip.compress(b"".join(lines))[:-9])
    with pytest.raises(DataError, match=r"c\.packed:41: no valid JSON"):
        preprocess_data(make_config(path, tokenizer=tokenizer, prefix=tmp_path / "p", workers=2))


@pytest.mark.parametrize(
    ("text", "other"),
    [("a" * 100, "x" * 50_000_000), pytest.param("a" + " \n" * 25_000_000, "", marks=pytest.mark.slow)],
    ids=["beside a text", "of text"],
)
@pytest.mark.parametrize("packed", ["plain", "gzip"])
def test_a_line_of_50_megabytes_is_a_document(tokenizer, tmp_path, packed, text, other):
    rows = [{"text": "before"}, {"other": other, "text": text}, {"text": "behind"}]
    path = tmp_path / "c.jsonl"
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    assert path.stat().st_size > 50_000_000
    if packed == "gzip":
        path.write_bytes(gzip.compress(path.read_bytes(), 1))
    preprocess_data(make_config(path, tokenizer=tokenizer, prefix=tmp_path / "p", workers=2, partitions=50))
    file = read_tokens(tmp_path / "p")
    assert file.num_documents == 3
    first, middle, last = file.lengths()
    assert middle == len(text) + 1  # no piece joins any of its characters
    assert file.tokens_N[:first].tolist() == expect_ids(tokenizer, ["before"])[0]
    assert file.tokens_N[-last:].tolist() == expect_ids(tokenizer, ["behind"])[0]


# ---------------------------------------------------------------- the output


@pytest.mark.parametrize("limit", [3_000, 30_000], ids=["a part", "the joined file"])
def test_a_full_disk_is_one_line_and_the_run_goes_on(tokenizer, tmp_path, limit):
    path = write_lines(tmp_path / "c.jsonl", [f"some text {n}" for n in range(4000)])
    prefix = tmp_path / "out" / "p"
    partitions = "4" if limit < 10_000 else "100"

    def set_limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = start_tool(tokenizer, path, prefix, "--partitions", partitions, preexec_fn=set_limit)
    assert done.returncode == 2, done.stderr
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"{prefix}.unfinished: cannot be written (File too large); make room" in error
    assert "Traceback" not in done.stderr
    assert not [item for item in prefix.parent.iterdir() if item != unfinished_folder(prefix)]
    assert start_tool(tokenizer, path, prefix, "--partitions", partitions).returncode == 0
    preprocess_data(make_config(path, tokenizer=tokenizer, prefix=tmp_path / "q", append_eod=False))
    assert read_files(prefix) == read_files(tmp_path / "q")


def test_a_folder_that_cannot_be_written_is_one_line(tokenizer, tmp_path, monkeypatch):
    path = write_lines(tmp_path / "c.jsonl", TEXTS)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"p\.unfinished: cannot be written \(Not a directory\); make room or name"):
        preprocess_data(make_config(path, tokenizer=tokenizer, prefix=tmp_path / "file" / "p"))

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(DataError, match=r"p\.unfinished: cannot be written \(Read-only file system\)"):
        preprocess_data(make_config(path, tokenizer=tokenizer, prefix=tmp_path / "out" / "p"))


def test_a_folder_without_permission_is_one_line(tokenizer, tmp_path):
    def obey_permissions() -> None:
        ctypes.CDLL(None).prctl(_PR_CAPBSET_DROP, _CAP_DAC_OVERRIDE, 0, 0, 0)  # nothing else stops root

    path = write_lines(tmp_path / "c.jsonl", TEXTS)
    (tmp_path / "out").mkdir(mode=0o555)
    done = start_tool(tokenizer, path, tmp_path / "out" / "p", preexec_fn=obey_permissions)
    assert done.returncode == 2, done.stderr
    assert "p.unfinished: cannot be written (Permission denied)" in done.stderr


def test_two_jobs_do_not_write_one_output(tokenizer, tmp_path):
    path, prefix = write_lines(tmp_path / "c.jsonl", TEXTS), tmp_path / "p"
    message = r"p\.unfinished: another job is writing this output; wait for it, or name another --output-prefix"
    with lock_folder(unfinished_folder(prefix)), pytest.raises(ConfigError, match=message):
        preprocess_data(make_config(path, tokenizer=tokenizer, prefix=prefix, overwrite=True))
    preprocess_data(make_config(path, tokenizer=tokenizer, prefix=prefix))


# ---------------------------------------------------------------- the workers

_CRASHING = """
import os, signal
from tokenizers import Tokenizer as Library

class Tokenizer:
    @staticmethod
    def from_json(content):
        return Tokenizer(Library.from_str(content))

    def __init__(self, library):
        self.library = library

    def encode(self, text):
        import numpy
        text = text.decode() if isinstance(text, bytes) else text
        if "CRASH" in text and "WORKER" in os.environ:
            os.kill(os.getpid(), signal.SIGSEGV)
        if "RAISE" in text:
            raise RuntimeError("index out of range")
        return numpy.array(self.library.encode(text, add_special_tokens=False).ids, numpy.uint32)
"""


@pytest.fixture
def fake_gigatoken(tmp_path, monkeypatch):
    """A module of that name that fails where a text asks for it."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "gigatoken.py").write_text(_CRASHING)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    monkeypatch.delitem(sys.modules, "gigatoken", raising=False)
    monkeypatch.setitem(crew._ONE_THREAD, "WORKER", "1")
    yield
    sys.modules.pop("gigatoken", None)  # or the next test would find it


@pytest.mark.usefixtures("fake_gigatoken")
@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_a_text_that_ends_the_worker_is_named(tokenizer, tmp_path, on_error):
    path = write_lines(tmp_path / "c.jsonl", [*TEXTS, "here we CRASH", *TEXTS])
    config = make_config(
        path,
        tokenizer=tokenizer,
        prefix=tmp_path / "p",
        backend="gigatoken",
        workers=2,
        partitions=5,
        on_error=on_error,
    )
    message = rf"c\.jsonl:{len(TEXTS) + 1}: the tokenizer ends its process on this text \(SIGSEGV\); correct or remove"
    with pytest.raises(DataError, match=message):
        preprocess_data(config)


@pytest.mark.usefixtures("fake_gigatoken")
def test_a_text_the_tokenizer_fails_on_is_named_or_skipped(tokenizer, tmp_path):
    path = write_lines(tmp_path / "c.jsonl", [*TEXTS, "here we RAISE", *TEXTS])
    config = {"tokenizer": tokenizer, "prefix": tmp_path / "p", "backend": "gigatoken"}
    message = rf"c\.jsonl:{len(TEXTS) + 1}: the tokenizer failed on the text \(index out of range\); correct the text"
    with pytest.raises(DataError, match=message):
        preprocess_data(make_config(path, **config))
    record = preprocess_data(make_config(path, on_error="skip", **config))["text"]
    assert record.documents == 2 * 303
    assert (tmp_path / "p.skipped.txt").read_text().startswith(f"{path}:{len(TEXTS) + 1}: the tokenizer failed")


def test_a_worker_ended_from_outside_is_one_line(tokenizer, tmp_path, monkeypatch):
    path = write_lines(tmp_path / "c.jsonl", TEXTS * 20)
    send = crew.Worker.give
    handed = []

    def give_and_kill(worker: crew.Worker, task: object) -> None:
        handed.append(task)
        if len(handed) == 3:
            worker.process.send_signal(signal.SIGKILL)
            worker.process.wait()
        send(worker, task)

    monkeypatch.setattr(crew.Worker, "give", give_and_kill)
    config = make_config(path, tokenizer=tokenizer, prefix=tmp_path / "out" / "p", workers=2, partitions=10)
    with pytest.raises(DataError, match=r"c\.jsonl:\d+: a worker was ended from outside \(SIGKILL\) .*fewer --workers"):
        preprocess_data(config)
    monkeypatch.undo()
    preprocess_data(config)
    preprocess_data(make_config(path, tokenizer=tokenizer, prefix=tmp_path / "q"))
    assert read_files(tmp_path / "out" / "p") == read_files(tmp_path / "q")


def test_no_worker_survives(tokenizer, tmp_path, monkeypatch):
    started = []
    start = crew._start_worker
    monkeypatch.setattr(crew, "_start_worker", lambda: started.append(start()) or started[-1])
    path = write_lines(tmp_path / "c.jsonl", TEXTS)
    preprocess_data(make_config(path, tokenizer=tokenizer, prefix=tmp_path / "p", workers=2))
    monkeypatch.setattr(encode, "publish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        preprocess_data(make_config(path, tokenizer=tokenizer, prefix=tmp_path / "q", workers=2))
    assert len(started) == 4
    assert all(worker.process.returncode is not None for worker in started)
