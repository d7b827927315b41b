"""A picture of which classes are taken for which."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor


def draw(counts: Tensor, classes: Sequence[str], path: Path) -> bool:
    """Draws a table: a row for each class, a column for what its images are said to be, shares of the row as shades.

    Args:
        counts: How many images of class i are said to be of class j: [classes, classes].
        classes: Their names.
        path: The PNG file.

    Returns:
        Whether there is a picture; there is none without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    side = 2 + 0.4 * len(classes)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    axes.imshow(shares.numpy(), vmin=0, vmax=1, cmap="Blues")
    names = [name.replace("$", r"\$") for name in classes]
    axes.set_xticks(range(len(classes)), names, rotation=90)
    axes.set_yticks(range(len(classes)), names)
    axes.set_xlabel("said")
    axes.set_ylabel("is")
    for row, column in counts.nonzero().tolist():
        dark = shares[row, column] > 0.5
        axes.text(column, row, str(int(counts[row, column])), ha="center", va="center", color="w" if dark else "k")
    figure.savefig(path, dpi=100)
    return True
