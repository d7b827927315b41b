from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adapterkit.errors import ConfigError
from adapterkit.training.config import check_section
from adapterkit.training.pictures.options import PictureOptions


def options(**values: Any) -> PictureOptions:
    problems: list[str] = []
    found = check_section(PictureOptions, values, problems, "options.")
    assert problems == []
    assert isinstance(found, PictureOptions)
    return found


def problems(**values: Any) -> list[str]:
    found: list[str] = []
    assert check_section(PictureOptions, values, found, "options.") is None
    return found


def test_a_concept_has_the_common_keys_that_it_does_not_have_itself():
    found = options(
        trigger="sks",
        flip=True,
        caption="x",
        concepts=[{"folder": "a"}, {"folder": "b", "trigger": "two", "flip": False}, {"folder": "c", "prior": True}],
    )
    assert [(c.trigger, c.flip, c.caption) for c in found.folders()] == [
        ("sks", True, "x"),
        ("two", False, "x"),
        ("", True, "x"),
    ]
    assert options(**found.model_dump()) == found  # the resolved file is a run file


def test_without_concepts_all_of_the_data_is_one():
    [concept] = options(trigger="sks", shuffle_tags=True).folders()
    assert (concept.folder, concept.trigger, concept.shuffle_tags, concept.repeats) == (".", "sks", True, None)


def test_mistakes_are_told_with_their_places():
    told = problems(concepts=[{"folder": "a", "repeat": 2}, {"trigger": "x"}, {"folder": "b", "generate": 5}, "c"])
    assert [line.partition(":")[0] for line in told[1:]] == [
        "options.concepts.1.folder",
        "options.concepts.2",
        "options.concepts.3",
    ]
    assert told[0].startswith("unknown key 'options.concepts.0.repeat'")
    assert "generate needs prior: true and a caption" in told[2]


def test_where_masks_are(tmp_path: Path):
    for told, expected in ((None, None), ("alpha", None), ("files", "files"), ("m", tmp_path / "m")):
        found = options(masks=told)
        assert found.reading(found.folders()[0], tmp_path).masks == expected


def test_pictures_keep_their_shapes_unless_a_height_and_a_width_are_asked_for():
    assert options().buckets_of((512, 512), 8).of((400, 800)) == (320, 704)
    assert options(resolution=512).buckets_of((512, 512), 8).step == 64
    assert options(resolution=[512, 512]).buckets_of((512, 512), 8).of((400, 800)) == (512, 512)
    assert options(resolution=[512, 512], buckets=True).buckets_of((512, 512), 8).of((400, 800)) == (320, 704)
    assert options(buckets=False).buckets_of((512, 512), 8).of((400, 800)) == (512, 512)
    with pytest.raises(ConfigError, match="bucket_step: must be a multiple of 16, not 24"):
        options(bucket_step=24).buckets_of((512, 512), 16)
