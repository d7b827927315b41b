from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from adapterkit.errors import DataError
from adapterkit.training.data_files import content_key
from adapterkit.training.image_files import unit_tensor
from adapterkit.training.pictures.options import PictureOptions
from adapterkit.training.pictures.survey import Picture, survey


def picture(path: Path, size: tuple[int, int] = (8, 8), mode: str = "RGB", colour: Any = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


def surveyed(data: Path, **values: Any) -> tuple[dict[str, Picture], dict[str, str], list[str]]:
    pictures, record = survey(data, PictureOptions.model_validate(values))
    names = {item.path.relative_to(data).as_posix(): item for item in pictures}
    return names, dict(record.files), list(record.notes)


def test_sizes_captions_repeats_and_what_a_run_keeps(tmp_path: Path):
    picture(tmp_path / "3_dog/a.png", (12, 8))
    picture(tmp_path / "b.png")
    (tmp_path / "b.txt").write_text("b")
    pictures, files, notes = surveyed(tmp_path, trigger="sks")
    assert [(p.size, p.caption, p.repeats) for p in pictures.values()] == [
        ((8, 12), "sks, dog", 3),
        ((8, 8), "sks, b", 1),
    ]
    assert files == {name: content_key(tmp_path / name) for name in ("3_dog/a.png", "b.png", "b.txt")}
    assert notes == ["shown 3 times each, as the folder's name says: 1 (3_dog)"]


def test_what_there_is_is_told(tmp_path: Path):
    picture(tmp_path / "a.png", (12, 8))
    picture(tmp_path / "b.png", (10, 20))
    picture(tmp_path / "b.mask.png", (10, 20), "L", 255)
    (tmp_path / "b.txt").write_text("b and some more")
    _, record = survey(tmp_path, PictureOptions.model_validate({"trigger": "sks", "caption": "x", "masks": "files"}))
    assert record.facts == {
        "pictures": "2, of 10 x 8 to 12 x 20 pixels",
        "without a caption of their own": "1",
        "with a mask": "1",
        "longest caption": "5 words, of b.png",
    }


def test_concepts_with_keys_of_their_own_in_the_data_and_outside(tmp_path: Path):
    data = tmp_path / "data"
    picture(data / "10_cat/a.png")
    picture(data / "left out/a.png")
    picture(tmp_path / "dogs/a.png")
    concepts = [
        {"folder": "10_cat", "trigger": "sks cat", "repeats": 2, "caption": "a cat"},
        {"folder": "../dogs", "prior": True, "weight": 0.5, "caption": "a dog"},
    ]
    pictures, record = survey(data, PictureOptions.model_validate({"trigger": "sks", "concepts": concepts}))
    assert [(p.caption, p.repeats, p.concept.prior, p.concept.weight) for p in pictures] == [
        ("sks cat, a cat", 2, False, 1.0),
        ("a dog", 1, True, 0.5),
    ]
    assert sorted(record.files) == ["../dogs/a.png", "10_cat/a.png"]


def test_pictures_of_several_concepts_are_told(tmp_path: Path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "faces/b.png")
    concepts = [{"folder": "."}, {"folder": "faces", "repeats": 2}]
    _, record = survey(tmp_path, PictureOptions.model_validate({"caption": "x", "concepts": concepts}))
    assert record.notes == ["in folders of several concepts, and shown for each: 1 (faces/b.png)"]


def test_a_folder_that_the_base_fills_may_be_empty_and_is_not_kept(tmp_path: Path):
    picture(tmp_path / "cat/a.png")
    prior = {"folder": "some", "prior": True, "generate": 4, "caption": "a cat"}
    values = {"caption": "x", "concepts": [{"folder": "cat"}, prior]}
    assert len(surveyed(tmp_path, **values)[0]) == 1
    picture(tmp_path / "some/a.png")
    pictures, files, _ = surveyed(tmp_path, **values)
    assert len(pictures) == 2
    assert list(files) == ["cat/a.png"]
    with pytest.raises(DataError, match=r"holds nothing to learn: all of options.concepts are priors"):
        surveyed(tmp_path, concepts=[prior])


def test_every_unreadable_picture_is_named(tmp_path: Path):
    whole = picture(tmp_path / "whole.png", (64, 64))
    bad = [tmp_path / "cut.png", tmp_path / "text.png"]
    bad[0].write_bytes(whole.read_bytes()[:60])
    bad[1].write_text("not an image")
    with pytest.raises(DataError, match="2 files: cannot be read as an image") as caught:
        surveyed(tmp_path, caption="x")
    assert caught.value.files == bad


def test_masks_of_opacity_and_of_files(tmp_path: Path):
    clear = Image.new("RGBA", (8, 4), (255, 0, 0, 0))
    clear.paste((0, 0, 255, 255), (0, 0, 4, 4))
    clear.save(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    picture(tmp_path / "b.mask.png", (16, 16), "L", 255)
    pictures, files, notes = surveyed(tmp_path, caption="x", masks="alpha")
    mask = pictures["a.png"].mask
    assert mask is not None
    assert torch.equal(unit_tensor(mask.read()), torch.tensor([1.0] * 4 + [0.0] * 4).expand(1, 4, 8))
    assert pictures["b.png"].mask is None
    assert "without a mask, and learnt whole: 1 (b.png)" in notes
    assert "b.mask.png" not in files
    pictures, files, notes = surveyed(tmp_path, caption="x", masks="files")
    assert pictures["a.png"].mask is None
    mask = pictures["b.png"].mask
    assert mask is not None
    assert mask.path == tmp_path / "b.mask.png"
    assert files["b.mask.png"] == mask.key == content_key(mask.path)
    assert "without a mask, and learnt whole: 1 (a.png)" in notes


@pytest.mark.parametrize(
    ("size", "colour", "message"),
    [((8, 16), 255, "its mask has another shape: 16 x 8 pixels, and the picture 8 x 8"), ((8, 8), 0, "mask is black")],
)
def test_masks_that_cannot_be_meant(tmp_path: Path, size: tuple[int, int], colour: int, message: str):
    path = picture(tmp_path / "b.png")
    picture(tmp_path / "b.mask.png", size, "L", colour)
    with pytest.raises(DataError, match=message) as caught:
        surveyed(tmp_path, caption="x", masks="files")
    assert caught.value.files == [path]


def test_processes_that_look_at_pictures_say_what_one_says(tmp_path: Path):
    for number in range(20):
        picture(tmp_path / "data" / f"{number:02}.png", (8, 9), "RGBA" if number == 7 else "RGB")
        picture(tmp_path / "data" / f"{number:02}.mask.png", (8, 9), "L", 255)
    Image.new("RGBA", (8, 9), (0, 0, 0, 9)).save(tmp_path / "data/07.png")
    options = PictureOptions.model_validate({"caption": "x", "masks": "files"})
    alone, others = (survey(tmp_path / "data", options, workers) for workers in (0, 1))
    assert others == alone
    assert any("transparent parts" in note for note in alone[1].notes)
    assert all(one.concept is alone[0][0].concept for one in alone[0])
    for name in ("03.png", "18.png"):
        (tmp_path / "data" / name).write_text("no picture")
    for workers in (0, 1):
        with pytest.raises(DataError, match="2 files: cannot be read as an image") as caught:
            survey(tmp_path / "data", options, workers)
        assert [path.name for path in caught.value.files] == ["03.png", "18.png"]
