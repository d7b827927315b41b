from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterkit.training.pictures.buckets import Buckets, Frame, default_step

SDXL = Buckets((1024, 1024), 64)
SIDES = st.integers(1, 5000)


def test_the_buckets_of_sdxl():
    expected = {(512, 2048), (576, 1792), (640, 1600), (768, 1344), (832, 1216), (896, 1152), (960, 1088), (1024, 1024)}
    assert expected | {(b, a) for a, b in expected} <= set(SDXL.sizes)
    assert all(a % 64 == 0 and b % 64 == 0 and a * b <= 1024**2 and max(a, b) <= 4 * min(a, b) for a, b in SDXL.sizes)


@pytest.mark.parametrize(
    ("picture", "size"),
    [
        ((300, 300), (1024, 1024)),
        ((1200, 1800), (832, 1216)),
        ((1800, 1200), (1216, 832)),
        ((900, 1600), (768, 1344)),
        ((100, 5000), (512, 2048)),
    ],
)
def test_a_picture_goes_where_least_of_it_is_cut(picture: tuple[int, int], size: tuple[int, int]):
    assert SDXL.of(picture) == size


@given(SIDES, SIDES)
def test_no_other_bucket_would_cut_less(height: int, width: int):
    chosen = Frame((height, width), SDXL.of((height, width)))
    assert chosen.cut <= min(Frame((height, width), size).cut for size in SDXL.sizes) + 1e-6


def test_a_size_that_is_no_multiple_of_the_step_is_one_of_them_and_with_step_0_the_only_one():
    assert Buckets((1000, 1000), 64).of((10, 10)) == (1000, 1000)
    assert Buckets((24, 16), 0).of((10, 300)) == (24, 16)


@given(SIDES, SIDES)
def test_without_upscaling_nothing_that_has_a_step_is_enlarged(height: int, width: int):
    buckets = Buckets((512, 512), 32, upscale=False)
    size = buckets.of((height, width))
    frame = Frame((height, width), size)
    assert frame.scale <= max(1, 32 / min(height, width))
    assert math.prod(size) <= 512**2
    assert max(size) <= 4 * min(size)


def test_a_model_may_limit_the_longest_side():
    buckets = Buckets((1024, 1024), 64, longest=1200)
    assert max(max(size) for size in buckets.sizes) == 1152
    assert buckets.of((100, 5000)) == (320, 1152)
    assert Buckets((16, 16), 2, longest=16).of((16, 20)) == (12, 16)


def test_the_step_follows_the_size_and_the_model():
    assert [default_step((side, side), 8) for side in (1024, 512, 256, 100)] == [64, 64, 32, 8]
    assert default_step((16, 16), 2) == 2
    assert default_step((512, 512), 16) == 64


def test_what_is_cut_and_where():
    frame = Frame((300, 900), (512, 512))
    assert frame.cut == pytest.approx(2 / 3)
    assert frame.resized == (512, 1536)
    assert frame.corner == (0, 512)
    assert Frame((300, 900), (512, 512), at=1.0).corner == (0, 1024)
    assert frame.scale == pytest.approx(512 / 300)


def test_sdxl_is_told_the_size_of_the_file_and_where_it_is_cut():
    frame = Frame((600, 1000), (832, 1216), at=0.0)
    assert frame.resized == (832, 1387)
    assert frame.conditioning(mirrored=False) == [600, 1000, 0, 0, 832, 1216]
    assert frame.conditioning(mirrored=True) == [600, 1000, 0, 171, 832, 1216]


@given(SIDES, SIDES, st.floats(0, 1))
def test_what_is_kept_lies_in_the_resized_picture(height: int, width: int, at: float):
    frame = Frame((height, width), SDXL.of((height, width)), at)
    assert all(
        0 <= corner <= whole - kept for corner, whole, kept in zip(frame.corner, frame.resized, frame.size, strict=True)
    )
    assert 0 <= frame.cut < 1 or frame.cut == pytest.approx(0, abs=1e-9)
