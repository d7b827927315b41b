"""Images are made into what a model was trained on, as its own files say."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import timm.data
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    ConvNextImageProcessor,
    DeiTImageProcessor,
    ResNetConfig,
    ResNetForImageClassification,
    ViTForImageClassification,
    ViTImageProcessor,
)

from adapterkit.errors import ConfigError
from adapterkit.training.classification.preprocessing import Pixels, pixels_of
from tests.backends.vision_models import vit_config

NOISE = np.random.default_rng(0).integers(0, 255, (30, 52, 3), dtype="uint8")
SMALL: dict[str, Any] = {"pretrained": False, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.fromarray(NOISE).save(tmp_path / "noise.png")
    return tmp_path / "noise.png"


def vit(folder: Path, **config: Any) -> Any:
    model = ViTForImageClassification(vit_config(num_labels=3, **config))
    model.config.save_pretrained(folder)
    return model


def of(model: Any, folder: Path | str, size: tuple[int, int] | None = None) -> Pixels:
    return pixels_of(model, str(folder), size)


@pytest.mark.parametrize(
    "processor",
    [
        ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]),
        DeiTImageProcessor(size={"height": 20, "width": 20}, crop_size={"height": 8, "width": 8}, resample=0),
        ConvNextImageProcessor(size={"shortest_edge": 8}, crop_pct=0.5),
        ViTImageProcessor(size={"height": 8, "width": 12}, do_normalize=False),
        ViTImageProcessor(size={"height": 8, "width": 8}, do_rescale=False, do_normalize=False),
    ],
    ids=["mean and std", "crop and nearest", "crop_pct", "not normalised", "not rescaled"],
)
def test_a_preprocessor_config_beside_the_model_is_what_happens(processor: Any, picture: Path, tmp_path: Path):
    model = vit(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    pixels = of(model, tmp_path / "model")
    expected = AutoImageProcessor.from_pretrained(tmp_path / "model")(Image.open(picture), return_tensors="pt")
    assert torch.equal(pixels.read(picture), expected["pixel_values"][0])
    assert pixels.size == tuple(pixels.read(picture).shape[1:])
    assert pixels.note == ""
    assert torch.equal(pickle.loads(pickle.dumps(pixels)).read(picture), pixels.read(picture))  # for reading processes


def test_values_that_the_file_leaves_out_are_those_of_its_class(picture: Path, tmp_path: Path):
    model = vit(tmp_path / "model")
    (tmp_path / "model/preprocessor_config.json").write_text('{"image_processor_type": "DeiTImageProcessor"}')
    assert of(model, tmp_path / "model").read(picture).shape == (3, 224, 224)


def test_another_size_keeps_the_normalisation(tmp_path: Path):
    model = vit(tmp_path / "model")
    red = tmp_path / "red.png"
    Image.new("RGB", (9, 30), (255, 0, 51)).save(red)
    processor = ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    for changes, expected in (
        ({}, [0.9 / 0.4, -0.2 / 0.5, -0.1 / 0.6]),
        ({"do_normalize": False}, [1, 0, 0.2]),
        ({"do_normalize": False, "do_rescale": False}, [255, 0, 51]),
    ):
        processor.save_pretrained(tmp_path / "model")
        told = json.loads((tmp_path / "model/preprocessor_config.json").read_text())
        (tmp_path / "model/preprocessor_config.json").write_text(json.dumps({**told, **changes}))
        pixels = of(model, tmp_path / "model", (12, 20)).read(red).float()
        assert pixels.shape == (3, 12, 20)
        assert torch.allclose(
            pixels, torch.tensor(expected, dtype=torch.float32).view(3, 1, 1).expand(3, 12, 20), atol=1e-5
        )


def test_a_processor_that_keeps_sides_as_they_are_is_cut_to_the_models_size(picture: Path, tmp_path: Path):
    model = vit(tmp_path / "model", image_size=[8, 12])
    ViTImageProcessor(do_resize=False, image_mean=[0.0] * 3, image_std=[0.5] * 3).save_pretrained(tmp_path / "model")
    pixels = of(model, tmp_path / "model").read(picture)
    assert pixels.shape == (3, 8, 12)
    assert 1 < pixels.max() <= 2


@pytest.mark.parametrize("content", [None, '{"image_processor_type": "NobodysImageProcessor"}', "{"])
def test_where_nothing_is_told_that_is_told(picture: Path, tmp_path: Path, content: str | None):
    model = vit(tmp_path / "model")
    if content is not None:
        (tmp_path / "model/preprocessor_config.json").write_text(content)
    pixels = of(model, tmp_path / "model")
    assert "preprocessor_config.json" in pixels.note
    assert "images are cut to 8 x 8, with values from -1 to 1" in pixels.note
    assert -1 <= pixels.read(picture).min() < 0 < pixels.read(picture).max() <= 1


def test_a_model_that_tells_no_size_has_the_usual_one(tmp_path: Path):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_channels=1)
    pixels = of(ResNetForImageClassification(config), tmp_path)
    assert (pixels.size, pixels.channels) == ((224, 224), 1)


@pytest.mark.parametrize("size", [(16, 16), (16, 32)])
def test_timms_own_evaluation(picture: Path, size: tuple[int, int]):
    changes = {"crop_pct": 0.6, "interpolation": "bilinear", "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    model: Any = timm.create_model("vit_tiny_patch16_224", **SMALL, img_size=size, pretrained_cfg_overlay=changes)
    config = timm.data.resolve_model_data_config(model, args={"input_size": (3, *size)})  # type: ignore[attr-defined]
    assert {key: config[key] for key in changes} == changes
    expected: Any = timm.data.create_transform(**config, is_training=False)  # type: ignore[attr-defined]
    pixels = of(model, "timm:vit_tiny_patch16_224")
    assert torch.equal(pixels.read(picture), expected(Image.open(picture)))
    assert pixels.read(picture).shape == (3, *size)
    assert torch.equal(pickle.loads(pickle.dumps(pixels)).read(picture), pixels.read(picture))


def test_channels_that_images_do_not_have_are_refused():
    model: Any = timm.create_model("vit_tiny_patch16_224", **SMALL, img_size=16, in_chans=4)
    model.pretrained_cfg["input_size"] = (4, 16, 16)
    with pytest.raises(ConfigError, match="takes 4 channels"):
        of(model, "timm:vit_tiny_patch16_224")
