from __future__ import annotations

from collections import Counter

import pytest
import torch

from adapterkit.training.pictures.wording import Wording

TAGS = "girl, red hair, hat, smile, 8k"


def said(wording: Wording, caption: str, times: int = 200) -> list[str]:
    return [wording.said(caption, torch.Generator().manual_seed(seed)) for seed in range(times)]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a cat", "sks, a cat"),
        ("", "sks"),
        ("a sks cat", "a sks cat"),
        ("a [trigger] cat", "a sks cat"),
        ("sksy things", "sks, sksy things"),
    ],
)
def test_a_trigger_is_said_once(caption: str, expected: str):
    wording = Wording(trigger="sks")
    assert wording.whole(caption) == expected
    assert set(said(wording, caption, 5)) == {expected}


def test_without_a_trigger_its_place_is_empty():
    assert Wording().whole("a [trigger] cat") == "a  cat"


def test_tags_are_shuffled_behind_those_that_are_kept():
    found = said(Wording(trigger="sks", shuffle=True, keep=1), TAGS)
    assert all(text.startswith("sks, girl, ") for text in found)
    assert all(sorted(text.split(", ")) == sorted(["sks", *TAGS.split(", ")]) for text in found)
    assert len(set(found)) == 24  # 4! orders


def test_tags_are_left_out_as_often_as_asked_but_for_those_that_are_kept():
    found = said(Wording(tag_dropout=0.25, keep=2), TAGS, 2000)
    counts = Counter(tag for text in found for tag in text.split(", "))
    assert counts["girl"] == counts["red hair"] == 2000
    assert all(0.71 < counts[tag] / 2000 < 0.79 for tag in ("hat", "smile", "8k"))
    assert all(text.split(", ") == [t for t in TAGS.split(", ") if t in text.split(", ")] for text in found)


def test_captions_are_left_out_whole():
    found = said(Wording(trigger="sks", dropout=0.2, shuffle=True), TAGS, 2000)
    assert 0.17 < found.count("") / 2000 < 0.23
    assert set(said(Wording(trigger="sks", dropout=1.0), TAGS, 5)) == {""}


def test_what_follows_in_the_generator_does_not_depend_on_what_is_said():
    after = set()
    for wording in (Wording(), Wording(shuffle=True), Wording(dropout=1.0), Wording(tag_dropout=0.5, keep=3)):
        generator = torch.Generator().manual_seed(3)
        wording.said(TAGS, generator)
        after.add(float(torch.rand((), generator=generator)))
    assert len(after) == 1


def test_other_separators():
    assert Wording(trigger="sks", separator=";").whole("a; b") == "sks; a; b"
    assert set(said(Wording(shuffle=True, separator=";"), "a, b; c", 50)) == {"a, b; c", "c; a, b"}
