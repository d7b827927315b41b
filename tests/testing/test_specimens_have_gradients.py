"""What calls of a specimen give has gradients: of these a proof reads which weight reaches what."""

from __future__ import annotations

import pytest

from adapterkit.testing.specimens import specimen
from tests.architectures import catalogue


@pytest.mark.parametrize(
    ("line", "name"),
    [("causal", "llama"), ("image_text", "llava"), ("timm", "pvt_v2_b0"), ("diffusers", "PixArtTransformer2DModel")],
)
def test_outputs_depend_on_weights(line: str, name: str) -> None:
    made = specimen(catalogue.skeleton(line, name))
    made.model.requires_grad_(True)
    assert all(call().requires_grad for call in made.calls.values())
