"""Samples side by side: pictures in a picture, texts in a page of Markdown."""

from __future__ import annotations

import html
import mimetypes
from collections.abc import Sequence
from pathlib import Path

from adapterkit.training.samples.grid import write_grid

Rows = Sequence[tuple[str, Sequence[Path]]]
"""A label, and the files of each column."""


def is_picture(path: Path) -> bool:
    """Whether a file's ending is a picture's."""
    return (mimetypes.guess_type(path.name)[0] or "").startswith("image/")


def sheet(path: Path, columns: Sequence[str], rows: Rows) -> Path:
    """Writes samples side by side.

    Args:
        path: Where to, without an ending.
        columns: A label for each column.
        rows: A label and the files of each row; what is not there is named.

    Returns:
        The file: `.png` of pictures, `.md` of texts.
    """
    if all(is_picture(file) for _, files in rows for file in files):
        return write_grid(path.with_name(f"{path.name}.png"), columns, rows)
    page = path.with_name(f"{path.name}.md")
    lines = [f"## {_line(label)}\n\n{_texts(columns, files)}" for label, files in rows]
    page.write_text("\n".join(lines), encoding="utf-8")
    return page


def _texts(columns: Sequence[str], files: Sequence[Path]) -> str:
    return "\n".join(f"{label}\n\n<pre>{_text(file)}</pre>\n" for label, file in zip(columns, files, strict=True))


def _text(file: Path) -> str:
    if not file.is_file():
        return f"no {html.escape(file.name)}"
    return html.escape(file.read_text(encoding="utf-8", errors="replace").strip(), quote=False)


def _line(text: str) -> str:
    return html.escape(" ".join(text.split()), quote=False)
