from contextlib import contextmanager
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from megatron_adapt.tokenizer import show
from megatron_adapt.tokenizer.figures import TokenizerFigures
from megatron_adapt.tokenizer.show import draw_figures, draw_sweep, show_figures, show_sweep
from megatron_adapt.tokenizer.sweep import describe_sweep


def make_figures(tokens, premium=None):
    return TokenizerFigures(
        1, 1000, 900, 100, tokens, tokens / 100, 0, tokens / 1000, 1000 / tokens, 0, 0, 0, 0, premium
    )


FIGURES = {
    "old": {"en": make_figures(250), "ja": make_figures(800)},
    "new": {"en": make_figures(250), "ja": make_figures(200)},
}
SWEEP = describe_sweep(
    Path("hub/base"),
    {
        size: (vocab, {"en": make_figures(250), "ja": make_figures(tokens)})
        for size, vocab, tokens in ((0, 100, 800), (25, 125, 210), (50, 150, 209))
    },
    None,
)


@pytest.fixture
def axes(monkeypatch):
    """The axes that the next plot is drawn on."""
    found = Figure().add_subplot()

    @contextmanager
    def give_axes(path, **labels):
        yield found

    monkeypatch.setattr(show, "draw_plot", give_axes)
    return found


def test_the_table_has_a_row_for_each_language_and_tokenizer(capsys):
    show_figures(FIGURES)
    rows = [line.split("│")[1:3] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["en", "old"],
        ["en", "new"],
        ["ja", "old"],
        ["ja", "new"],
    ]


def test_the_premium_is_shown_where_there_is_one(capsys):
    show_figures(FIGURES)
    assert "premium" not in capsys.readouterr().out
    show_figures({"old": {"en": make_figures(250, 1.0), "ja": make_figures(800)}})
    printed = capsys.readouterr().out
    assert "premium" in printed
    assert [line.split("│")[-2].strip() for line in printed.splitlines() if line.startswith("│")] == ["1.00", "-"]


def test_long_names_of_tokenizers_are_shown_whole(capsys):
    show_figures({"a_name_of_thirty_one_characters": FIGURES["old"]})
    assert "a_name_of_thirty_one_characters" in capsys.readouterr().out


def test_bars_stand_in_groups_by_language(axes):
    draw_figures(FIGURES, Path("unused.png"))
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["en", "ja"]
    bars = {bars.get_label(): [bar.get_height() for bar in bars] for bars in axes.containers}
    assert bars == {"old": [4.0, 1.25], "new": [4.0, 5.0]}
    old, new = axes.containers
    for group, (left, right) in enumerate(zip(old, new, strict=True)):
        assert group - 0.5 < left.get_x() < left.get_x() + left.get_width() <= right.get_x() < group + 0.5
    assert [text.get_text() for text in axes.texts] == ["4.00", "1.25", "4.00", "5.00"]


def test_many_bars_have_no_labels_that_would_overlap(axes):
    draw_figures({str(number): FIGURES["old"] for number in range(20)}, Path("unused.png"))
    assert len(axes.patches) == 40
    assert not axes.texts


def test_a_sweep_without_a_model_shows_no_costs(capsys):
    show_sweep(SWEEP)
    printed = capsys.readouterr().out
    assert "base extended" in printed
    assert "FLOPs" not in printed
    assert printed.endswith(
        "The gain flattens (the next step saves less than 1% of the tokens for each 25% of the base's ids): "
        "en at the base, ja at +25%.\n"
    )


def test_a_language_that_goes_on_gaining_is_said_to(capsys):
    found = {size: (100 + size, {"ja": make_figures(tokens)}) for size, tokens in ((0, 800), (25, 400), (50, 200))}
    show_sweep(describe_sweep(Path("b"), found, None))
    assert capsys.readouterr().out.endswith(": ja not by +50%.\n")


def test_the_curve_goes_by_size_and_rings_where_it_flattens(axes):
    draw_sweep(SWEEP, Path("unused.png"))
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
    assert lines["ja"] == ([0, 25, 50], [0.8, 0.21, 0.209])
    rings = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines if line.get_markersize() == 12]
    assert rings == [([0], [0.25]), ([25], [0.21]), ([], [])]
