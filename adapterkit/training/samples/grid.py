"""Samples side by side: one row per prompt and seed, one column per stage, with labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

_CELL = 160
_MARGIN = 8
_LINE = 16


def write_grid(path: Path, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Path]]]) -> Path:
    """Draws a grid of image files; small images are enlarged without smoothing, and absent ones are named.

    Args:
        path: Where to.
        columns: A label for each column.
        rows: A label and the images of each row.
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default()
    width = _MARGIN + len(columns) * (_CELL + _MARGIN)
    height = _LINE + _MARGIN + len(rows) * (_CELL + _LINE + _MARGIN)
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    for column, label in enumerate(columns):
        draw.text((_MARGIN + column * (_CELL + _MARGIN), _MARGIN // 2), label, "black", font)
    for row, (label, files) in enumerate(rows):
        top = _LINE + _MARGIN + row * (_CELL + _LINE + _MARGIN)
        draw.text((_MARGIN, top), _shortened(draw, label, width - 2 * _MARGIN), "black", font)
        for column, file in enumerate(files):
            corner = (_MARGIN + column * (_CELL + _MARGIN), top + _LINE)
            if not file.exists():  # samples may be deleted while a long run goes on
                draw.text(corner, f"no {file.name}", "red", font)
                continue
            with Image.open(file) as image:
                canvas.paste(_fitted(image.convert("RGB")), corner)
    canvas.save(path)
    return path


def _fitted(image: Image.Image) -> Image.Image:
    from PIL import Image

    scale = _CELL / max(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def _shortened(draw: ImageDraw.ImageDraw, text: str, width: int) -> str:
    text = text.encode("latin-1", "replace").decode("latin-1")  # what Pillow's built-in font can draw
    while draw.textlength(text) > width:
        text = text[:-4] + "..." if text.endswith("...") else text[:-3] + "..."
    return text
