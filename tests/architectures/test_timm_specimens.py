"""Specimens of timm's models: small, of the same form, and with every weight in what they compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from adapterkit.testing.specimens import NoSpecimen, Specimen, specimen
from tests.architectures import catalogue

timm: Any = pytest.importorskip("timm")

FEW = ("aimv2_1b_patch14_224", "caformer_b36", "mvitv2_base", "swinv2_cr_base_224", "crossvit_9_240", "levit_128")


def check(name: str) -> Specimen:
    """Raises AssertionError where the specimen is none."""
    skeleton = catalogue.skeleton("timm", name)
    made = specimen(skeleton)
    assert type(made.model) is type(skeleton)
    assert {p.dtype for p in made.model.parameters()} == {torch.float64}
    assert not any(p.requires_grad or not p.any() for p in made.model.parameters())
    assert not any(module.training for module in made.model.modules())
    first, again = (made.calls["images"]() for _ in range(2))
    assert torch.equal(first, again)
    assert first.isfinite().all()
    assert not torch.allclose(first[0], first[1])  # the images differ, and what is computed sees it
    return made


@pytest.mark.parametrize("name", FEW)
def test_a_copy_is_small_and_alike(name: str) -> None:
    assert sum(p.numel() for p in check(name).model.parameters()) < 400_000


@pytest.mark.slow
@pytest.mark.parametrize("name", catalogue.names("timm"))
def test_every_module_of_timm_has_a_specimen(name: str) -> None:
    check(name)


def test_a_copy_is_the_same_each_time() -> None:
    first, second = (specimen(catalogue.skeleton("timm", "pvt_v2_b0")) for _ in range(2))
    assert torch.equal(first.calls["images"](), second.calls["images"]())


def test_a_model_without_a_name_is_copied_with_its_weights_shape() -> None:
    model = timm.models.VisionTransformer(img_size=64, embed_dim=12, depth=1, num_heads=3, num_classes=5)
    made = specimen(model)
    assert made.calls["images"]().shape == (2, 5)
    assert made.model.blocks[0].attn.num_heads == 3  # type: ignore[union-attr]


def test_a_skeleton_without_a_name_has_none() -> None:
    with torch.device("meta"):
        model = timm.models.VisionTransformer(embed_dim=12, depth=1, num_heads=3)
    with pytest.raises(NoSpecimen, match="not made by timm"):
        specimen(model)


def test_a_model_that_its_name_does_not_tell_is_copied_itself() -> None:
    model = timm.create_model("pvt_v2_b0")
    model.stages[0].blocks[0].mlp.extra = nn.Linear(2, 2)
    assert "stages.0.blocks.0.mlp.extra.weight" in specimen(model).model.state_dict()


def test_features_only_backbones_have_one() -> None:
    made = specimen(timm.create_model("pvt_v2_b0", features_only=True))
    assert made.calls["images"]().ndim == 1
