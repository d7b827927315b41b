"""Classifiers of every build: one head or two, square or not, of the size that they were made for or another."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import (
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    LevitConfig,
    LevitForImageClassification,
    LevitForImageClassificationWithTeacher,
    RegNetConfig,
    RegNetForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SwiftFormerConfig,
    SwiftFormerForImageClassification,
    ViTForImageClassification,
)

from adapterkit.errors import ConfigError, PluginError
from adapterkit.training.classification import pictures, preprocessing, reading
from adapterkit.training.classification.targets import targets_of
from adapterkit.training.classification.task import ImageClassificationTask
from adapterkit.training.classifiers import heads_of, in_order_of, take_size
from adapterkit.training.data_record import read_record
from adapterkit.training.image_files import open_image
from adapterkit.training.loading import checkpoint_activations, load_image_classifier
from adapterkit.training.loop import train
from tests.backends.vision_models import vit_config
from tests.training.classification.test_task import TIMM, make_run

CLASSES = {"ant": "red", "bee": "blue", "cow": "lime"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classes")
    for name, colour in CLASSES.items():
        (folder / name).mkdir()
        for number in range(3):
            image = Image.new("RGB", (18, 16), colour)
            image.putpixel((0, 0), (number, number, number))
            image.save(folder / name / f"{number}.png")
    return folder


LABELS: dict[str, Any] = {"num_labels": 3}


def deit() -> nn.Module:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = DeiTConfig(**sizes, image_size=16, patch_size=8, **LABELS)
    return DeiTForImageClassificationWithTeacher(config)


RESNET = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], **LABELS)


@pytest.mark.parametrize(
    ("make", "paths"),
    [
        (deit, {"cls_classifier", "distillation_classifier"}),
        (lambda: ResNetForImageClassification(RESNET), {"classifier.1"}),
        (lambda: RegNetForImageClassification(RegNetConfig(**LABELS)), {"classifier.1"}),
        (lambda: LevitForImageClassification(LevitConfig(**LABELS)), {"classifier.linear"}),
        (
            lambda: LevitForImageClassificationWithTeacher(LevitConfig(**LABELS)),
            {"classifier.linear", "classifier_distill.linear"},
        ),
        (lambda: SwiftFormerForImageClassification(SwiftFormerConfig(**LABELS)), {"head", "dist_head"}),
        (lambda: timm.create_model("deit_tiny_distilled_patch16_224", num_classes=3), {"head", "head_dist"}),
        (lambda: timm.create_model("resnet18", num_classes=3), {"fc"}),
    ],
    ids=["deit", "resnet", "regnet", "levit", "levit with a teacher", "swiftformer", "timm deit", "timm resnet"],
)
def test_heads_are_found_by_their_role(make: Any, paths: set[str]):
    with torch.device("meta"):
        model = make()
    heads = heads_of(model, 3)
    assert {id(head) for head in heads.values()} == {id(model.get_submodule(path)) for path in paths}
    assert set(heads) == paths


def test_a_model_without_a_known_head_is_refused_with_a_way_out():
    with pytest.raises(ConfigError, match=r"train_head: no layer of Sequential is known as its head.*type trainable"):
        heads_of(nn.Sequential(nn.Linear(2, 3)), 3)


def run_of(data: Path, output: Path, model: str, *overrides: str, **options: Any) -> Any:
    settings: dict[str, Any] = {"train_head": True, "validation_fraction": 0.3, **options}
    return make_run(data, output, model, "steps=2", "checkpoint_every=1", "learning_rate=0.01", *overrides, **settings)


def test_both_heads_of_a_distilled_model_are_trained_and_saved_and_come_back(data: Path, tmp_path: Path):
    options = {"model_args": TIMM}
    model = "timm:deit_tiny_distilled_patch16_224"
    train(run_of(data, tmp_path / "whole", model, **options), silent=True)
    train(run_of(data, tmp_path / "parts", model, "steps=1", **options), silent=True)
    train(run_of(data, tmp_path / "parts", model, **options), resume=True, silent=True)
    whole, parts = (load_file(tmp_path / run / "adapter.safetensors") for run in ("whole", "parts"))
    assert [tuple(whole[key].shape) for key in whole if key.endswith("/weight")] == [(3, 16), (3, 16)]
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


@pytest.mark.parametrize("make", [deit, lambda: ResNetForImageClassification(RESNET)], ids=["deit", "resnet"])
def test_models_of_transformers_with_other_heads(data: Path, tmp_path: Path, make: Any):
    model = make()
    model.save_pretrained(tmp_path / "model")
    run = run_of(data, tmp_path / "run", str(tmp_path / "model"), "adapter.targets=all", resolution=16)
    train(run, silent=True)
    old = {tuple(tensor.shape): tensor for tensor in model.state_dict().values() if tensor.shape[:1] == (3,)}
    saved = load_file(tmp_path / "run/adapter.safetensors")
    heads = [saved[key] for key in saved if key.endswith("/weight")]
    assert len(heads) == (2 if make is deit else 1)
    for head in heads:  # fresh, although the model had three outputs before
        assert (head - old[tuple(head.shape)]).abs().mean() > 0.05


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"model_args": {**TIMM, "img_size": [16, 32]}}, (16, 32)),
        ({"model_args": TIMM, "resolution": 24}, (24, 24)),
        ({"model_args": TIMM, "resolution": [24, 16]}, (24, 16)),
    ],
)
def test_sizes_of_timm(data: Path, tmp_path: Path, options: Any, shape: tuple[int, int], capsys: Any):
    train(run_of(data, tmp_path / "run", "timm:vit_tiny_patch16_224", **options))
    told = [line for line in capsys.readouterr().err.splitlines() if "interpolated" in line]
    expected = f"model: made for images of 16 x 16; its positions are interpolated for {shape[0]} x {shape[1]}"
    assert told == ([expected] if "resolution" in options else [])


def test_sizes_of_transformers(data: Path, tmp_path: Path, capsys: Any):
    ViTForImageClassification(vit_config(image_size=[8, 12])).save_pretrained(tmp_path / "wide")
    train(run_of(data, tmp_path / "own", str(tmp_path / "wide")))
    ViTForImageClassification(vit_config()).save_pretrained(tmp_path / "square")
    train(run_of(data, tmp_path / "other", str(tmp_path / "square"), resolution=[16, 8]))
    told = [line for line in capsys.readouterr().err.splitlines() if "interpolated" in line]
    assert told == ["model: made for images of 8 x 8; its positions are interpolated for 16 x 8"]


def test_interpolated_positions_are_those_of_a_model_made_for_that_size():
    torch.manual_seed(0)
    model: Any = timm.create_model("vit_tiny_patch16_224", **TIMM).eval()
    other: Any = timm.create_model("vit_tiny_patch16_224", **{**TIMM, "img_size": (24, 16)}).eval()
    other.load_state_dict({**model.state_dict(), "pos_embed": other.pos_embed})
    arguments, note = take_size(model, (24, 16))
    assert not arguments
    assert note
    other.pos_embed.data.copy_(model.pos_embed)
    images = torch.randn(2, 3, 24, 16)
    assert torch.equal(model(images), other(images))
    assert take_size(model, (24, 16)) == ({}, "")


def test_a_size_that_the_model_does_not_take_names_the_key(data: Path, tmp_path: Path):
    options = {"model_args": TIMM, "resolution": 4}
    with pytest.raises(
        ConfigError, match=r"options\.resolution: timm:vit.* does not take images of 4 x 4 .*model_args"
    ):
        train(run_of(data, tmp_path / "run", "timm:vit_tiny_patch16_224", **options), silent=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("resolution", [0, [16], [16, -1], "16", 16.0, [16, 16, 3], True])
def test_resolutions_that_are_none(data: Path, tmp_path: Path, resolution: Any):
    with pytest.raises(ConfigError, match=r"options\.resolution: .*must be a side in pixels, or \[height, width\]"):
        run_of(data, tmp_path / "run", "timm:vit_tiny_patch16_224", resolution=resolution)


class TestNames:
    """Where the model's head stays, a class is the output of its name, whatever the order of the folders."""

    @staticmethod
    def model(folder: Path, *names: str) -> str:
        labels = dict(enumerate(names))
        config = vit_config(num_labels=3, id2label=labels, label2id={name: n for n, name in labels.items()})
        ViTForImageClassification(config).save_pretrained(folder)
        return str(folder)

    def test_the_models_own_order(self, data: Path, tmp_path: Path):
        run = run_of(data, tmp_path / "run", self.model(tmp_path / "model", "Cow", "ant", "bee"), train_head=False)
        result = train(run, silent=True)
        assert result.figures["classes"] == ["cow", "ant", "bee"]
        assert read_record(tmp_path / "run/data.json").classes == ["cow", "ant", "bee"]  # type: ignore[union-attr]
        task = run.make_task()
        task.survey(None)
        task.load_model()
        rows = targets_of(task.found.all, task.classes)
        assert all(
            ["cow", "ant", "bee"][row.argmax()] == one.path.parent.name
            for row, one in zip(rows, task.found.all, strict=True)
        )

    def test_other_names_are_told(self, data: Path, tmp_path: Path):
        run = run_of(data, tmp_path / "run", self.model(tmp_path / "model", "a", "b", "c"), train_head=False)
        train(run, silent=True)
        record = read_record(tmp_path / "run/data.json")
        assert record is not None
        assert record.classes == ["ant", "bee", "cow"]
        assert record.notes[-1].startswith("the model calls its classes 3 (a, b, c); they are taken in the order")

    def test_matching(self):
        assert in_order_of(["Sea_lion", "cat"], ["cat", "sea-lion"]) == ["sea-lion", "cat"]
        assert in_order_of(["a", "b"], ["a", "c"]) is None
        assert in_order_of(["a"], ["a", "A"]) is None


