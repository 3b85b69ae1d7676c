"""Every benchmark runs on tiny data and ends with one line of figures; what it prints about itself is right."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
SHARED_KEYS = {"benchmark", "cores", "versions", "rounds"}
SIZES = {
    "attention": ("--quick", "--size", "64"),
    "blend": ("--size", "20000"),
    "merges": ("--size", "0.2", "--pieces", "100"),
    "convert": ("--size", "0.004"),
    "text_loops": ("--size", "0.1"),
}
KEYS = {
    "attention": {"positions", "threads", "cases"},
    "blend": {"windows", "cases"},
    "merges": {"mb", "real_text", "twin", "learners"},
    "convert": {
        "gb", "num_layers", "hidden_size", "seconds", "written_gb", "time_ratio", "start_mib", "extra_mib",
        "memory_ratio",
    },
    "text_loops": {"mb", "real_text", "cases"},
}  # fmt: skip
CASE_KEYS = {
    "attention": {
        "case", "bf16", "num_query_groups", "num_positions", "largest_difference", "seconds", "time_ratio",
        "extra_mib", "memory_ratio",
    },
    "blend": {
        "sources", "nanoseconds_per_window", "time_ratio", "twin_ratio", "worst_deviation_windows",
        "worst_shortfall_windows",
    },
    "text_loops": {"case", "mb_per_second", "time_ratio"},
}  # fmt: skip


def start(name: str, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, FOLDER / f"{name}.py", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_every_benchmark_is_tested():
    assert {path.stem for path in FOLDER.glob("*.py")} == set(SIZES) == set(KEYS)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("attention", marks=pytest.mark.slow),
        "blend",
        "merges",
        pytest.param("convert", marks=pytest.mark.slow),
        "text_loops",
    ],
)
def test_the_last_line_holds_the_figures(name):
    done = start(name, *SIZES[name], "--rounds", "2")
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    figures = json.loads(last)
    assert len(table) >= 4
    assert figures["benchmark"] == name
    assert set(figures) == SHARED_KEYS | KEYS[name]
    for case in figures.get("cases", []):
        assert set(case) == CASE_KEYS[name]
        assert 0 < case["time_ratio"]["low"] <= case["time_ratio"]["median"] <= case["time_ratio"]["high"]


def test_a_missing_corpus_is_one_line_and_exit_code_2():
    done = start("merges", "--corpus", "no-such-file.jsonl", "--size", "0.1")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: no-such-file.jsonl: no such file; check the path\n"


def test_a_model_too_large_for_the_disk_is_refused(tmp_path, monkeypatch):
    convert = load("convert", monkeypatch)
    with pytest.raises(convert.ConfigError, match=r"--size: a model of 1e\+12 GB needs .* are free; lower --size"):
        convert.run(1e12, 1, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_model_has_about_the_size_asked_for(monkeypatch):
    convert = load("convert", monkeypatch)
    for num_bytes in (0.01e9, 0.15e9, 1e9, 8e9):
        shape = convert.read_shape(convert.choose_config(num_bytes).to_dict(), "config")
        assert 2 * shape.num_parameters == pytest.approx(num_bytes, rel=0.15)


def test_deviation_is_counted_after_every_step(monkeypatch):
    blend = load("blend", monkeypatch)
    order = np.array([0, 0, 0, 1])  # shares 1/2: after three steps source 0 is 1.5 ahead
    assert blend.find_deviation(order, [2, 2]) == 1.5
    assert blend.find_shortfall(order, [2, 2]) == 1


def test_counts_add_up_and_differ(monkeypatch):
    blend = load("blend", monkeypatch)
    for num_sources in (2, 10, 100):
        counts = blend.draw_counts(num_sources, 12345)
        assert sum(counts) == 12345
        assert len(set(counts)) > 1


def test_both_attentions_are_compared_on_equal_results(monkeypatch):
    attention = load("attention", monkeypatch)
    with attention.start_engine(attention.Layout(), seed=0):
        for bf16 in (False, True):
            case = attention.Case(bf16, 2, 32)
            assert attention.check_equal(case) < attention.TOLERANCE[case.dtype]
            monkeypatch.setitem(attention.TOLERANCE, case.dtype, -1.0)
            with pytest.raises(attention.EngineError, match="the two differ by"):
                attention.check_equal(case)


def test_the_invented_text_is_the_same_on_every_run(monkeypatch):
    merges = load("merges", monkeypatch)
    first, again, other = (next(merges.make_texts(seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert len(first.split()) == merges.WORDS_PER_DOCUMENT


def allocate(num_bytes):
    return len(b"x" * num_bytes)


def test_measured_memory_is_that_of_the_call(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    rounds = importlib.import_module("measuring.rounds")
    measured = rounds.run_fresh(rounds.measure, allocate, 64 << 20)
    assert measured.result == 64 << 20
    assert 63 < measured.extra_mib < 72


def test_ratios_are_taken_within_a_round(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    rounds = importlib.import_module("measuring.rounds")
    seconds = {"peer": [2.0, 20.0, 6.0], "ours": [1.0, 10.0, 2.0]}
    assert rounds.compare(seconds, "peer", "ours") == {"median": 2.0, "low": 2.0, "high": 3.0}


def test_every_second_round_runs_in_reverse(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    rounds = importlib.import_module("measuring.rounds")
    called = []

    def note(name):
        called.append(name)
        return 1.0

    rounds.run_in_turns({"a": lambda: note("a"), "b": lambda: note("b")}, 3)
    assert "".join(called) == "abbaab"
