from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from adapterkit.errors import DataError
from adapterkit.training.data import captioned_images, cover, open_image
from adapterkit.training.data_files import gather
from adapterkit.training.grid import write_grid


def image(path: Path, size: tuple[int, int] = (8, 8), colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def test_captions_come_from_the_text_file_of_the_same_name(tmp_path: Path):
    image(tmp_path / "b.png")
    image(tmp_path / "a.JPG")
    image(tmp_path / "sub/c.webp")
    (tmp_path / "a.txt").write_text("  ein\n Bär \n", encoding="utf-8")
    (tmp_path / "b.caption").write_text("a bear", encoding="utf-8")
    (tmp_path / "sub/c.txt").write_text("", encoding="utf-8")
    (tmp_path / "notes.md").write_text("no image")
    found = captioned_images(tmp_path, None)
    assert [(c.path.name, c.caption) for c in found] == [("a.JPG", "ein Bär"), ("b.png", "a bear"), ("c.webp", "")]


def test_images_without_captions_are_all_named_unless_there_is_a_fallback(tmp_path: Path):
    files = [image(tmp_path / f"{number:02}.png") for number in range(14)]
    (tmp_path / "03.txt").write_text("three")
    with pytest.raises(DataError, match=r"13 of 14 images .* lack a caption; write NAME.txt") as caught:
        captioned_images(tmp_path, None)
    assert caught.value.files == files[:3] + files[4:]
    assert "00.png" in str(caught.value)
    assert "and 3 more" in str(caught.value)
    assert [c.caption for c in captioned_images(tmp_path, "any")] == ["any"] * 3 + ["three"] + ["any"] * 10


def test_folders_that_are_absent_or_empty(tmp_path: Path):
    with pytest.raises(DataError, match="is not a folder"):
        captioned_images(tmp_path / "none", None)
    with pytest.raises(DataError, match="holds no image"):
        captioned_images(tmp_path, None)


def test_a_caption_that_is_no_text(tmp_path: Path):
    image(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"(?s)1 file: cannot be read as UTF-8 text .*; save it as UTF-8:.*a\.txt"):
        captioned_images(tmp_path, None)


def test_every_unreadable_image_is_named(tmp_path: Path):
    good = image(tmp_path / "good.png")
    text, cut = tmp_path / "text.png", tmp_path / "cut.png"
    text.write_text("not an image")
    cut.write_bytes(image(tmp_path / "whole.png", (64, 64)).read_bytes()[:60])
    with pytest.raises(DataError, match="2 files: cannot be read as an image") as caught:
        gather([good, text, cut], open_image)
    assert caught.value.files == [text, cut]


def test_transparency_becomes_white_and_exif_turns_the_image(tmp_path: Path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    Image.new("LA", (4, 4), (0, 255)).save(tmp_path / "grey.png")
    assert open_image(tmp_path / "grey.png").getpixel((0, 0)) == (0, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (4, 8)).save(tmp_path / "turned.png", exif=exif)
    assert open_image(tmp_path / "turned.png").size == (8, 4)


def test_cover_cuts_out_the_centre_and_keeps_values(tmp_path: Path):
    wide = Image.new("RGB", (12, 4), "white")
    wide.paste((255, 0, 51), (4, 0, 8, 4))  # the middle third
    pixels = cover(wide, 4, 4)
    assert pixels.shape == (3, 4, 4)
    expected = torch.tensor([1.0, 0.0, 0.2]).view(3, 1, 1).expand(3, 4, 4)
    assert torch.equal(pixels, expected)
    assert cover(wide.convert("L"), 2, 2).shape == (1, 2, 2)


def test_the_grid_shows_each_image_in_its_place(tmp_path: Path):
    files = [image(tmp_path / f"{colour}.png", colour=colour) for colour in ("red", "blue", "lime", "black")]
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
