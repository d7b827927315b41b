"""Pictures of every kind of sample become upright images of 8 bits that look the same."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from adapterkit.errors import DataError
from adapterkit.training.data_files import Notes
from adapterkit.training.image_files import cover, image_size, open_alpha, open_image

RAMP = np.linspace(0, 1, 256).reshape(16, 16)
GREY = np.rint(RAMP * 255).astype("uint8")


def read(path: Path, mode: str = "L") -> tuple[np.ndarray, list[str]]:
    notes = Notes(path.parent)
    return np.asarray(open_image(path, mode, notes)), notes.sentences()


def assert_grey(path: Path, *told: str) -> None:
    found, notes = read(path)
    assert np.abs(found.astype(int) - GREY).max() <= 1
    assert notes == [f"{sentence}: 1 ({path.name})" for sentence in told]


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bits(tmp_path: Path, name: str):
    Image.fromarray(np.rint(RAMP * 65535).astype("uint16")).save(tmp_path / name)
    assert_grey(tmp_path / name)


def test_sixteen_bits_that_use_a_small_part_of_their_range_stay_dark(tmp_path: Path):
    Image.fromarray(np.rint(RAMP * 200).astype("uint16")).save(tmp_path / "a.png")
    assert read(tmp_path / "a.png")[0].max() == 1


@pytest.mark.parametrize(("white", "dtype"), [(1, "float32"), (255, "float32"), (255, "int32"), (65535, "int32")])
def test_samples_of_32_bits_are_scaled_by_the_range_that_they_fit(tmp_path: Path, white: int, dtype: str):
    samples = RAMP * white if dtype == "float32" else np.rint(RAMP * white)
    Image.fromarray(samples.astype(dtype)).save(tmp_path / "a.tif")
    assert_grey(tmp_path / "a.tif", f"samples of 32 bits, where {white} is taken for white")


@pytest.mark.parametrize("odd", [np.nan, -1.0, 1e6, np.inf])
def test_samples_without_a_known_range_are_refused(tmp_path: Path, odd: float):
    samples = RAMP.astype("float32")
    samples[3, 3] = odd
    Image.fromarray(samples).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"(?s)not known what is white.*a\.tif"):
        open_image(tmp_path / "a.tif")


def test_modes_of_eight_bits_and_less(tmp_path: Path):
    grey = Image.fromarray(GREY)
    grey.convert("P").save(tmp_path / "palette.gif")
    grey.convert("RGB").convert("CMYK").save(tmp_path / "print.tif")
    for name in ("palette.gif", "print.tif"):
        assert_grey(tmp_path / name)
    Image.fromarray(GREY > 99).save(tmp_path / "bits.png")
    assert np.array_equal(read(tmp_path / "bits.png")[0], 255 * (GREY > 99))


@pytest.mark.parametrize("mode", ["LA", "RGBA", "PA", "P"])
def test_transparent_parts_become_white_and_are_told(tmp_path: Path, mode: str):
    image = Image.new("RGBA", (4, 4), (10, 10, 10, 255))
    image.paste((10, 10, 10, 0), (0, 0, 2, 4))
    name = "a.png" if mode != "PA" else "a.tif"
    if mode == "P":
        palette = Image.new("P", (4, 4), 1)
        palette.paste(0, (0, 0, 2, 4))
        palette.putpalette([0, 0, 0, 10, 10, 10])
        palette.save(tmp_path / name, transparency=b"\0\xff")
    else:
        image.convert("LA" if mode == "PA" else mode).save(tmp_path / name)
    found, told = read(tmp_path / name)
    assert found[0].tolist() == [255, 255, 10, 10]
    assert told == [f"transparent parts, which become white: 1 ({name})"]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "a.webp"])
def test_every_orientation_is_undone_once(tmp_path: Path, name: str, orientation: int):
    image = Image.new("L", (32, 16))
    image.paste(255, (0, 0, 8, 8))  # the corner of the picture as it is stored
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / name, exif=exif, quality=95)
    found, _ = read(tmp_path / name)
    height, width = found.shape
    corners = {(0, 0): found[3, 3], (0, 1): found[3, -4], (1, 1): found[-4, -4], (1, 0): found[-4, 3]}
    right = dict(zip(range(1, 9), [(0, 0), (0, 1), (1, 1), (1, 0), (0, 0), (0, 1), (1, 1), (1, 0)], strict=True))
    assert (width, height) == ((16, 32) if orientation > 4 else (32, 16))
    assert corners[right[orientation]] > 200 > 50 > sum(corners.values()) - corners[right[orientation]]


def test_damaged_metadata_leave_the_pixels(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, (72, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Image.fromarray(GREY).save(tmp_path / "good.jpg", exif=exif)
    good = (tmp_path / "good.jpg").read_bytes()
    at = max(good.find(b"MM\0*"), good.find(b"II*\0"))
    told = set()
    for place in range(0, 40, 3):
        for value in (0, 2, 5, 255):
            data = bytearray(good)
            data[at + place] = value
            (tmp_path / "bad.jpg").write_bytes(bytes(data))
            found, notes = read(tmp_path / "bad.jpg")
            assert found.shape == (16, 16)
            told |= {note.partition(":")[0] for note in notes}
    assert told & {"damaged EXIF data, taken as it is stored", "read with a warning (Corrupt EXIF data)"}


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tif", "a.bmp"])
def test_a_file_that_is_cut_off_or_empty_is_named(tmp_path: Path, name: str):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype="uint8")
    Image.fromarray(noise).save(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for length in (0, 20, len(whole) // 2):
        (tmp_path / name).write_bytes(whole[:length])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(DataError, match=f"cannot be read as an image .*\n.*{name}"):
                open_image(tmp_path / name)


def test_several_frames_are_told(tmp_path: Path):
    frames = [Image.new("L", (4, 4), shade) for shade in (30, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    found, told = read(tmp_path / "a.gif")
    assert found[0, 0] == 30
    assert told == ["several frames, of which the first is used: 1 (a.gif)"]


def test_what_an_ending_hides_runs_no_program(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with pytest.raises(DataError, match="of no format that is read"):
        open_image(tmp_path / "a.png")


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


def test_opacity_is_read_upright_where_there_is_any(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("LA", (4, 8), (7, 40))
    image.putpixel((0, 7), (7, 255))
    image.save(tmp_path / "a.png", exif=exif)
    alpha = open_alpha(tmp_path / "a.png")
    assert alpha is not None
    assert (alpha.mode, alpha.size, alpha.getpixel((0, 0)), alpha.getpixel((1, 0))) == ("L", (8, 4), 255, 40)
    Image.new("RGB", (4, 8)).save(tmp_path / "b.png")
    assert open_alpha(tmp_path / "b.png") is None
    (tmp_path / "c.png").write_text("x")
    with pytest.raises(DataError, match="cannot be read as an image"):
        open_alpha(tmp_path / "c.png")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_the_size_of_an_image_is_that_of_the_upright_one(tmp_path: Path, ending: str, orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{ending}"
    Image.effect_noise((103, 50), 90).save(path, exif=exif)
    image, notes = open_image(path), Notes(tmp_path)
    assert image_size(path, notes) == (image.height, image.width)
    assert notes.sentences() == []


@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
def test_the_size_of_a_damaged_image_is_none(tmp_path: Path, ending: str):
    path = tmp_path / f"a.{ending}"
    Image.effect_noise((200, 100), 90).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 9 // 10])
    for read in (image_size, lambda path, notes: open_image(path, notes=notes)):
        with pytest.raises(DataError, match="cannot be read as an image"):
            read(path, Notes(tmp_path))
