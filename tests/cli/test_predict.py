"""`adapterkit predict`: what a trained classifier says of new images."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import load_file
from timm.models import save_for_hf
from transformers import AutoImageProcessor, CLIPImageProcessor, ViTForImageClassification, ViTImageProcessor

import adapterkit as ak
from adapterkit.cli.main import main
from adapterkit.errors import ConfigError, ModelNotFoundError
from adapterkit.training import yaml_values
from adapterkit.training.classification.preprocessing import pixels_of
from adapterkit.training.loading import load_image_classifier, reading
from adapterkit.training.loop import train
from adapterkit.training.run import load_run
from adapterkit.training.samples.places import place_of, run_of
from tests.backends.vision_models import vit_config

COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}
SIZES: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["predict", *map(str, arguments)])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("predict")
    torch.manual_seed(0)
    save_for_hf(timm.create_model("vit_tiny_patch16_224", **SIZES), str(folder / "base"), model_args=SIZES)
    for name, colour in COLOURS.items():
        (folder / "data" / name).mkdir(parents=True)
        for number in range(4):
            shade = tuple(max(0, channel - 12 * number) for channel in colour)
            Image.new("RGB", (16, 16), shade).save(folder / "data" / name / f"{number}.png")
    values = {
        "task": "image-classification", "model": str(folder / "base"), "data": str(folder / "data"),
        "output": str(folder / "run"), "adapter": {"type": "lora", "rank": 2, "targets": "linear"}, "steps": 30,
        "batch_size": 6, "learning_rate": 1e-2, "options": {"train_head": True},
    }  # fmt: skip
    train(load_run(None, **values), silent=True)
    (folder / "new").mkdir()
    Image.new("RGB", (30, 20), (250, 5, 0)).save(folder / "new/a.png")
    Image.new("RGB", (20, 20), (0, 10, 240)).save(folder / "new/b.png")
    return folder


def test_classes_and_probabilities_of_a_folder(trained: Path):
    result = call(trained / "run", trained / "new", "--json", "--top", "3")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [(Path(row["file"]).name, row["class"]) for row in rows] == [("a.png", "red"), ("b.png", "blue")]
    model: Any = load_image_classifier(str(trained / "base"), "float32", 3).eval()
    adapters = ak.Adapters(model)
    adapters.load(trained / "run/adapter.safetensors", "colours")
    adapters.activate("colours")
    pixels = pixels_of(model, "", None)
    for row in rows:
        with torch.no_grad():
            shares = model(pixels.read(Path(row["file"]))[None])[0].softmax(-1)
        told = torch.tensor([row["classes"][name] for name in COLOURS])
        assert torch.allclose(told, shares, atol=1e-5)
        assert row["probability"] == max(row["classes"].values())
        assert list(row["classes"].values()) == sorted(row["classes"].values(), reverse=True)


def test_a_file_alone_and_other_forms(trained: Path, tmp_path: Path):
    expected = json.loads(call(trained / "run", trained / "new", "--json").stdout)
    file = (
        "--model",
        trained / "base",
        trained / "run/adapter.safetensors",
        trained / "new/a.png",
        trained / "new/b.png",
    )
    assert json.loads(call(*file, "--json").stdout) == expected
    result = call(*file, "--csv", "-o", tmp_path / "out.csv")
    assert result.exit_code == 0, result.output
    with (tmp_path / "out.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert rows == [{key: str(row[key]) for key in ("file", "class", "probability")} for row in expected]
    table = call(*file, "--top", "2").stdout.splitlines()
    assert table[0].split() == ["file", "class", "probability", "likeliest"]
    assert table[1].split()[1] == "red"


def test_an_image_that_cannot_be_read_is_told_and_the_others_are_not_lost(trained: Path, tmp_path: Path):
    (tmp_path / "bad.png").write_text("no image")
    result = call(trained / "run", tmp_path / "bad.png", trained / "new", "--csv")
    assert result.exit_code == 1
    assert "bad.png: cannot be read as an image" in result.stderr
    assert len(result.stdout.splitlines()) == 3


def test_images_that_processes_read_come_in_order_and_so_do_those_that_cannot_be_read(trained: Path, tmp_path: Path):
    for number in range(36):
        if number in (5, 20):
            (tmp_path / f"{number:02}.png").write_text("no image")
        else:
            Image.new("RGB", (16, 20), (5 * number, 0, 255 - 5 * number)).save(tmp_path / f"{number:02}.png")
    alone, with_others = (call(trained / "run", tmp_path, "--csv", "--workers", workers) for workers in (0, 1))
    assert alone.exit_code == with_others.exit_code == 1
    assert with_others.stderr == alone.stderr
    assert [line.partition(":")[0] for line in alone.stderr.splitlines()] == [
        str(tmp_path / "05.png"), str(tmp_path / "20.png"),
    ]  # fmt: skip
    assert with_others.stdout == alone.stdout
    names = [Path(row["file"]).stem for row in csv.DictReader(alone.stdout.splitlines())]
    assert names == [f"{number:02}" for number in range(36) if number not in (5, 20)]


@pytest.mark.slow
def test_ctrl_c_ends_a_prediction_and_the_processes_that_read(trained: Path, tmp_path: Path):
    """As a terminal sends it: to all of them."""
    for number in range(3000):
        (tmp_path / f"{number}.png").symlink_to(trained / "new/a.png")
    arguments = [sys.executable, "-m", "adapterkit", "predict", str(trained / "run"), str(tmp_path), "--workers", "2"]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, start_new_session=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.poll() is None and len(readers := children.read_text().split()) < 2:
        time.sleep(0.05)
    assert process.poll() is None, process.communicate()
    os.killpg(process.pid, signal.SIGINT)
    _, messages = process.communicate(timeout=30)
    assert process.returncode in (1, 130)
    assert "Traceback" not in messages
    assert not [pid for pid in readers if Path(f"/proc/{pid}").exists()]


def test_a_run_that_is_not_there_is_told_with_what_is(trained: Path):
    result = call(trained / "rum", trained / "new")
    assert result.exit_code == 1
    told = " ".join(result.stderr.split())
    assert f"there is no run folder or file {trained / 'rum'} (looked in {Path.cwd()})" in told
    assert "RUN@STEP" in told
    assert "Did you mean 'run'?" in told
    assert f"no run folder or file {trained / 'rum'} " in " ".join(call(f"{trained}/rum@30", "x.png").stderr.split())


@pytest.mark.filterwarnings("default::UserWarning")
def test_what_is_no_image_in_a_folder_is_told(trained: Path, tmp_path: Path):
    shutil.copytree(trained / "new", tmp_path / "new")
    for name in ("notes.txt", ".hidden.png"):
        (tmp_path / "new" / name).write_text("no image")
    result = call(trained / "run", tmp_path / "new", "--csv")
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) == 3
    assert f"warning: {tmp_path / 'new'}: left out, hidden: 1 (.hidden.png)\n" in result.stderr
    assert "new: left out, not a kind of image that is read: 1 (notes.txt)\n" in result.stderr


def test_what_does_not_name_classes_is_refused(trained: Path, tmp_path: Path):
    model = timm.create_model("vit_tiny_patch16_224", **SIZES)
    adapters = ak.Adapters(model)
    adapters.add("mine", ak.LoRA(rank=2))
    adapters.save("mine", tmp_path / "mine.safetensors")
    arguments = (tmp_path / "mine.safetensors", trained / "new", "--model", trained / "base")
    result = call(*arguments, "--task", "image-classification")
    assert result.exit_code == 1
    assert "does not name its classes" in result.stderr


def baked(run: Path, output: Path, *more: str) -> Result:
    return CliRunner().invoke(main, ["bake", str(run), str(output), *more])


def test_a_run_is_baked_into_a_model_that_timm_loads(trained: Path, tmp_path: Path):
    result = baked(trained / "run", tmp_path / "model")
    assert result.exit_code == 0, result.output
    plain: Any = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config["label_names"] == list(COLOURS)
    expected = json.loads(call(trained / "run", trained / "new", "--json", "--top", "3").stdout)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(plain))  # type: ignore[attr-defined]
    for row in expected:
        with Image.open(row["file"]) as image, torch.no_grad():
            shares = plain(transform(image)[None])[0].softmax(-1)  # type: ignore[index]
        assert torch.allclose(shares, torch.tensor([row["classes"][name] for name in COLOURS]), atol=1e-5)
    again = baked(trained / "run", tmp_path / "model")
    assert again.exit_code == 1
    assert "exists already" in again.stderr


def test_a_run_is_baked_into_a_model_that_transformers_loads(trained: Path, tmp_path: Path):
    torch.manual_seed(0)
    ViTForImageClassification(vit_config(num_labels=5)).save_pretrained(tmp_path / "base")
    ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.4] * 3).save_pretrained(tmp_path / "base")
    config = load_run(
        trained / "run/config.yaml", ["options.multi_label=true", "bake=true", "ema=0.5"], model=str(tmp_path / "base")
    )
    done = train(config.at(tmp_path / "run"), silent=True)
    result = baked(tmp_path / "run", tmp_path / "model")
    assert result.exit_code == 0, result.output
    ours, its = (load_file(folder / "model/model.safetensors") for folder in (tmp_path, tmp_path / "run"))
    assert done.figures["baked model"] == str(tmp_path / "run/model")
    assert ours.keys() == its.keys()
    assert all(torch.equal(ours[key], its[key]) for key in ours)
    plain = ViTForImageClassification.from_pretrained(tmp_path / "model").eval()
    assert plain.config.id2label == dict(enumerate(COLOURS))
    assert plain.config.problem_type == "multi_label_classification"
    processor = AutoImageProcessor.from_pretrained(tmp_path / "model")
    [row] = json.loads(call(tmp_path / "run", trained / "new/a.png", "--json", "--top", "3").stdout)
    with Image.open(row["file"]) as image, torch.no_grad():
        shares = plain(**processor(image, return_tensors="pt")).logits[0].sigmoid()
    assert torch.allclose(shares, torch.tensor([row["classes"][name] for name in COLOURS]), atol=1e-5)


PROCESSORS: dict[str, Any] = {
    "none": None,
    "whole": ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.4] * 3),
    "cut": CLIPImageProcessor(size={"shortest_edge": 10}, crop_size={"height": 8, "width": 8}, resample=2),
}


@pytest.mark.parametrize(
    ("processor", "size"), [("none", (16, 16)), ("whole", (8, 16)), ("cut", (16, 16)), ("cut", (8, 16))]
)
def test_a_classifier_of_transformers_for_another_resolution_says_the_same_when_baked(
    trained: Path, tmp_path: Path, processor: str, size: tuple[int, int]
):
    torch.manual_seed(0)
    ViTForImageClassification(vit_config(num_labels=3)).save_pretrained(tmp_path / "base")
    if PROCESSORS[processor] is not None:
        PROCESSORS[processor].save_pretrained(tmp_path / "base")
    told = f"options.resolution={list(size)}"
    config = load_run(trained / "run/config.yaml", [told, "steps=1"], model=str(tmp_path / "base"))
    train(config.at(tmp_path / "run"), silent=True)
    assert baked(tmp_path / "run", tmp_path / "model").exit_code == 0
    plain = ViTForImageClassification.from_pretrained(tmp_path / "model").eval()
    its = AutoImageProcessor.from_pretrained(tmp_path / "model")
    [row] = json.loads(call(tmp_path / "run", trained / "new/a.png", "--json", "--top", "3").stdout)
    with Image.open(row["file"]) as image, torch.no_grad():
        inputs = its(image, return_tensors="pt")
        shares = plain(**inputs).logits[0].softmax(-1)
    assert inputs["pixel_values"].shape == (1, 3, *size)
    assert torch.allclose(shares, torch.tensor([row["classes"][name] for name in COLOURS]), atol=1e-6)


def test_a_classifier_of_timm_for_another_resolution_says_the_same_when_baked(trained: Path, tmp_path: Path):
    size = (16, 24)
    changes = {"crop_pct": 0.6, "crop_mode": "squash", "interpolation": "bilinear", "mean": [0.1, 0.2, 0.3]}
    base = timm.create_model("vit_tiny_patch16_224", **SIZES, pretrained_cfg_overlay=changes)
    save_for_hf(base, str(tmp_path / "base"), model_args=SIZES)
    told = f"options.resolution={list(size)}"
    config = load_run(trained / "run/config.yaml", [told, "steps=1"], model=str(tmp_path / "base"))
    train(config.at(tmp_path / "run"), silent=True)
    assert baked(tmp_path / "run", tmp_path / "model").exit_code == 0
    plain: Any = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    settings = timm.data.resolve_model_data_config(plain)  # type: ignore[attr-defined]
    assert {key: settings[key] for key in changes} == changes
    assert settings["input_size"] == (3, *size)
    [row] = json.loads(call(tmp_path / "run", trained / "new/a.png", "--json", "--top", "3").stdout)
    with Image.open(row["file"]) as image, torch.no_grad():
        shares = plain(timm.data.create_transform(**settings)(image)[None])[0].softmax(-1)  # type: ignore[attr-defined, index]
    assert torch.allclose(shares, torch.tensor([row["classes"][name] for name in COLOURS]), atol=1e-6)


def test_weights_that_no_file_has_are_drawn_as_in_training(trained: Path, tmp_path: Path):
    options = {"train_head": True, "model_args": {"pretrained": False, **SIZES}}
    config = load_run(
        trained / "run/config.yaml", ["steps=1", "bake=true"], model="timm:vit_tiny_patch16_224", options=options
    )
    train(config.at(tmp_path / "run"), silent=True)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert baked(tmp_path / "run", tmp_path / "model").exit_code == 0
    assert torch.equal(torch.get_rng_state(), state)
    ours, its = (load_file(folder / "model/model.safetensors") for folder in (tmp_path, tmp_path / "run"))
    assert all(torch.equal(ours[key], its[key]) for key in ours)


def test_a_run_without_classes_is_told_the_command_that_writes_its_model(trained: Path, tmp_path: Path):
    (tmp_path / "run").mkdir()
    shutil.copy(trained / "run/config.yaml", tmp_path / "run")
    adapters = ak.Adapters(timm.create_model("vit_tiny_patch16_224", **SIZES))
    adapters.add("mine", ak.LoRA(rank=2))
    adapters.save("mine", tmp_path / "run/adapter.safetensors")
    result = baked(tmp_path / "run", tmp_path / "model")
    assert result.exit_code == 1
    assert f"adapterkit bake {trained / 'base'} {tmp_path / 'run/adapter.safetensors'} {tmp_path / 'model'}" in (
        " ".join(result.stderr.split())
    )


def test_what_cannot_be_baked_is_refused(trained: Path, tmp_path: Path):
    config = load_run(trained / "run/config.yaml", ["steps=1"], adapter={"type": "bottleneck", "targets": "mlp"})
    train(config.at(tmp_path / "run"), silent=True)
    result = baked(tmp_path / "run", tmp_path / "model")
    assert result.exit_code == 1
    assert "acts on a sublayer's output, not on a weight" in result.stderr
    assert not list(tmp_path.glob("*model*"))
    file = trained / "run/config.yaml"
    second = load_run(file, ["bake=true"], adapter={"type": "bottleneck"}).at(tmp_path / "second")
    with pytest.raises(ConfigError, match=r"bake: .*Bottleneck\w*: acts otherwise than by other weights.*such as lora"):
        train(second, silent=True)
    assert not (tmp_path / "second").exists()
    with pytest.raises(ConfigError, match="bake: this task does not write models"):
        load_run(file, ["bake=true"], task="diffusion", options={})
    alone = baked(trained / "run/adapter.safetensors", tmp_path / "model")
    assert "is no run; name the model, the adapter and where to write" in alone.stderr


def test_a_run_finds_its_base_from_wherever_it_is_asked(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It was started in a folder from which it names its base; a base that is told counts from here."""
    shutil.copytree(trained / "base", tmp_path / "home/base")
    shutil.copytree(trained / "run", tmp_path / "home/runs/mine")
    config = tmp_path / "home/runs/mine/config.yaml"
    values = yaml_values.parse(config.read_text())
    config.write_text(yaml_values.dump({**values, "model": "base", "output": "runs/mine"}))
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")
    known = run_of(place_of("../home/runs/mine"), (), None, None)
    assert known.config.model == str(Path("../home/base"))
    assert run_of(place_of("../home/runs/mine"), ["model=base"], None, None).config.model == "base"
    assert run_of(place_of("../home/runs/mine"), (), "other", None).config.model == "other"
    assert call("../home/runs/mine", trained / "new", "--csv").exit_code == 0
    monkeypatch.chdir(tmp_path / "home")
    assert run_of(place_of("runs/mine"), (), None, None).config.model == "base"


def test_a_base_that_is_not_there_is_told_with_what_is_called_like_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder/config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    told = "there is no such folder in .* \\(did you mean 'encoder'\\?\\)"
    with pytest.raises(ModelNotFoundError, match=told), reading("encodr", "vision"):
        raise OSError("no file")
