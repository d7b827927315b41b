from __future__ import annotations

from pathlib import Path

from PIL import Image

from adapterkit.training.samples.grid import write_grid


def image(path: Path, colour: str) -> Path:
    Image.new("RGB", (8, 8), colour).save(path)
    return path


def test_the_grid_shows_each_image_in_its_place(tmp_path: Path):
    files = [image(tmp_path / f"{colour}.png", colour) for colour in ("red", "blue", "lime", "black")]
    label = "a prompt in 漢字 " * 30
    path = write_grid(tmp_path / "grid.png", ("base", "adapter"), [(label, files[:2]), ("two", files[2:])])
    with Image.open(path) as grid:
        assert grid.size == (8 + 2 * 168, 24 + 2 * 184)
        centres = [(88, 120), (256, 120), (88, 304), (256, 304)]
        assert [grid.getpixel(c) for c in centres] == [(255, 0, 0), (0, 0, 255), (0, 255, 0), (0, 0, 0)]
    files[1].unlink()
    write_grid(path, ("base", "adapter"), [(label, files[:2]), ("two", files[2:])])
    with Image.open(path) as grid:
        assert [grid.getpixel(c) for c in centres] == [(255, 0, 0), (255, 255, 255), (0, 255, 0), (0, 0, 0)]
