import pytest

from megatron_adapt.plots import draw_plot


def test_a_plot_is_a_png_and_replaces_an_older_one(tmp_path):
    path = tmp_path / "plot.png"
    path.write_bytes(b"old")
    with draw_plot(path, title="t", x_label="x", y_label="y") as axes:
        axes.plot([1, 2], [3, 4], label="line")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [item.name for item in tmp_path.iterdir()] == ["plot.png"]


def test_a_plot_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), draw_plot(tmp_path / "plot.png", title="", x_label="", y_label=""):
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []
