"""Architectures of which numbers once denied something: nothing that is said of them is false."""

from __future__ import annotations

from typing import Any

import pytest

from adapterkit.mapping.model import map_model
from tests.architectures import catalogue, rows

ONCE_FALSE = (
    ("masked", "electra"),  # a prompt as wide as its blocks, which is not as wide as the embeddings
    ("image_text", "gemma3"),  # no prompt where the model around makes the masks
    ("causal", "zamba2"),  # modules that never run, and whose weights are others'
    ("image_text", "blip"),  # blocks of two towers with one number
    ("image_text", "ovis2"),  # a tied head that says another width than its weight has
    ("image_text", "kosmos-2.5"),  # attentions that never find what is registered with transformers' interface
    ("timm", "xcit_large_24_p8_224"),  # blocks whose sum is of what their norm gives
    ("timm", "convit_base"),  # a sum of two softmaxes, which no keys can join
)
NONE = {"zamba2": {"outputs"}}
"""What they do not offer."""


@pytest.mark.parametrize(("line", "name"), ONCE_FALSE)
def test_what_was_false_is_mended(line: str, name: str) -> None:
    row = rows.made(line, name)
    assert not row.unproven, row.unproven
    assert not row.wrong, row.wrong
    assert {claim for claim, said in row.claims.items() if said != "proven"} == NONE.get(name, set())


def test_what_is_withheld_in_a_model_is_told() -> None:
    model: Any = catalogue.skeleton("image_text", "gemma3")
    mapped = map_model(model)
    assert [point.component for point in mapped.points() if point.role == "prompt"] == ["vision"]
    assert any("Gemma3Model makes the masks" in why for why in mapped.remarks().values())
    alone = map_model(model.model.language_model)
    assert [point.component for point in alone.points() if point.role == "prompt"] == ["language"]


def test_an_embedding_that_codes_of_pictures_are_looked_up_in_is_no_sequence() -> None:
    mapped = map_model(catalogue.skeleton("image_text", "emu3"))
    assert not [point.id for point in mapped.points() if point.role == "tokens"]
    assert any("Emu3Model looks up codes of pictures" in why for why in mapped.remarks().values())
