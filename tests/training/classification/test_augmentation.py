"""Training images are changed by the seeds of their draws alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from transformers import ViTForImageClassification, ViTImageProcessor

from adapterkit.errors import ConfigError
from adapterkit.training.classification.augmentation import mixing, training_transform
from adapterkit.training.classification.options import Options
from adapterkit.training.classification.pictures import Item, Pictures, collated
from adapterkit.training.classification.preprocessing import Pixels, pixels_of
from adapterkit.training.order import Draw, seeded
from tests.backends.vision_models import vit_config

TINY: dict[str, Any] = {"pretrained": False, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
EVERYTHING: dict[str, Any] = {
    "crop_scale": [0.3, 1.0], "flip": True, "vertical_flip": True, "colour": 0.4, "random_erasing": 0.9,
    "auto_augment": "rand-m9-mstd0.5-inc1",
}  # fmt: skip


def asked(**options: Any) -> Options:
    return Options.model_validate(options)


@pytest.fixture(scope="module")
def pixels() -> Pixels:
    return pixels_of(timm.create_model("vit_tiny_patch16_224", **TINY, img_size=(16, 24)), "", None)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    values = np.random.default_rng(0).integers(0, 255, (6, 9, 3), dtype="uint8")
    Image.fromarray(values).resize((48, 30)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def drawn(picture: Path, pixels: Pixels, seed: int, **options: Any) -> torch.Tensor:
    data = Pictures([picture], torch.eye(2)[:1], pixels.mode, training_transform(pixels, asked(**options)))
    return data[Draw(0, seed)].image


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "augmix-m5-w3", "original-mstd0.5"])
def test_the_draws_seed_decides_and_nothing_else_is_touched(picture: Path, pixels: Pixels, policy: str):
    options = {**EVERYTHING, "auto_augment": policy}
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]
    first = drawn(picture, pixels, 1, **options)
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), states[2])
    random.seed(5)
    torch.manual_seed(5)
    assert torch.equal(drawn(picture, pixels, 1, **options), first)
    assert first.shape == (3, 16, 24)
    others = [drawn(picture, pixels, seed, **options) for seed in range(2, 6)]
    assert not any(torch.equal(first, other) for other in others)


def test_without_changes_an_image_is_as_it_is_measured(picture: Path, pixels: Pixels):
    assert torch.equal(drawn(picture, pixels, 3), pixels.read(picture))
    looks = {seed: drawn(picture, pixels, seed, flip=True) for seed in range(8)}
    straight, mirrored = pixels.read(picture), pixels.read(picture).flip(-1)
    assert {torch.equal(look, straight) for look in looks.values()} == {True, False}
    assert all(torch.equal(look, straight) or torch.equal(look, mirrored) for look in looks.values())


@pytest.mark.parametrize("rescale", [True, False])
def test_values_are_those_of_the_models_own_processor(tmp_path: Path, rescale: bool):
    model = ViTForImageClassification(vit_config(num_labels=3))
    scale = 1 if rescale else 255
    mean, std = [0.1 * scale, 0.2 * scale, 0.3 * scale], [0.4 * scale, 0.5 * scale, 0.6 * scale]
    processor = ViTImageProcessor(
        size={"height": 8, "width": 8}, image_mean=mean, image_std=std, do_rescale=rescale, resample=2
    )
    model.config.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    pixels = pixels_of(model, str(tmp_path), None)
    Image.new("RGB", (20, 30), (255, 0, 51)).save(tmp_path / "red.png")
    assert pixels.look.interpolation == "bilinear"
    cropped = drawn(tmp_path / "red.png", pixels, 0, crop_scale=[0.5, 0.9])
    assert torch.allclose(cropped, pixels.read(tmp_path / "red.png"), atol=1e-5)


def test_the_whole_picture_or_its_centre_where_no_crop_is_asked_for(tmp_path: Path, pixels: Pixels):
    image = Image.new("RGB", (36, 60), "white")  # of which 36 x 24 fit 24 x 16
    image.paste("black", (0, 18, 36, 42))
    image.save(tmp_path / "tall.png")
    look = drawn(tmp_path / "tall.png", pixels, 0, auto_augment="rand-m0-n0")
    assert torch.equal(look, look[:, :1, :1].expand_as(look))


def test_mixing():
    items = [Item(torch.full((1, 8, 8), float(n)), torch.eye(3)[n], n) for n in range(3)]
    for options in ({"mixup": 0.5}, {"cutmix": 1.0}, {"mixup": 1.0, "cutmix": 1.0}):
        mix = mixing(asked(**options))
        images, targets = collated(items, mix)
        again = collated(items, mix)
        assert torch.equal(images, again[0])
        assert torch.equal(targets, again[1])
        assert torch.allclose(targets.sum(-1), torch.ones(3))
        assert torch.allclose(images.mean((1, 2, 3)), targets @ torch.arange(3.0), atol=1e-5)
    assert mixing(asked(mixup=0.5, mix_probability=0)) is None
    seeds = [collated([Item(*item[:2], seed) for item in items], mixing(asked(mixup=0.5)))[1] for seed in (1, 2)]
    assert not torch.equal(*seeds)
    sometimes = mixing(asked(mixup=0.5, mix_probability=0.5))
    assert sometimes is not None
    kept = []
    for seed in range(12):
        with seeded(seed):
            kept.append(torch.equal(sometimes(torch.eye(3)[:, None, None], torch.eye(3))[1], torch.eye(3)))
    assert {*kept} == {True, False}


@pytest.mark.parametrize("policy", ["rand-q9", "none", "original-x3"])
def test_policies_that_timm_does_not_have(pixels: Pixels, policy: str):
    with pytest.raises(ConfigError, match=rf"options\.auto_augment: timm has no '{policy}'"):
        training_transform(pixels, asked(auto_augment=policy))


@pytest.mark.parametrize("policy", ["rand-m10-n8-inc1", "rand-m1-n8", "augmix-m10", "original", "v0"])
def test_policies_work_at_the_ends_of_their_magnitudes(picture: Path, pixels: Pixels, policy: str):
    """timm asks Pillow for posters of no bits."""
    for seed in range(12):
        assert drawn(picture, pixels, seed, auto_augment=policy).isfinite().all()
