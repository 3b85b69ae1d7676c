"""A run that was killed and started again gives what an undisturbed run gives, or says why it cannot."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import orjson
import pytest

from megatron_adapt.data import crew
from megatron_adapt.data.encode import preprocess_data
from megatron_adapt.data.manifest import read_header, unfinished_folder
from megatron_adapt.data.record import record_path
from megatron_adapt.errors import ConfigError, DataError
from tests.data.corpora import TEXTS, make_config, make_tokenizer, read_files, write_lines

TOOL = Path(__file__).parents[2] / "tools" / "preprocess_data.py"
NUM_CHUNKS = 60


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizers") / "plain")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_lines(
        tmp_path_factory.mktemp("corpus") / "c.jsonl", [f"{text} {n}" for n in range(30) for text in TEXTS]
    )


@pytest.fixture(scope="module")
def undisturbed(corpus, tokenizer, tmp_path_factory) -> Path:
    prefix = tmp_path_factory.mktemp("tokens") / "p"
    preprocess_data(make_config(corpus, tokenizer=tokenizer, prefix=prefix, partitions=NUM_CHUNKS, workers=2))
    return prefix


def count_rows(prefix: Path) -> int:
    path = unfinished_folder(prefix) / "manifest.jsonl"
    return path.read_bytes().count(b"\n") - 1 if path.is_file() else 0


def stop_after(monkeypatch: pytest.MonkeyPatch, num_tasks: int) -> None:
    """Let the next run fail when so many chunks are handed out."""
    give, handed = crew.Worker.give, []

    def give_or_fail(worker: crew.Worker, task: object) -> None:
        handed.append(task)
        if len(handed) > num_tasks:
            raise KeyboardInterrupt
        give(worker, task)

    monkeypatch.setattr(crew.Worker, "give", give_or_fail)


@pytest.fixture
def interrupted(corpus, tokenizer, tmp_path, monkeypatch) -> dict:
    """The arguments of a run that was interrupted half way."""
    arguments = {"tokenizer": tokenizer, "prefix": tmp_path / "p", "partitions": NUM_CHUNKS}
    with monkeypatch.context() as patched:
        stop_after(patched, NUM_CHUNKS // 2)
        with pytest.raises(KeyboardInterrupt):
            preprocess_data(make_config(corpus, **arguments))
    assert count_rows(tmp_path / "p") == NUM_CHUNKS // 2
    return arguments


def test_a_run_goes_on_where_it_was_interrupted(corpus, undisturbed, interrupted, monkeypatch):
    tasks = []
    give = crew.Worker.give
    monkeypatch.setattr(crew.Worker, "give", lambda worker, task: tasks.append(task) or give(worker, task))
    preprocess_data(make_config(corpus, **{**interrupted, "workers": 3, "partitions": 7}))
    assert read_files(interrupted["prefix"]) == read_files(undisturbed)
    encoded = [task for task in tasks if task.known_hash is None]
    assert len(encoded) == len(tasks) - NUM_CHUNKS // 2
    assert sorted(path.name for path in interrupted["prefix"].parent.iterdir()) == ["p.bin", "p.idx", "p.stage.json"]


def test_another_tokenizer_does_not_mix(corpus, undisturbed, interrupted, tmp_path):
    # The same pieces and merges; only what stands before a text is another.
    other = make_tokenizer(tmp_path / "other", bos=True)
    message = r"p\.unfinished: an unfinished run with another tokenizer lies there; finish it .*, or add --overwrite"
    with pytest.raises(ConfigError, match=message):
        preprocess_data(make_config(corpus, **{**interrupted, "tokenizer": other}))
    before = read_header(unfinished_folder(interrupted["prefix"]))
    preprocess_data(make_config(corpus, **{**interrupted, "tokenizer": other}, overwrite=True))
    assert before
    assert read_files(interrupted["prefix"]) != read_files(undisturbed)
    preprocess_data(make_config(corpus, **{**interrupted, "tokenizer": other, "prefix": tmp_path / "q"}))
    assert read_files(interrupted["prefix"]) == read_files(tmp_path / "q")


@pytest.mark.parametrize(
    ("other", "name"),
    [({"append_eod": False}, "eod_id"), ({"json_keys": ("body",)}, "json_keys"), ({"backend": "gigatoken"}, "backend")],
)
def test_other_settings_do_not_mix(corpus, interrupted, other, name):
    if name == "backend":
        pytest.importorskip("gigatoken")
    with pytest.raises(ConfigError, match=rf"p\.unfinished: an unfinished run with another {name} lies there"):
        preprocess_data(make_config(corpus, **{**interrupted, **other}))


def test_a_changed_input_does_not_mix(corpus, undisturbed, interrupted, tmp_path):
    content = corpus.read_bytes()
    changed = tmp_path / "c.jsonl"
    changed.write_bytes(content.replace(b"many", b"MANY", 1))
    message = r"c\.jsonl: has changed near byte \d.* since .*p\.unfinished was begun; restore it, or add --overwrite"
    with pytest.raises(DataError, match=message):
        preprocess_data(make_config(changed, **interrupted))
    changed.write_bytes(content[: len(content) // 4])
    with pytest.raises(DataError, match=r"(is shorter than it was|has changed near byte)"):
        preprocess_data(make_config(changed, **interrupted))
    # A change behind what is done is none.
    changed.write_bytes(content + b'{"text": "more"}\n')
    preprocess_data(make_config(changed, **interrupted))
    preprocess_data(make_config(changed, **{**interrupted, "prefix": tmp_path / "q"}))
    assert read_files(interrupted["prefix"]) == read_files(tmp_path / "q") != read_files(undisturbed)


def test_overwrite_begins_anew_where_the_input_has_changed(corpus, interrupted, tmp_path):
    changed = tmp_path / "c.jsonl"
    changed.write_bytes(corpus.read_bytes().replace(b"many", b"MANY", 1))
    preprocess_data(make_config(changed, **interrupted, overwrite=True))
    preprocess_data(make_config(changed, **{**interrupted, "prefix": tmp_path / "q"}))
    assert read_files(interrupted["prefix"]) == read_files(tmp_path / "q")


def test_after_a_bad_line_skipping_goes_on_and_failing_fails_again(tokenizer, tmp_path):
    lines = [orjson.dumps({"text": f"text {n}"}) + b"\n" for n in range(2000)]
    lines[1500] = b"{bad}\n"
    path = tmp_path / "c.jsonl"
    path.write_bytes(b"".join(lines))
    arguments = {"tokenizer": tokenizer, "prefix": tmp_path / "p", "partitions": 20}
    with pytest.raises(DataError, match=r"c\.jsonl:1501: no valid JSON"):
        preprocess_data(make_config(path, **arguments))
    done = count_rows(tmp_path / "p")
    assert done == path.read_bytes().index(b"{bad}") // (path.stat().st_size // 20)
    with pytest.raises(DataError, match=r"c\.jsonl:1501: no valid JSON"):
        preprocess_data(make_config(path, **arguments))
    assert count_rows(tmp_path / "p") == done
    preprocess_data(make_config(path, **arguments, on_error="skip"))
    preprocess_data(make_config(path, **{**arguments, "prefix": tmp_path / "q"}, on_error="skip"))
    assert read_files(tmp_path / "p") == read_files(tmp_path / "q")
    assert (tmp_path / "p.skipped.txt").read_bytes() == (tmp_path / "q.skipped.txt").read_bytes()


def test_a_line_skipped_before_the_kill_still_fails_where_asked(tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "c.jsonl"
    path.write_bytes(b"{bad}\n" + b'{"text": "good"}\n' * 400)
    arguments = {"tokenizer": tokenizer, "prefix": tmp_path / "p", "partitions": 20}
    with monkeypatch.context() as patched:
        stop_after(patched, 10)
        with pytest.raises(KeyboardInterrupt):
            preprocess_data(make_config(path, **arguments, on_error="skip"))
    with pytest.raises(DataError, match=r"c\.jsonl:1: no valid JSON"):
        preprocess_data(make_config(path, **arguments))


def test_a_lost_or_damaged_part_is_made_again(corpus, undisturbed, interrupted):
    folder = unfinished_folder(interrupted["prefix"])
    parts = sorted(folder.glob("*.part"))
    assert len(parts) == NUM_CHUNKS // 2
    parts[5].unlink()
    parts[9].write_bytes(b"\x00" * parts[9].stat().st_size)
    (folder / "00000059.0.part").write_bytes(b"of a run that was killed")
    (folder / "00000058.0.part.123").write_bytes(b"of a worker that was killed")
    with (folder / "manifest.jsonl").open("ab") as file:
        file.write(b'{"number":57,"input_h')
    # A missing part says that what comes before it is joined, so the joined file decides.
    joined = folder / "joined.0.bin"
    assert joined.stat().st_size > 0
    preprocess_data(make_config(corpus, **interrupted))
    assert read_files(interrupted["prefix"]) == read_files(undisturbed)


def test_a_joined_file_that_is_too_short_is_refused(corpus, interrupted):
    folder = unfinished_folder(interrupted["prefix"])
    min(folder.glob("*.part")).unlink()
    (folder / "joined.0.bin").write_bytes(b"")
    message = r"joined\.0\.bin: 0 bytes where the manifest counts \d+; remove .*p\.unfinished and begin anew"
    with pytest.raises(DataError, match=message):
        preprocess_data(make_config(corpus, **interrupted))


# ---------------------------------------------------------------- kill -9

_KILL_AT_EVERY_STEP = """
import json, os, signal, sys
from pathlib import Path
from megatron_adapt.corpus import sentences  # once, not in every child
from megatron_adapt.data import manifest, shards
from megatron_adapt.data.encode import preprocess_data
from tests.data.corpora import make_config