@pytest.mark.parametrize("make", [lambda: ResNetForImageClassification(RESNET), nn.Identity], ids=["resnet", "torch"])
def test_a_model_that_cannot_recompute_is_told_by_its_key(make: Any):
    with pytest.raises(ConfigError, match=r"gradient_checkpointing: \w+ cannot .*; set it to false"):
        checkpoint_activations(make())


def test_arguments_that_do_not_fit_are_named(tmp_path: Path):
    with pytest.raises(
        ConfigError, match=r"options\.model_args: timm:resnet18 does not take \{'pretrained': False, 'dep"
    ):
        load_image_classifier("timm:resnet18", "float32", None, pretrained=False, depht=3)
    ViTForImageClassification(vit_config()).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"options\.model_args: .* is no model of timm, and takes none"):
        load_image_classifier(str(tmp_path), "float32", None, img_size=3)


def test_images_are_decoded_when_they_are_needed(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    alive: set[int] = set()
    most = 0

    def watched(path: Path, *arguments: Any, **keywords: Any) -> Any:
        nonlocal most
        image = open_image(path, *arguments, **keywords)
        alive.add(id(image))
        weakref.finalize(image, alive.discard, id(image))
        most = max(most, len(alive))
        return image

    for module in (preprocessing, pictures):
        monkeypatch.setattr(module, "open_image", watched)
    monkeypatch.setattr(reading, "_AT_ONCE", 2)
    train(run_of(data, tmp_path / "run", "timm:vit_tiny_patch16_224", "batch_size=2", model_args=TIMM), silent=True)
    assert 1 <= most <= 3


def test_a_built_in_task_is_no_plug_in(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(self: object) -> Any:
        raise KeyError("boom")

    monkeypatch.setattr(ImageClassificationTask, "load_model", broken)
    with pytest.raises(PluginError, match=r"^task 'image-classification': load_model raised KeyError: 'boom'"):
        train(run_of(data, tmp_path / "run", "timm:vit_tiny_patch16_224"), silent=True)
