from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from timm.models import save_for_hf
from transformers import ViTForImageClassification

import adapterkit as ak
from adapterkit.errors import ConfigError, DataChangedError, DataError
from adapterkit.training.classification.preprocessing import pixels_of
from adapterkit.training.classifiers import heads_of
from adapterkit.training.export.record import record_in
from adapterkit.training.loading import ModelNotFoundError, load_image_classifier
from adapterkit.training.loop import train
from adapterkit.training.order import derive_seed
from adapterkit.training.run import Run, load_run
from tests.backends.vision_models import vit_config

COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}
TIMM = {"pretrained": False, "img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("colours")
    for name, colour in COLOURS.items():
        (folder / name).mkdir()
        for number in range(8):
            shade = tuple(max(0, channel - 12 * number) for channel in colour)
            Image.new("RGB", (18, 16), shade).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    ViTForImageClassification(vit_config(num_labels=3)).save_pretrained(folder)
    return folder


def make_run(data: Path, output: Path, model: str, *overrides: str, **options: Any) -> Run:
    values = {
        "task": "image-classification",
        "model": model,
        "data": str(data),
        "output": str(output),
        "adapter": {"type": "lora", "rank": 2, "targets": "linear"},
        "options": {"validation_fraction": 0.25, **options},
        "steps": 40,
        "batch_size": 6,
        "learning_rate": 1e-2,
        "checkpoint_every": 20,
    }
    return load_run(None, [*(f"{key}={json.dumps(value)}" for key, value in values.items()), *overrides])


def test_a_timm_model_with_a_fresh_head_learns_colours_and_resumes_bitwise(data: Path, tmp_path: Path):
    options: dict[str, Any] = {"train_head": True, "model_args": TIMM, "flip": True}
    model = "timm:vit_tiny_patch16_224"
    result = train(make_run(data, tmp_path / "whole", model, **options), silent=True)
    assert result.figures["accuracy"] == 1.0 > result.figures["base accuracy"]
    assert result.figures["classes"] == list(COLOURS)
    assert result.figures["held out images"] == 6
    train(make_run(data, tmp_path / "parts", model, "steps=20", **options), silent=True)
    train(make_run(data, tmp_path / "parts", model, **options), resume=True, silent=True)
    one, other = (load_file(tmp_path / run / "adapter.safetensors") for run in ("whole", "parts"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert [tuple(one[key].shape) for key in one if key.endswith("/weight")] == [(3, 16)]


def test_the_head_and_the_names_of_the_classes_are_in_the_adapters_file(data: Path, tmp_path: Path):
    """On a model that is made for as many classes, the file alone does what the run measured."""
    options: dict[str, Any] = {"train_head": True, "model_args": TIMM}
    result = train(make_run(data, tmp_path / "run", "timm:vit_tiny_patch16_224", "ema=0.9", **options), silent=True)
    assert {path.name for path in (tmp_path / "run").glob("*.safetensors")} == {
        "adapter.safetensors",
        "head.safetensors",
    }
    torch.manual_seed(derive_seed(0, "model") % 2**32)  # as the run does: nothing here is pretrained
    model: Any = load_image_classifier("timm:vit_tiny_patch16_224", "float32", 3, **TIMM).eval()
    with safe_open(tmp_path / "run/head.safetensors", "pt") as head:
        assert json.loads(head.metadata()["classes"]) == list(COLOURS)
        alone = {key: head.get_tensor(key) for key in head.keys()}  # noqa: SIM118 - it is no dict
    own = load_file(tmp_path / "run/adapter.safetensors")
    assert alone.keys() == {"head.weight", "head.bias"}
    assert all(any(torch.equal(tensor, other) for other in own.values()) for tensor in alone.values())
    adapters = ak.Adapters(model)
    report = adapters.load(tmp_path / "run/adapter.safetensors", "colours")
    assert report.type == "lora + trainable"
    adapters.activate("colours")
    record = record_in(report.metadata)
    assert record is not None
    assert record.classes == (*COLOURS,)
    pixels = pixels_of(model, "", None)
    right = [
        record.classes[int(model(pixels.read(file)[None]).argmax())] == name
        for name in COLOURS
        for file in (data / name).iterdir()
    ]
    assert sum(right) / len(right) >= result.figures["accuracy"] - 0.1


def test_the_head_may_learn_at_a_rate_of_its_own_and_counts(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    options: dict[str, Any] = {"train_head": True, "model_args": TIMM}
    model = "timm:vit_tiny_patch16_224"
    rates = "rates=[{select: head, learning_rate: 1e-30}]"
    train(make_run(data, tmp_path / "still", model, rates, "weight_decay=0", "steps=2", **options))
    told = capsys.readouterr().err
    train(make_run(data, tmp_path / "start", model, "steps=1", "learning_rate=1e-30", **options), silent=True)
    still, start = (load_file(tmp_path / run / "adapter.safetensors") for run in ("still", "start"))
    [head] = [key for key in still if key.endswith("/weight")]
    assert torch.equal(still[head], start[head])
    assert f"training {sum(tensor.numel() for tensor in still.values()):,} of" in told
    with pytest.raises(ConfigError, match="narrow targets"):
        train(make_run(data, tmp_path / "twice", model, "adapter.targets=head attn.q", **options), silent=True)


@pytest.mark.parametrize("targets", ["head", "*"])
def test_an_adapter_of_the_models_own_weights_has_the_fresh_head_among_them(data: Path, tmp_path: Path, targets: str):
    """A linear probe, and full fine-tuning."""
    options: dict[str, Any] = {"train_head": True, "model_args": TIMM}
    adapter = [f"adapter={{type: trainable, targets: '{targets}'}}", "steps=4", "checkpoint_every=2"]
    model = "timm:vit_tiny_patch16_224"
    train(make_run(data, tmp_path / "run", model, *adapter, **options), silent=True)
    alone = load_file(tmp_path / "run/head.safetensors")
    assert {key: tuple(tensor.shape) for key, tensor in alone.items()} == {"head.weight": (3, 16), "head.bias": (3,)}
    plain: Any = load_image_classifier(model, "float32", 3, **TIMM)
    adapters = ak.Adapters(plain)
    assert adapters.load(tmp_path / "run/adapter.safetensors", "colours").type == "trainable"
    expected = (
        plain.head.weight.numel() + 3
        if targets == "head"
        else sum(ak.points(plain, adapter=ak.Trainable("*")).costs.values())
    )
    assert sum(p.numel() for p in adapters.parameters("colours")) == expected
    with pytest.raises(ConfigError, match="narrow targets"):  # only biases: the head would not be learnt whole
        train(make_run(data, tmp_path / "bias", model, *adapter, "adapter.part=bias", **options), silent=True)


@pytest.mark.parametrize("train_head", [False, True])
def test_a_transformers_model(data: Path, tmp_path: Path, vit: Path, train_head: bool):
    result = train(make_run(data, tmp_path / "run", str(vit), train_head=train_head), silent=True)
    assert result.figures["accuracy"] > result.figures["base accuracy"]
    saved = load_file(tmp_path / "run/adapter.safetensors")
    assert any(key.endswith("/weight") for key in saved) == train_head


def test_gradient_checkpointing(data: Path, tmp_path: Path, vit: Path):
    for folder, model, options in (
        ("timm", "timm:vit_tiny_patch16_224", {"train_head": True, "model_args": TIMM}),
        ("vit", str(vit), {}),
    ):
        for saving in ("false", "true"):
            overrides = (f"gradient_checkpointing={saving}", "steps=2")
            train(make_run(data, tmp_path / folder / saving, model, *overrides, **options), silent=True)
        one, other = (load_file(tmp_path / folder / s / "adapter.safetensors") for s in ("false", "true"))
        assert all(torch.allclose(one[key], other[key], atol=1e-6) for key in one)


def test_the_wrong_number_of_classes_is_an_error_that_says_what_to_do(data: Path, tmp_path: Path):
    model = tmp_path / "vit"
    ViTForImageClassification(vit_config(num_labels=4)).save_pretrained(model)
    with pytest.raises(ConfigError, match=r"tells 4 classes apart, but .* has 3: blue, green, red.*train_head=true"):
        train(make_run(data, tmp_path / "run", str(model)), silent=True)


def test_a_folder_that_timm_wrote(tmp_path: Path):
    made = timm.create_model("vit_tiny_patch16_224", **{**TIMM, "num_classes": 5})
    arguments = {key: value for key, value in TIMM.items() if key != "pretrained"}
    save_for_hf(made, str(tmp_path / "model"), model_args=arguments)
    loaded = load_image_classifier(str(tmp_path / "model"), "float32", None)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded.eval()(images), made.eval()(images))


@pytest.mark.parametrize(("channels", "grey"), [(3, False), (1, True)])
def test_pixels_are_normalised_as_the_model_says(tmp_path: Path, channels: int, grey: bool):
    model: Any = timm.create_model("vit_tiny_patch16_224", **TIMM, in_chans=channels)
    pixels = pixels_of(model, "", None)
    Image.new("RGB", (20, 30), (255, 0, 51)).save(tmp_path / "a.png")
    image = pixels.read(tmp_path / "a.png")
    assert image.shape == (channels, 16, 16)
    mean, std = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
    if not grey:
        expected = (torch.tensor([1.0, 0.0, 0.2]) - torch.tensor(mean)) / torch.tensor(std)
        assert torch.allclose(image[:, 3, 3], expected)
    found = pixels_of(model, "", (24, 32))
    assert found.size == (24, 32)
    assert found.read(tmp_path / "a.png").shape == (channels, 24, 32)


def test_heads_are_the_last_layers(vit: Path):
    model = ViTForImageClassification.from_pretrained(vit)
    assert heads_of(model, 3) == {"classifier": model.classifier}


def test_data_that_cannot_be_used(data: Path, tmp_path: Path, vit: Path):
    with pytest.raises(DataError, match="is not a folder"):
        train(make_run(tmp_path / "none", tmp_path / "run", str(vit)), silent=True)
    (tmp_path / "one/red").mkdir(parents=True)
    with pytest.raises(DataError, match=r"needs one subfolder .* found \['red'\]"):
        train(make_run(tmp_path / "one", tmp_path / "run", str(vit)), silent=True)
    for name in ("a", "b", "c"):
        (tmp_path / "few" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "few" / name / "x.png")
    with pytest.raises(DataError, match="class 'a' has one image"):
        train(make_run(tmp_path / "few", tmp_path / "run", str(vit)), silent=True)
    for name in ("a", "b", "c"):
        (tmp_path / "few" / name / "y.png").write_text("no image")
    with pytest.raises(DataError, match=r"cannot be read as an image"):
        train(make_run(tmp_path / "few", tmp_path / "run", str(vit)), silent=True)
    (tmp_path / "few/d").mkdir()
    with pytest.raises(
        DataError, match=r"classes without an image .*; and 3 files: cannot be read as an image"
    ) as caught:
        train(make_run(tmp_path / "few", tmp_path / "run", str(vit), "num_workers=1"), silent=True)
    folder = tmp_path / "few"
    assert caught.value.files == [folder / "d", *(folder / name / "y.png" for name in "abc")]
    shutil.rmtree(tmp_path / "few/a")
    for path in folder.rglob("y.png"):
        path.unlink()
    with pytest.raises(DataError, match=r"classes without an image[^;]*; remove their folders or fill them:\n  .*d$"):
        train(make_run(tmp_path / "few", tmp_path / "run", str(vit)), silent=True)


def test_models_that_are_not_there(data: Path, tmp_path: Path):
    with pytest.raises(ModelNotFoundError, match="vit_tinny"):
        train(make_run(data, tmp_path / "run", "timm:vit_tinny", model_args={"pretrained": False}), silent=True)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ModelNotFoundError, match="cannot load the model"):
        train(make_run(data, tmp_path / "run", str(tmp_path / "folder")), silent=True)


def test_a_split_with_everything_that_changes_images_resumes_bitwise_with_workers(data: Path, tmp_path: Path):
    for part, numbers in (("train", range(6)), ("val", range(6, 8))):
        for name in COLOURS:
            (tmp_path / "data" / part / name).mkdir(parents=True)
            for number in numbers:
                shutil.copy(data / name / f"{number}.png", tmp_path / "data" / part / name)
    options: dict[str, Any] = {
        "train_head": True, "model_args": TIMM, "flip": True, "crop_scale": [0.5, 1.0],
        "auto_augment": "rand-m5-mstd0.5", "random_erasing": 0.3,
        "mixup": 0.2, "cutmix": 0.5, "label_smoothing": 0.1, "class_weights": "balanced",
    }  # fmt: skip
    model = "timm:vit_tiny_patch16_224"
    steps = ("steps=6", "checkpoint_every=3")
    whole = train(make_run(tmp_path / "data", tmp_path / "whole", model, *steps, **options), silent=True)
    assert whole.figures["held out images"] == 6
    train(make_run(tmp_path / "data", tmp_path / "parts", model, *steps, "steps=3", **options), silent=True)
    workers = make_run(tmp_path / "data", tmp_path / "parts", model, *steps, "num_workers=1", **options)
    parts = train(workers, resume=True, silent=True)
    assert {**parts.figures, "by class": 0, "confusion": 0} == {**whole.figures, "by class": 0, "confusion": 0}
    one, other = (load_file(tmp_path / run / "adapter.safetensors") for run in ("whole", "parts"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    with Image.open(tmp_path / "whole/confusion.png") as picture:
        assert min(picture.size) > 100
    rows = (tmp_path / "whole/by_class.csv").read_text().splitlines()
    assert rows[0] == "name,images,precision,recall,f1"
    assert [row.split(",")[:2] for row in rows[1:]] == [[name, "2"] for name in COLOURS]


def test_several_classes_of_an_image(data: Path, tmp_path: Path):
    rows = ["file,labels"]
    for red in (0, 255):
        for blue in (0, 255):
            for number in range(4):
                Image.new("RGB", (16, 16), (red, 8 * number, blue)).save(tmp_path / f"{red}-{blue}-{number}.png")
                names = [name for name, value in (("red", red), ("blue", blue)) if value]
                rows.append(f"{red}-{blue}-{number}.png,{'|'.join(names)}")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    options: dict[str, Any] = {"train_head": True, "model_args": TIMM, "multi_label": True}
    run = make_run(tmp_path / "labels.csv", tmp_path / "run", "timm:vit_tiny_patch16_224", "steps=30", **options)
    result = train(run, silent=True)
    assert result.figures["classes"] == ["blue", "red"]
    assert result.figures["mAP"] == result.figures["f1"] == 1.0 > result.figures["base f1"]
    assert result.figures["loss"] < 0.5 < result.figures["base loss"]
    (tmp_path / "labels.csv").write_text("\n".join([*rows[:-1], rows[-1].replace("red|", "")]))
    more = make_run(tmp_path / "labels.csv", tmp_path / "run", "timm:vit_tiny_patch16_224", "steps=31", **options)
    with pytest.raises(DataChangedError, match=r"files edited: 1 \(labels\.csv\)"):
        train(more, resume=True, silent=True)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path):
    """Training, measuring and predicting, in this process and in those that read: 200 images, and 2,000."""
    program = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from adapterkit.torchvision_ops import ensure_torchvision_ops\n"
        "ensure_torchvision_ops()\n"
        "from adapterkit.training.loop import train\n"
        "from adapterkit.training.predicting import Predictor\n"
        "from adapterkit.training.samples.places import place_of, run_of\n"
        "from tests.training.classification.test_task import TIMM, make_run\n"
        "folder = Path(sys.argv[1])\n"
        "options = {'train_head': True, 'model_args': {**TIMM, 'img_size': 256, 'patch_size': 64},\n"
        "           'validation_fraction': 0.5}\n"
        "model = 'timm:vit_tiny_patch16_224'\n"
        "run = make_run(folder / 'data', folder / 'run', model, 'steps=200', 'num_workers=1', **options)\n"
        "train(run, silent=True)\n"
        "place = place_of(str(folder / 'run'))\n"
        "found = Predictor(run_of(place, (), None, None), place)([folder / 'data'])\n"
        "print(sum(1 for _ in found))\n"
        "for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):\n"
        "    print(resource.getrusage(who).ru_maxrss)\n"
    )
    peaks = {}
    for count in (200, 2000):
        folder = tmp_path / str(count)
        for name in "ab":
            (folder / "data" / name).mkdir(parents=True)
            for number in range(count // 2):
                Image.new("RGB", (256, 256), (number % 256, number // 256, ord(name))).save(
                    folder / "data" / name / f"{number}.png"
                )
        done = subprocess.run(
            [sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=False, cwd=Path.cwd()
        )
        assert done.returncode == 0, done.stderr
        said, *peaks[count] = map(int, done.stdout.split())
        assert said == count
    more = [(large - small) / 1024 for small, large in zip(*peaks.values(), strict=True)]
    assert max(more) < 200, f"{more} MiB more; 1,800 images take 1,350 MiB"
