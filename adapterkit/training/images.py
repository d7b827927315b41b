"""The task `image-classification`: classes from a folder of images with one subfolder for each class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from adapterkit.adapter import AdapterConfig
from adapterkit.adapters.trainable import Trainable
from adapterkit.errors import ConfigError, DataError
from adapterkit.training.classifiers import heads_of, in_order_of, is_transformers, logits_of, take_size, trying
from adapterkit.training.config import Section
from adapterkit.training.data_files import SPLITS, Notes, gather, is_hidden, listed, name_of
from adapterkit.training.data_record import DataRecord
from adapterkit.training.image_folder import examine, image_files
from adapterkit.training.loading import (
    checkpoint_activations,
    label_names,
    load_image_classifier,
    outline_image_classifier,
)
from adapterkit.training.order import Draw, derive_seed
from adapterkit.training.parts import inference
from adapterkit.training.preprocessing import Pixels, pixels_of
from adapterkit.training.sizes import Resolution, size_of
from adapterkit.training.task import Setting, Task

_AT_ONCE = 16  # images that are measured at a time


class Options(Section):
    """The keys under `options`.

    Attributes:
        resolution: Side of the square that images are brought to, or `[height, width]`, in pixels; by default what the
            model was made for. A model with positions for another size interpolates them.
        flip: Mirror half of the training images.
        validation_fraction: Share of the images, of each class alike, that is held out to measure the accuracy.
        train_head: Replace the model's head (or heads) by a fresh one for these classes, which trains as a part of the
            adapter, of type `trainable`, in its file. Otherwise the model must have as many classes as there are
            subfolders.
        model_args: For `timm.create_model`, such as `{img_size: 32}` or `{pretrained: false}`.
    """

    resolution: Resolution = None
    flip: bool = False
    validation_fraction: float = Field(0.1, gt=0, lt=1)
    train_head: bool = False
    model_args: dict[str, Any] = Field({})


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
    larger_is_better = frozenset({"accuracy"})

    def survey(self, before: DataRecord | None) -> DataRecord:
        """Finds the images of each class, and decodes every one once."""
        folder = Path(self.config.data)
        notes = Notes(folder)
        self.images = class_images(folder, notes)
        found = [path for files in self.images.values() for path in files]
        keys = gather(found, lambda path: examine(path, notes))
        files = {name_of(path, folder): key for path, key in zip(found, keys, strict=True)}
        counts = {name: len(paths) for name, paths in self.images.items()}
        facts = {"images": str(len(found)), "classes": ", ".join(f"{name} {count}" for name, count in counts.items())}
        record = self._numbered(DataRecord(files, list(self.images), notes.sentences(), facts), before)
        self.classes, self.keys = list(record.classes), dict(zip(found, keys, strict=True))
        return record

    def outline(self) -> nn.Module:
        """The classifier's shape."""
        fresh = len(self.classes) if self.options.train_head else None
        outline = outline_image_classifier(self.config.model, fresh, **self.options.model_args)
        self.heads = heads_of(outline, fresh) if fresh else {}
        return outline

    def load_model(self) -> nn.Module:
        """The classifier, with a fresh head if that is asked for, ready for the size of the images."""
        fresh = len(self.classes) if self.options.train_head else None
        self.model = load_image_classifier(self.config.model, self.config.dtype, fresh, **self.options.model_args)
        self.heads = heads_of(self.model, fresh) if fresh else {}
        if is_transformers(self.model):  # keeps a head that happens to have as many outputs
            for head in self.heads.values():
                head.reset_parameters()  # type: ignore[operator]
        self.pixels = pixels_of(self.model, self.config.model, size_of(self.options.resolution))
        with trying(self.config.model, self.pixels.size):
            self.arguments, self.note = take_size(self.model, self.pixels.size)
        return self.model.eval()

    def prepare(self, setting: Setting) -> Labelled:
        """Splits the files, and tries the model on a blank image."""
        self.device = setting.device
        for note in filter(None, (self.pixels.note, self.note)):
            setting.tell(note)
        self._check_outputs()
        training, self.held_out = self._split()
        files, labels = zip(*training, strict=True)
        return Labelled(list(files), list(labels), self.pixels, self.options.flip)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross entropy in float32."""
        images, labels = batch
        return F.cross_entropy(self._logits(images).float(), labels)

    def checkpoint_activations(self) -> None:
        """As timm or transformers do it."""
        checkpoint_activations(self.model)

    def also(self) -> Sequence[AdapterConfig]:
        """The fresh heads, if there are any."""
        return [Trainable(targets=" ".join(f"path:{path}" for path in self.heads))] if self.heads else []

    def class_names(self) -> Sequence[str]:
        """The names of the folders."""
        return self.classes

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
        return logits_of(self.model(images.to(next(self.model.parameters()).dtype), **self.arguments))

    def _numbered(self, record: DataRecord, before: DataRecord | None) -> DataRecord:
        """With the classes in the order of the model's own outputs, where its head stays and they have names."""
        told = [] if self.options.train_head or before is not None else label_names(self.config.model)
        if not told:
            return record.following(before)
        if ordered := in_order_of(told, record.classes):
            return replace(record, classes=ordered)
        note = f"the model calls its classes {listed(told)}; they are taken in the order of the folders' names"
        return replace(record, notes=[*record.notes, note])

    def _check_outputs(self) -> None:
        blank = torch.zeros(1, self.pixels.channels, *self.pixels.size, device=self.device)
        with trying(self.config.model, self.pixels.size), inference(self.model):
            count = self._logits(blank).shape[-1]
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
    if all(name.casefold() in SPLITS for name in names):
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
