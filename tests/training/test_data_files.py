"""What folders hold beside data is left out and told; so is what cannot be reached."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from adapterkit.errors import DataError
from adapterkit.training.data_files import Notes, content_key, listed, walk
from adapterkit.training.image_folder import image_files


def touch(*paths: Path, content: bytes = b"x") -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def names(folder: Path) -> tuple[list[str], list[str]]:
    notes = Notes(folder)
    return [path.relative_to(folder).as_posix() for path in walk(folder, notes)], notes.sentences()


def test_what_is_hidden_is_left_out_and_told_once(tmp_path: Path):
    touch(tmp_path / "a.png", tmp_path / "._a.png", tmp_path / ".trash/b.png", tmp_path / "__MACOSX/a.png")
    touch(tmp_path / "sub/.ipynb_checkpoints/c.png", tmp_path / "sub/Thumbs.db")
    found, told = names(tmp_path)
    assert found == ["a.png"]
    assert told == ["left out, hidden: 5 (._a.png, .trash, __MACOSX, ...)"]


def test_data_below_a_hidden_folder_is_data(tmp_path: Path):
    touch(tmp_path / ".cache/data/a.png")
    assert names(tmp_path / ".cache/data") == (["a.png"], [])


def test_links_are_followed_but_not_in_circles_nor_to_nowhere(tmp_path: Path):
    data = tmp_path / "data"
    touch(data / "a/1.png", tmp_path / "elsewhere/2.png")
    (data / "b").symlink_to(tmp_path / "elsewhere")
    (data / "a/again").symlink_to(data)
    (data / "gone.png").symlink_to(tmp_path / "none.png")
    (data / "itself.png").symlink_to(data / "itself.png")
    os.mkfifo(data / "pipe.png")
    assert names(data) == (
        ["a/1.png", "b/2.png"],
        [
            "left out, a link to a folder that it lies in: 1 (a/again)",
            "left out, a link that leads nowhere: 2 (gone.png, itself.png)",
            "left out, neither a file nor a folder: 1 (pipe.png)",
        ],
    )


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    touch(tmp_path / "closed/a.png")
    listing = Path.iterdir

    def refuse(self: Path) -> object:
        if self.name == "closed":
            raise PermissionError(13, "Permission denied")
        return listing(self)

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(DataError, match=r"(?s)cannot be listed \(Permission denied\).*closed"):
        walk(tmp_path)


def test_names_steer_no_terminal():
    assert listed(["a\x1b[2J.png", "b\n.png", "c\udcff.png"]) == r"3 (a\x1b[2J.png, b\n.png, c\udcff.png)"


def test_a_content_key_follows_the_contents_alone(tmp_path: Path):
    touch(tmp_path / "a", tmp_path / "b")
    os.utime(tmp_path / "b", (1, 1))
    before = content_key(tmp_path / "a")
    assert before == content_key(tmp_path / "b")
    status = (tmp_path / "a").stat()
    touch(tmp_path / "a", content=b"y")
    os.utime(tmp_path / "a", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert content_key(tmp_path / "a") != before
    with pytest.raises(DataError, match="cannot be read"):
        content_key(tmp_path / "none")


def test_endings_in_any_case_and_what_is_no_image(tmp_path: Path):
    for name in ("a.GIF", "b.tif", "c.jfif", "d.Webp", "e.heic", "notes"):
        touch(tmp_path / name)
    notes = Notes(tmp_path)
    assert [path.name for path in image_files(tmp_path, notes)] == ["a.GIF", "b.tif", "c.jfif", "d.Webp"]
    assert notes.sentences() == ["left out, not a kind of image that is read: 2 (e.heic, notes)"]
