from __future__ import annotations

import torch
from PIL import Image

from adapterkit.training.image_files import unit_tensor
from adapterkit.training.pictures.buckets import Frame
from adapterkit.training.pictures.looks import Look, Variety

PLAIN = (1.0, 1.0, 1.0)


def wide() -> Image.Image:
    image = Image.new("RGB", (12, 4), (10, 20, 30))
    image.paste((200, 100, 50), (8, 0, 12, 4))
    return image


def test_a_crop_is_the_part_that_its_place_says():
    frames = [Frame((4, 12), (4, 4), at) for at in (0.0, 0.5, 1.0)]
    for frame in frames:
        top, left = frame.corner
        expected = unit_tensor(wide().crop((left, top, left + 4, top + 4)))
        assert torch.equal(Look(frame).of(wide()), expected)
        assert torch.equal(Look(frame, mirrored=True).of(wide()), expected.flip(-1))


def test_a_tint_changes_brightness_contrast_and_saturation():
    look = Look(Frame((4, 12), (4, 12)), tint=(1.2, 1.0, 1.0))
    assert torch.allclose(look.of(wide()) * 255, (Look(look.frame).of(wide()) * 255) * 1.2, atol=1)
    grey = Look(look.frame, tint=(1.0, 1.0, 0.0)).of(wide())
    assert torch.equal(grey, grey[:1].expand(3, -1, -1))
    flat = Look(look.frame, tint=(1.0, 0.0, 1.0)).of(wide())
    assert flat.max() == flat.min()


def test_a_mask_is_cut_as_its_picture_whatever_its_size():
    mask = Image.new("L", (24, 8))
    mask.paste(255, (16, 0, 24, 8))
    look = Look(Frame((4, 12), (4, 4), 1.0), tint=(0.5, 1.0, 1.0))
    assert torch.equal(look.of_mask(mask), torch.ones(1, 4, 4))
    assert torch.equal(Look(Frame((4, 12), (4, 4), 0.5)).of_mask(mask), torch.zeros(1, 4, 4))


def test_looks_are_different_ones():
    frame = Frame((4, 12), (4, 4))
    assert Variety().looks(frame, "a") == [Look(frame)]
    assert Variety(flip=True).looks(frame, "a") == [Look(frame), Look(frame, mirrored=True)]
    crops = Variety(crops=True, count=3).looks(frame, "a")
    assert [look.frame.at for look in crops] == [0.0, 0.5, 1.0]
    assert {look.tint for look in crops} == {PLAIN}
    whole = Frame((4, 4), (8, 8))
    assert Variety(crops=True, flip=True).looks(whole, "a") == [Look(whole), Look(whole, mirrored=True)]


def test_colours_follow_from_the_picture_and_stay_mild():
    frame = Frame((4, 4), (4, 4))
    looks = Variety(colour=0.1, count=30, flip=True).looks(frame, "a")
    assert looks == Variety(colour=0.1, count=30, flip=True).looks(frame, "a")
    assert looks != Variety(colour=0.1, count=30, flip=True).looks(frame, "b")
    assert looks[0].tint == PLAIN
    factors = torch.tensor([look.tint for look in looks[2:]])
    assert len(looks) == 60
    assert 0.9 <= factors.min() < 0.93
    assert 1.07 < factors.max() <= 1.1
    assert looks[2].tint == looks[3].tint
    assert [look.mirrored for look in looks[:4]] == [False, True, False, True]


def test_holes_are_rectangles_that_follow_from_the_picture():
    frame = Frame((40, 80), (40, 80))
    looks = Variety(holes=True, flip=True, count=20).looks(frame, "a")
    assert looks == Variety(holes=True, flip=True, count=20).looks(frame, "a")
    assert looks != Variety(holes=True, flip=True, count=20).looks(frame, "b")
    assert Look(frame).of_hole() is None
    assert len(looks) == 40
    for look in looks:
        mask = look.of_hole()
        assert mask is not None
        assert mask.shape == (1, 40, 80)
        rows, columns = (mask[0].amax(axis).nonzero()[:, 0] for axis in (1, 0))
        assert mask.sum() == len(rows) * len(columns)
        assert rows[-1] - rows[0] == len(rows) - 1
        assert 10 <= len(rows) <= 31
        assert 20 <= len(columns) <= 61
