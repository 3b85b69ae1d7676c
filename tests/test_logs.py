import io
import logging
import sys
import time

import pytest

from megatron_adapt import logs
from megatron_adapt.errors import DataError
from megatron_adapt.logs import MetricsWriter, is_main_rank, read_metrics, setup_logging, show_progress


def test_rank_zero_and_single_processes_are_main(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert is_main_rank()
    monkeypatch.setenv("RANK", "0")
    assert is_main_rank()
    monkeypatch.setenv("RANK", "3")
    assert not is_main_rank()


def test_only_the_main_rank_informs_and_others_name_themselves(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    setup_logging()
    logging.getLogger("megatron_adapt.x").info("quiet")
    logging.getLogger("megatron_adapt.x").warning("heard")
    error = capsys.readouterr().err
    assert "rank 3: heard" in error
    assert "quiet" not in error
    monkeypatch.setenv("RANK", "0")
    setup_logging()
    logging.getLogger("megatron_adapt.x").info("told once")
    assert capsys.readouterr().err.count("told once") == 1


def test_progress_without_a_terminal_is_plain_lines(monkeypatch, capsys):
    monkeypatch.setattr(logs, "_LINE_EVERY_SECONDS", 0.0)
    setup_logging()
    with show_progress("reading", 4, "files") as advance:
        advance()
        advance(3)
    first, second = capsys.readouterr().err.splitlines()
    assert " reading: 1 of 4 files, " in first
    assert " reading: 4 of 4 files, " in second
    assert second.endswith(", 0 s left")


def test_progress_of_unknown_length_claims_no_end(monkeypatch, capsys):
    monkeypatch.setattr(logs, "_LINE_EVERY_SECONDS", 0.0)
    setup_logging()
    with show_progress("reading", None, "files") as advance:
        advance()
    line = capsys.readouterr().err
    assert " reading: 1 files, " in line
    assert "left" not in line


def test_progress_on_a_terminal_is_a_bar_with_speed_and_note(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(shown, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.delenv("RANK", raising=False)
    with show_progress("reading", 100, "MB") as advance:
        for _ in range(12):
            advance(5, "12 documents")
            time.sleep(0.06)
    text = shown.getvalue()
    assert "60 MB" in text
    assert "MB/s" in text
    assert "12 documents" in text


def test_metrics_are_appended_and_read_back(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    writer = MetricsWriter(path, start_step=0)
    rows = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.25}]
    for row in rows:
        writer.write(row)
    assert read_metrics(path) == rows


def test_resuming_drops_the_rows_after_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path, start_step=0)
    for step in range(1, 6):
        writer.write({"step": step, "loss": 1.0})
    MetricsWriter(path, start_step=3).write({"step": 4, "loss": 0.5})
    assert [(row["step"], row["loss"]) for row in read_metrics(path)] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 0.5)]


def test_a_line_cut_off_at_the_end_is_dropped_but_one_before_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st')
    assert read_metrics(path) == [{"step": 1}]
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: no valid JSON; remove the line$"):
        read_metrics(path)
