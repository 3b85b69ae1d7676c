"""One way to draw: a figure with one pair of axes, written to a PNG at the end."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_adapt.files import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INCHES = (9.0, 5.0)
_DOTS_PER_INCH = 120


@contextmanager
def draw_plot(path: Path, *, title: str, x_label: str, y_label: str) -> Iterator["Axes"]:
    """Draw on the axes this gives; the PNG is written when the block ends without an error.

    Args:
        path: file to write; an older one is replaced.
        title: what the picture shows.
        x_label: quantity and unit of the horizontal axis.
        y_label: quantity and unit of the vertical axis.
    """
    # Half a second to import, and most runs draw nothing. A Figure of its own needs no display and no global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=_INCHES, dpi=_DOTS_PER_INCH, layout="constrained")
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.grid(visible=True, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    yield axes
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False)
    with replace_file(path) as partial:
        figure.savefig(partial, format="png")
