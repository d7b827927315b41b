"""An adapter in one picture: norms by block and role, its spectrum, and what each rank would lose."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from adapterkit.errors import CheckpointError, MissingDependencyError
from adapterkit.tools.describe import Facts
from adapterkit.tools.places import grid, places
from adapterkit.tools.ranks import rank_errors

_ROW, _COLUMN, _LEAST, _MOST = 0.18, 0.3, 4.0, 24.0
"""Inches of a row and a column of the heat map, and of the whole."""
_QUANTILES = (0.1, 0.5, 0.9)


def plot(facts: Facts, target: Path, title: str = "") -> None:
    """Draws it.

    Args:
        facts: What `describe` has found.
        target: The picture, of a format that matplotlib writes.
        title: Above it.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        CheckpointError: The picture cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            "pictures need matplotlib, which is not installed. Run: pip install 'adapterkit[plot]'"
        ) from error
    blocks, roles, rows = grid(places(point.key for point in facts.points), facts.norms)
    height = min(max(len(blocks) * _ROW, _LEAST), _MOST)
    figure = Figure(figsize=(min(max(len(roles) * _COLUMN, _LEAST), _MOST) + 8, height + 1), layout="constrained")
    FigureCanvasAgg(figure)  # no display, and no state of matplotlib's own
    left, middle, right = figure.subplots(1, 3)
    _heat_map(figure, left, blocks, roles, rows)
    _spectrum(middle, facts)
    _errors(right, facts)
    figure.suptitle(title)
    try:
        figure.savefig(target, dpi=100)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the picture cannot be written: {error}", target) from error


def _heat_map(figure: Any, axes: Any, blocks: list[str], roles: list[str], rows: list[list[float | None]]) -> None:
    values = [[math.nan if value is None else value for value in row] for row in rows]
    axes.set_title("norm of the update")
    if values:
        axes.set_xticks(range(len(roles)), roles, rotation=90, fontsize=6)
        axes.set_yticks(range(len(blocks)), blocks, fontsize=6)
        figure.colorbar(axes.imshow(values, aspect="auto", cmap="viridis", interpolation="nearest"), ax=axes)


def _spectrum(axes: Any, facts: Facts) -> None:
    axes.set_title("singular values, relative to the largest")
    spectra = [one for one in facts.spectra if one.norm]
    if not spectra:
        return
    longest = max(len(one.values) for one in spectra)
    values = torch.full((len(spectra), longest), math.nan, dtype=torch.float64)
    for row, one in zip(values, spectra, strict=True):
        row[: len(one.values)] = one.values / one.values[0]
    low, half, high = torch.nanquantile(values, torch.tensor(_QUANTILES, dtype=torch.float64), dim=0)
    numbers = range(1, longest + 1)
    axes.fill_between(numbers, low, high, alpha=0.3, label="80 % of the points")
    axes.plot(numbers, half, label="median")
    axes.set_yscale("log")
    axes.set_ylim(bottom=1e-4, top=2)
    axes.set_xlabel("number")
    axes.legend()


def _errors(axes: Any, facts: Facts) -> None:
    axes.set_title("error of a rank, of the norm")
    rows = rank_errors(facts.spectra)
    if rows:
        axes.plot([row.rank for row in rows], [row.error for row in rows], marker="o", label="all points together")
        axes.plot([row.rank for row in rows], [row.worst for row in rows], marker=".", label="the worst point")
        axes.set_xscale("log", base=2)
        axes.set_xlabel("rank")
        axes.legend()