tokenizer, corpus, folder = map(Path, sys.argv[1:4])
more = json.loads(sys.argv[4])
shards._SYNC_BYTES = 2000
steps = [0, 0]

def count(owner, name):
    function = getattr(owner, name)
    def call(*args, **named):
        steps[0] += 1
        if steps[0] == steps[1]:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **named)
    setattr(owner, name, call)

for owner, names in ((Path, ("replace", "unlink", "rmdir")), (os, ["fsync"]), (shards, ["_copy"])):
    for name in names:
        count(owner, name)
count(manifest.Manifest, "_append")

def run(prefix, kill_at):
    child = os.fork()
    if child == 0:
        steps[:] = 0, kill_at
        preprocess_data(make_config(corpus, tokenizer=tokenizer, prefix=prefix, partitions=3, **more))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

results = []
for kill_at in range(1, 1000):
    prefix = folder / f"p{kill_at}"
    killed = run(prefix, kill_at)
    results.append((kill_at, killed, run(prefix, 0) if killed else 0))
    if not killed:
        break
print(json.dumps(results))
"""


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"split_sentences": True}], ids=["whole", "sentences"])
def test_killed_before_every_step_of_the_disk_it_goes_on(tokenizer, tmp_path, more):
    corpus = write_lines(tmp_path / "c.jsonl", [f"Some text of mine. Number {n}" for n in range(400)])
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", _KILL_AT_EVERY_STEP, tokenizer, corpus, tmp_path, json.dumps(more)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    *killed, (last, code, _) = json.loads(done.stdout)
    assert code == 0
    assert len(killed) > 30, len(killed)
    expected = read_files(tmp_path / f"p{last}")
    for number, code, again in killed:
        assert code == -signal.SIGKILL
        if again:  # all was done but the removal of the folder: the output stands, and is not replaced unasked
            assert not count_rows(tmp_path / f"p{number}")
        assert read_files(tmp_path / f"p{number}") == expected
        assert record_path(tmp_path / f"p{number}").is_file()


@pytest.mark.slow
def test_killed_at_20_random_moments_it_gives_the_same_bytes(corpus, tokenizer, undisturbed, tmp_path):
    draw = random.Random(4)
    num_killed = 0
    for trial in range(60):  # on a busy machine the work is at times done before the kill
        if num_killed == 20:
            break
        prefix = tmp_path / f"p{trial}"
        command = [
            sys.executable, TOOL, "--input", corpus, "--tokenizer", tokenizer, "--output-prefix", prefix,
            "--workers", "2", "--partitions", str(NUM_CHUNKS), "--append-eod", "--backend", "tokenizers",
        ]  # fmt: skip
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        # A moment of the work, not of the start of Python.
        rows = draw.randrange(NUM_CHUNKS + 1)
        while process.poll() is None and count_rows(prefix) < rows:
            time.sleep(0.0005)
        time.sleep(draw.random() * 0.01)
        process.kill()
        if process.wait() == -signal.SIGKILL:
            num_killed += 1
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
            assert done.returncode == 0, done.stderr
        assert read_files(prefix) == read_files(undisturbed)
        assert {item.name for item in prefix.parent.glob(f"p{trial}.*")} == {
            f"p{trial}.bin", f"p{trial}.idx", f"p{trial}.stage.json",
        }  # fmt: skip
    assert num_killed == 20
