"""What tasks of plug-ins read folders of images with."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from adapterkit.errors import DataError
from adapterkit.training.data import captioned_images, cover, examine, image_files, open_image
from adapterkit.training.data_files import Notes, content_key


def test_images_of_a_folder_with_what_they_show(tmp_path: Path):
    for name in ("a", "b"):
        Image.new("RGB", (8, 4), "red").save(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text("\ufeffa red  one")
    (tmp_path / ".hidden").mkdir()
    Image.new("RGB", (8, 4)).save(tmp_path / ".hidden" / "c.png")
    assert [path.name for path in image_files(tmp_path)] == ["a.png", "b.png"]
    assert [(one.path.name, one.caption) for one in captioned_images(tmp_path, "all")] == [
        ("a.png", "a red one"),
        ("b.png", "all"),
    ]
    with pytest.raises(DataError, match="1 of 2 images"):
        captioned_images(tmp_path, None)
    assert cover(open_image(tmp_path / "a.png"), 4, 4).shape == (3, 4, 4)
    assert examine(tmp_path / "a.png", Notes(tmp_path)) == content_key(tmp_path / "a.png")
