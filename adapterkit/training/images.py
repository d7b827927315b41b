"""The task `image-classification`: classes from a folder of images with one subfolder for each class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from adapterkit.errors import ConfigError, DataError
from adapterkit.training.config import Section
from adapterkit.training.data import cover, examine, image_files, open_image
from adapterkit.training.files import Notes, gather, is_hidden, name_of
from adapterkit.training.loading import checkpoint_transformers, load_image_classifier
from adapterkit.training.order import Draw, derive_seed
from adapterkit.training.record import DataRecord
from adapterkit.training.task import Setting, Task

_HALF = (0.5, 0.5, 0.5)
_AT_ONCE = 16  # images that are measured at a time
_SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing", "dev"})


class Options(Section):
    """The keys under `options`.

    Attributes:
        resolution: Side of the square that images are cut to, in pixels; by default the model's own.
        flip: Mirror half of the training images.
        validation_fraction: Share of the images, of each class alike, that is held out to measure the accuracy.
        train_head: Replace the model's head by a fresh one for these classes, train it too, and save it beside the
            adapter as `head.safetensors`. Otherwise the model must have as many classes as there are subfolders.
        model_args: For `timm.create_model`, such as `{img_size: 32}` or `{pretrained: false}`.
    """

    resolution: int | None = Field(None, gt=0)
    flip: bool = False
    validation_fraction: float = Field(0.1, gt=0, lt=1)
    train_head: bool = False
    model_args: dict[str, Any] = Field({})


@dataclass(frozen=True)
class Pixels:
    """What a model expects: side in pixels, channels, and what each channel is normalised by."""

    side: int
    channels: int
    mean: Tensor
    std: Tensor

    def read(self, path: Path) -> Tensor:
        """[channels, side, side], normalised."""
        image = cover(open_image(path, "L" if self.channels == 1 else "RGB"), self.side, self.side)
        return (image - self.mean) / self.std


class Labelled:
    """Images and the numbers of their classes; read when drawn."""

    def __init__(self, files: list[Path], labels: list[int], pixels: Pixels, flip: bool) -> None:
        self.files, self.labels, self.pixels, self.flip = files, labels, pixels, flip

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, draw: Draw) -> tuple[Tensor, int]:
        """An image, mirrored or not, and its class."""
        image = self.pixels.read(self.files[draw.index])
        mirrored = self.flip and bool(torch.randint(2, (), generator=draw.generator()))
        return (image.flip(-1) if mirrored else image), self.labels[draw.index]


class ImageClassificationTask(Task):
    """Cross entropy on timm and transformers classifiers."""

    Options = Options
    options: Options

    def survey(self, before: DataRecord | None) -> DataRecord:
        """Finds the images of each class, and decodes every one once."""
        folder = Path(self.config.data)
        notes = Notes(folder)
        self.images = class_images(folder, notes)
        found = [path for files in self.images.values() for path in files]
        keys = gather(found, lambda path: examine(path, notes))
        files = {name_of(path, folder): key for path, key in zip(found, keys, strict=True)}
        record = DataRecord(files, list(self.images), notes.sentences()).following(before)
        self.classes, self.keys = list(record.classes), dict(zip(found, keys, strict=True))
        return record

    def load_model(self) -> nn.Module:
        """The classifier, with a fresh head if that is asked for."""
        fresh = len(self.classes) if self.options.train_head else None
        self.model = load_image_classifier(self.config.model, self.config.dtype, fresh, **self.options.model_args)
        self._check_classes()
        return self.model.eval()

    def prepare(self, setting: Setting) -> Labelled:
        """Splits the files."""
        self.device, self.pixels = setting.device, pixels_of(self.model, self.options.resolution)
        training, self.held_out = self._split()
        files, labels = zip(*training, strict=True)
        return Labelled(list(files), list(labels), self.pixels, self.options.flip)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross entropy in float32."""
        images, labels = batch
        return F.cross_entropy(self._logits(images).float(), labels)

    def checkpoint_activations(self) -> None:
        """As timm or transformers do it."""
        model: Any = self.model
        if is_transformers(model):
            checkpoint_transformers(model)
        else:
            model.set_grad_checkpointing(True)

    def extra_modules(self) -> Mapping[str, nn.Module]:
        """The fresh head, if there is one."""
        return {"head": head_of(self.model)} if self.options.train_head else {}

    def evaluate(self) -> Mapping[str, float]:
        """Accuracy on the images that were held out."""
        right = 0
        for start in range(0, len(self.held_out), _AT_ONCE):
            files, labels = zip(*self.held_out[start : start + _AT_ONCE], strict=True)
            images = torch.stack([self.pixels.read(path) for path in files])
            found = self._logits(images.to(self.device)).argmax(-1).cpu()
            right += int((found == torch.tensor(labels)).sum())
        return {"accuracy": right / len(self.held_out)}

    def finish(self, samples: Path) -> Mapping[str, Any]:
        """What the numbers of the classes mean, and on how many images the accuracy was measured."""
        return {"classes": self.classes, "held out images": len(self.held_out)}

    def _logits(self, images: Tensor) -> Tensor:
        found = self.model(images.to(next(self.model.parameters()).dtype))
        return found.logits if hasattr(found, "logits") else found

    def _check_classes(self) -> None:
        model: Any = self.model
        count = model.config.num_labels if is_transformers(model) else model.num_classes
        if count != len(self.classes):
            raise ConfigError(
                [
                    f"model {self.config.model} tells {count} classes apart, but {self.config.data} has "
                    f"{len(self.classes)}: {', '.join(self.classes[:20])}. Set options.train_head=true to train a head "
                    "for them"
                ],
                "run",
            )

    def _split(self) -> tuple[list[tuple[Path, int]], list[tuple[Path, int]]]:
        """Of each class the same share, at least one image on either side; which ones, their contents decide."""
        training: list[tuple[Path, int]] = []
        held_out: list[tuple[Path, int]] = []
        for name, files in self.images.items():
            if len(files) < 2:
                raise DataError(f"class {name!r} has one image; two are needed, one to train and one to measure", files)
            count = min(max(round(len(files) * self.options.validation_fraction), 1), len(files) - 1)
            label = self.classes.index(name)
            drawn = {path: (derive_seed(self.config.seed, "held out", self.keys[path]), path) for path in files}
            chosen = frozenset(sorted(files, key=drawn.__getitem__)[:count])
            held_out += [(path, label) for path in files if path in chosen]
            training += [(path, label) for path in files if path not in chosen]
        return training, held_out


