import pytest

from megatron_adapt.evaluate.report import compute_change, render_report, show_table, tabulate_bits, write_report


def score(bits, tokens_per_byte=0.25):
    return {"bits_per_byte": bits, "tokens_per_byte": tokens_per_byte}


EVALUATION = {
    "base": {"en": score(1.0), "qx": score(2.0, 0.5)},
    "resized": {"en": score(1.0), "qx": score(4.0)},
    "full": {"en": score(1.05), "qx": score(1.0)},
}
TOKENIZERS = {"base": {"en": 0.25, "qx": 0.5}, "adapted": {"en": 0.25, "qx": 0.2}}


def render(evaluation=EVALUATION):
    return render_report(evaluation, TOKENIZERS, ["en"], ["qx"], {"tokens": "1,000", "blend": "qx 0.9 | en 0.1"})


def test_old_languages_are_compared_with_base_and_new_ones_with_resized():
    lines = render().splitlines()
    assert "| model | en | change | qx | change |" in lines
    assert "| base | 1.0000 | - | 2.0000 | - |" in lines
    assert "| resized | 1.0000 | +0.0 % | 4.0000 | - |" in lines
    assert "| full | 1.0500 | +5.0 % | 1.0000 | -75.0 % |" in lines


def test_the_summary_goes_from_the_reference_to_the_last_model():
    lines = render().splitlines()
    assert lines[0] == "- en: 1.0000 (base) to 1.0500 (full) bits per byte, +5.0 %"
    assert lines[1] == "- qx: 4.0000 (resized) to 1.0000 (full) bits per byte, -75.0 %"


def test_bytes_per_token_are_those_of_the_tokenizers():
    lines = render().splitlines()
    assert "| base | 4.00 | - | 2.00 | - |" in lines
    assert "| adapted | 4.00 | +0.0 % | 5.00 | +150.0 % |" in lines


def test_facts_stand_in_the_report_and_bars_do_not_break_the_table():
    lines = render().splitlines()
    assert "| tokens | 1,000 |" in lines
    assert "| blend | qx 0.9 \\| en 0.1 |" in lines


def test_a_model_without_a_reference_has_no_change():
    report = render({"other": EVALUATION["full"]})
    assert "| model | en | qx |" in report
    assert "| other | 1.0500 | 1.0000 |" in report
    assert "to 1.0500" not in report


def test_a_language_that_was_not_scored_is_a_dash():
    rows = tabulate_bits({"base": {"en": score(1.0)}, "full": {}}, ["en", "qx"], {"en": "base"}, with_bytes=True)
    assert rows == [
        ["model", "en", "change", "en bytes/token", "qx", "qx bytes/token"],
        ["base", "1.0000", "-", "4.00", "-", "-"],
        ["full", "-", "-", "-", "-", "-"],
    ]


def test_change_is_relative():
    assert compute_change(EVALUATION, "full", "qx", "resized") == pytest.approx(-0.75)


def test_the_file_holds_title_and_report(tmp_path):
    path = tmp_path / "report.md"
    write_report(path, title="From en to qx", body=render())
    assert path.read_text().startswith("# From en to qx\n\n- en: 1.0000")
    assert list(tmp_path.iterdir()) == [path]


def test_the_table_on_the_terminal_shows_all_figures(capsys):
    show_table(EVALUATION, ["en"], ["qx"])
    shown = capsys.readouterr().out
    for figure in ("base", "resized", "full", "4.0000", "-75.0 %", "+5.0 %", "qx bytes/token"):
        assert figure in shown


def test_the_table_of_plain_scores_takes_its_languages_from_them(capsys):
    show_table(EVALUATION)
    shown = capsys.readouterr().out
    assert "4.0000" in shown
    assert "change" not in shown
