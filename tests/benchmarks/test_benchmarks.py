"""Every benchmark runs on tiny data and ends with one line of figures; what it prints about itself is right."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from megatron_adapt.data.index import read_tokens

FOLDER = Path(__file__).parents[2] / "benchmarks"
SHARED_KEYS = {"benchmark", "cores", "versions", "rounds"}
SIZES = {
    "attention": ("--quick", "--size", "64"),
    "blend": ("--quick", "--size", "20000"),
    "merges": ("--size", "0.2", "--pieces", "100"),
    "fill": ("--quick", "--size", "16"),
    "propagate": ("--quick", "--size", "16"),
    "convert": ("--size", "0.004"),
    "preprocess": ("--size", "0.1", "--workers", "1", "--rounds", "1"),  # a round starts seven processes
    "text_loops": ("--size", "0.1"),
    "loss_memory": ("--quick",),
    "train_cpu": ("--quick",),
    "startup": ("--quick",),
    "stage1": ("--quick",),
    "kernels": ("--quick",),
    "train_gpu": ("--quick", "--peers", "ours_torch", "transformers"),
}
KEYS = {
    "attention": {"positions", "threads", "cases"},
    "blend": {"windows", "cases", "deviations"},
    "merges": {"mb", "real_text", "twin", "learners"},
    "convert": {
        "gb", "num_layers", "hidden_size", "seconds", "written_gb", "time_ratio", "start_mib", "peak_mib",
    },
    "preprocess": {"mb", "real_text", "workers", "paths", "cases"},
    "text_loops": {"mb", "real_text", "cases"},
    "fill": {"columns", "cases"},
    "propagate": {"columns", "cases"},
    "loss_memory": {"device", "tokens", "threads", "largest_differences", "cases"},
    "train_cpu": {"threads", "first_losses", "cases"},
    "startup": {"columns", "seconds", "time_ratio"},
    "stage1": {"threads", "weights", "cases"},
    "kernels": {"device", "tokens", "cases"},
    "train_gpu": {"device", "tokens", "cases"},
}  # fmt: skip
CASE_KEYS = {
    "attention": {
        "case", "bf16", "num_query_groups", "num_positions", "largest_difference", "seconds", "time_ratio",
        "extra_mib", "memory_ratio",
    },
    "blend": {
        "sources", "documents", "seconds", "plan_seconds", "resume_seconds", "time_ratio", "extra_mib", "memory_ratio",
        "written_mib", "read_microseconds", "locate_microseconds", "order_nanoseconds", "order_ratio", "twin_ratio",
        "worst_deviation_windows",
    },
    "preprocess": {"case", "time_ratio"},
    "text_loops": {"case", "mb_per_second", "time_ratio"},
    "fill": {"case", "seconds", "time_ratio", "extra_mib"},
    "propagate": {"case", "seconds", "time_ratio", "extra_mib", "peak_mib"},
    "loss_memory": {"case", "num_columns", "seconds", "time_ratio", "extra_mib", "memory_ratio"},
    "train_cpu": {"case", "tokens_per_second", "time_ratio"},
    "stage1": {
        "case", "tokens_per_second", "time_ratio", "flops_ratio", "held_mib", "peak_mib", "planned_mib",
    },
    "kernels": {"case", "mib", "gb_per_second", "copy_share", "time_ratio", "largest_difference"},
    "train_gpu": {"case", "milliseconds", "tflops", "gemm_share", "time_ratio"},
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
        pytest.param("blend", marks=pytest.mark.slow),
        "merges",
        pytest.param("fill", marks=pytest.mark.slow),
        pytest.param("propagate", marks=pytest.mark.slow),
        pytest.param("convert", marks=pytest.mark.slow),
        pytest.param("preprocess", marks=pytest.mark.slow),
        "text_loops",
        pytest.param("loss_memory", marks=pytest.mark.slow),
        pytest.param("train_cpu", marks=pytest.mark.slow),
        pytest.param("startup", marks=pytest.mark.slow),
        pytest.param("stage1", marks=pytest.mark.slow),
        pytest.param("kernels", marks=pytest.mark.slow),
        pytest.param("train_gpu", marks=pytest.mark.slow),
    ],
)
def test_the_last_line_holds_the_figures(name):
    done = start(name, "--rounds", "2", *SIZES[name])
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    figures = json.loads(last)
    assert len(table) >= 4
    assert figures["benchmark"] == name
    assert set(figures) == SHARED_KEYS | KEYS[name]
    for case in figures.get("cases", []):
        assert set(case) == CASE_KEYS[name]
        assert 0 < case["time_ratio"]["low"] <= case["time_ratio"]["median"] <= case["time_ratio"]["high"]


def test_a_frozen_body_of_another_loss_is_not_compared(monkeypatch):
    stage1 = load("stage1", monkeypatch)
    case = stage1.Case(stage1.make_shape(512, stage1.QUICK_SIZES), bf16=False)
    stage1.check_equal(case, {"all": 2.0, "embeddings": 2.0})
    with pytest.raises(stage1.EngineError, match=r"stage1: fp32: loss 2\.0, with a frozen body 2\.1; mend this first"):
        stage1.check_equal(case, {"all": 2.0, "embeddings": 2.1})


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
        shape = convert.read_shape(convert.choose_config(num_bytes), "config")
        assert 2 * shape.num_parameters == pytest.approx(num_bytes, rel=0.15)


def test_deviation_is_counted_after_every_step(monkeypatch):
    blend = load("blend", monkeypatch)
    order = np.array([0, 0, 0, 1])  # shares 1/2: after three steps source 0 is 1.5 ahead
    assert blend.find_deviation(order, [2, 2]) == 1.5
    drawn = np.random.default_rng(0).integers(0, 3, 500)
    weights, total = [5, 1, 3], 9
    lags = [np.cumsum(drawn == source) - np.arange(1, 501) * weight / total for source, weight in enumerate(weights)]
    for part in (1, 7, 500):  # whatever is counted at once
        monkeypatch.setattr(blend, "ORDER_WINDOWS", part)
        assert blend.find_deviation(drawn, weights) == pytest.approx(abs(np.array(lags)).max(), abs=2e-6)


def test_our_order_is_less_than_a_window_from_extreme_shares(monkeypatch):
    blend = load("blend", monkeypatch)
    for num_sources in (2, 10, 100, 1000):
        found = blend.find_deviations(num_sources, 30_000)
        assert 0 < found["equal"] < 1
        assert 0 < found["unequal"] < 1


def test_sources_of_holes_are_token_files(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    sources = importlib.import_module("measuring.sources")
    prefixes = sources.write_sources(tmp_path, 3, 30_000)
    files = [read_tokens(prefix) for prefix in prefixes.values()]
    assert [file.num_documents for file in files] == [10_000] * 3
    assert sum(file.num_tokens for file in files) == pytest.approx(30_000 * sources.MEAN_TOKENS, rel=0.03)
    assert importlib.import_module("measuring.disk").count_bytes(tmp_path) > 2 * sum(file.num_tokens for file in files)


def test_memory_of_mapped_files_is_not_counted(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    anonymous = importlib.import_module("measuring.anonymous")
    (tmp_path / "file").write_bytes(b"x" * (64 << 20))
    assert anonymous.run_watched(hold, 64 << 20).extra_mib > 60
    watched = anonymous.run_watched(sum_mapped, tmp_path / "file")
    assert watched.result == 64 << 20
    assert watched.extra_mib < 40  # the process imports this module


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


def test_paths_that_give_other_ids_are_not_compared(monkeypatch):
    preprocess = load("preprocess", monkeypatch)
    preprocess.check_ids({"ours": "a", "megatron": "a"})
    with pytest.raises(preprocess.EngineError, match="preprocess: megatron gives other ids than ours; do not compare"):
        preprocess.check_ids({"ours": "a", "ours gigatoken": "a", "megatron": "b"})


def test_the_text_is_shared_out_to_files_of_about_equal_size(tmp_path, monkeypatch):
    preprocess = load("preprocess", monkeypatch)
    paths = preprocess.write_corpus(tmp_path, 300_000, [], 3)
    sizes = [path.stat().st_size for path in paths]
    assert len(sizes) == 3
    assert max(sizes) < 1.2 * min(sizes)
    assert 300_000 < sum(sizes) < 330_000


def allocate(num_bytes):
    return len(b"x" * num_bytes)


def hold(num_bytes):
    held = b"x" * num_bytes
    time.sleep(0.2)
    return len(held)


def sum_mapped(path):
    return sum(int(part.sum()) for part in np.memmap(path, np.uint8, "r").reshape(64, -1)) // ord("x")


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