def class_images(folder: Path, notes: Notes) -> dict[str, list[Path]]:
    """The images of each class: those in the subfolder of its name, sorted.

    Raises:
        DataError: There are fewer than two subfolders, one holds no image, or they are no classes.
    """
    if not folder.is_dir():
        raise DataError(f"data {folder} is not a folder (looked in {Path.cwd()})")
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not is_hidden(entry))
    if len(names) < 2:
        raise DataError(f"data {folder} needs one subfolder of images for each of two or more classes; found {names}")
    if all(name.casefold() in _SPLITS for name in names):
        raise DataError(f"data {folder} holds {', '.join(names)}, not classes; name one of them: {folder}/{names[0]}")
    classes: dict[str, list[Path]] = {name: [] for name in names}
    for path in image_files(folder, notes):
        if path.parent == folder:
            notes.add("left out, in no folder of a class", path)
        else:
            classes[path.relative_to(folder).parts[0]].append(path)
    if empty := [folder / name for name, files in classes.items() if not files]:
        raise DataError("classes without an image that is read; remove their folders or fill them", empty)
    return classes


def is_transformers(model: nn.Module) -> bool:
    """Whether the model is one of transformers', else of timm's."""
    return any(base.__module__.partition(".")[0] == "transformers" for base in type(model).__mro__)


def head_of(model: Any) -> nn.Module:
    """The last layer, which tells the classes apart."""
    if not is_transformers(model):
        return model.get_classifier()
    return next(
        module
        for module in reversed(list(model.modules()))
        if isinstance(module, nn.Linear) and module.out_features == model.config.num_labels
    )


def pixels_of(model: Any, resolution: int | None) -> Pixels:
    """What the model says of its input; where it says nothing, three channels between -1 and 1."""
    if is_transformers(model):
        channels = getattr(model.config, "num_channels", 3)
        return _pixels(resolution or model.config.image_size, channels, _HALF, _HALF)
    described = getattr(model, "pretrained_cfg", None) or {}
    patches = getattr(model, "patch_embed", None)
    side = getattr(patches, "img_size", None) or described.get("input_size", (3, 224, 224))[1:]
    convolution = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    mean, std = described.get("mean", _HALF), described.get("std", _HALF)
    return _pixels(resolution or side[0], convolution.in_channels, mean, std)


def _pixels(side: int, channels: int, mean: Any, std: Any) -> Pixels:
    def per_channel(values: Any) -> Tensor:
        row = torch.tensor(values, dtype=torch.float32)
        return (row if len(row) == channels else row.mean().expand(channels)).view(-1, 1, 1)

    return Pixels(side, channels, per_channel(mean), per_channel(std))
