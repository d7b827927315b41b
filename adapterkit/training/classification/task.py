"""The task `image-classification`: pictures and the classes that they are of."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.adapter import AdapterConfig
from adapterkit.adapters.trainable import Trainable
from adapterkit.errors import ConfigError, DataError
from adapterkit.handle.listing import points
from adapterkit.training.classification.augmentation import check_policy, mixing, training_transform
from adapterkit.training.classification.examples import Example, Found, class_names
from adapterkit.training.classification.figures import overall, said
from adapterkit.training.classification.folders import find
from adapterkit.training.classification.options import Options
from adapterkit.training.classification.pictures import Item, Pictures, collated
from adapterkit.training.classification.preprocessing import pixels_of
from adapterkit.training.classification.reading import files_of, read_images
from adapterkit.training.classification.report import facts_of, repeated, write_report
from adapterkit.training.classification.splitting import hold_out
from adapterkit.training.classification.targets import Targets, loss_of, targets_of, weights_of
from adapterkit.training.classification.writing import write_classifier, write_heads
from adapterkit.training.classifiers import heads_of, in_order_of, is_transformers, logits_of, take_size, trying
from adapterkit.training.data_files import Notes, listed, name_of, together
from adapterkit.training.data_record import DataRecord
from adapterkit.training.image_folder import examine_all
from adapterkit.training.loading import (
    checkpoint_activations,
    label_names,
    load_image_classifier,
    outline_image_classifier,
)
from adapterkit.training.parts import inference
from adapterkit.training.sizes import size_of
from adapterkit.training.snapshots import ADAPTER
from adapterkit.training.task import Prediction, Setting, Task, content_key


class ImageClassificationTask(Task):
    """Cross entropy, of one or of many classes, on timm and transformers classifiers."""

    Options = Options
    options: Options
    sampling = ("resolution", "multi_label", "train_head", "model_args")
    larger_is_better = frozenset({"accuracy", "f1", "mAP"})

    def survey(self, before: DataRecord | None) -> DataRecord:
        """Finds the images and their classes, and decodes every one once."""
        check_policy(self.options)
        folder, told = Path(self.config.data), self.options.validation
        notes = Notes(folder if folder.is_dir() else folder.parent)
        found = find(folder, None if told is None else Path(told), self.options.tables, notes)
        keys = self._examined(found, notes)
        for path in repeated(found, keys):
            notes.add("measured with, and trained on as well", path)
        self.found = self._held_out(found, keys)
        files = {**keys, **{table: content_key(table) for table in found.tables}}
        record = DataRecord(
            {name_of(path, notes.folder): key for path, key in files.items()},
            class_names(self.found),
            notes.sentences(),
            facts_of(self.found, class_names(self.found)),
        )
        record = self._numbered(record, before)
        self.classes = list(record.classes)
        counts = Counter(name for one in self.found.training for name in one.names)
        self.weights = weights_of(self.options.class_weights, counts, self.classes)
        return record

    def outline(self) -> nn.Module:
        """The classifier's shape."""
        outline = outline_image_classifier(self.config.model, self._fresh, **self.options.model_args)
        self.heads = heads_of(outline, self._fresh) if self._fresh else {}
        return outline

    def load_model(self) -> nn.Module:
        """The classifier, with a fresh head if that is asked for, ready for the size of the images."""
        self.model = load_image_classifier(self.config.model, self.config.dtype, self._fresh, **self.options.model_args)
        self.heads = heads_of(self.model, self._fresh) if self._fresh else {}
        if is_transformers(self.model):  # keeps a head that happens to have as many outputs
            for head in self.heads.values():
                head.reset_parameters()  # type: ignore[operator]
        self.pixels = pixels_of(self.model, self.config.model, size_of(self.options.resolution))
        with trying(self.config.model, self.pixels.size):
            self.arguments, self.note = take_size(self.model, self.pixels.size)
        return self.model.eval()

    def prepare(self, setting: Setting) -> Pictures:
        """The images to train on; tries the model on a blank one."""
        self.device = setting.device
        for note in filter(None, (self.pixels.note, self.note)):
            setting.tell(note)
        self._check_outputs()
        self.mix = mixing(self.options)
        targets = Targets(self.found.training, self.classes, self.options.label_smoothing)
        files = [one.path for one in self.found.training]
        return Pictures(files, targets, self.pixels.mode, training_transform(self.pixels, self.options))

    def collate(self, items: Sequence[Item]) -> tuple[Tensor, Tensor]:
        """See `collated`."""
        return collated(items, self.mix)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """See `loss_of`."""
        images, targets = batch
        weights = None if self.weights is None else self.weights.to(targets.device)
        return loss_of(self._logits(images), targets, weights, several=self.options.multi_label)

    def checkpoint_activations(self) -> None:
        """As timm or transformers do it."""
        checkpoint_activations(self.model)

    def also(self) -> Sequence[AdapterConfig]:
        """The fresh heads, if there are any."""
        return [Trainable(targets=" ".join(f"path:{path}" for path in self.heads))] if self.heads else []

    def class_names(self) -> Sequence[str]:
        """The names of the folders, or the labels."""
        return self.classes

    def evaluate(self) -> Mapping[str, float]:
        """See `overall`, on the images that are measured with."""
        return self._measured(self.found.validation or ())

    def measures(self) -> Collection[str]:
        """See `overall`."""
        if not self.found.validation:
            return ()
        return ("mAP" if self.options.multi_label else "accuracy", "f1", "loss")

    def finish(self, samples: Path) -> Mapping[str, Any]:
        """What the numbers of the classes mean, and how good the model is at each; a picture of what it confuses."""
        found: dict[str, Any] = {"classes": self.classes, "held out images": len(self.found.validation or ())}
        if self.heads:
            folder = samples.parent
            places = {point.id: point.path for point in points(self.model, "head") if point.path in self.heads}
            write_heads(folder / ADAPTER, folder / "head.safetensors", places, self.classes)
        if self.found.validation:
            logits, targets = self._answers(self.found.validation)
            found |= write_report(samples.parent, logits, targets, self.classes, several=self.options.multi_label)
        return found | {f"test {key}": value for key, value in self._measured(self.found.test).items()}

    def recall(self, classes: Sequence[str]) -> None:
        """The classes of a file."""
        self.classes = list(classes)

    def predict(self, inputs: Sequence[Path]) -> Iterator[Prediction]:
        """The probabilities of every image; those of several classes are independent of each other."""
        with contextlib.closing(read_images(files_of(inputs), self.pixels, self.config.num_workers)) as groups:
            for group in groups:
                answers = iter(() if group.images is None else self._predicted(group.images))
                for path, error in zip(group.paths, group.errors, strict=True):
                    shares, chosen = next(answers) if error is None else ([], [])
                    yield Prediction(str(path), shares, chosen, "" if error is None else error.reason)

    def _predicted(self, images: Tensor) -> list[tuple[list[float], list[int]]]:
        """Of each image the probabilities, and the numbers of its classes."""
        several = self.options.multi_label
        logits = self._logits(images.to(next(self.model.parameters()).device)).cpu().float()
        if logits.shape[1] != len(self.classes):
            raise ConfigError([f"the model tells {logits.shape[1]} classes, not {len(self.classes)}"], "run")
        shares = (logits.sigmoid() if several else logits.softmax(-1)).tolist()
        chosen = [row.nonzero().flatten().tolist() for row in said(logits, several=several)]
        return list(zip(shares, chosen, strict=True))

    def probe(self) -> Tensor:
        """What the model says of two images of noise."""
        return self._logits(self._noise())

    def write_model(self, folder: Path) -> Tensor:
        """See `write_classifier`; what timm or transformers read back says of the same noise."""
        several = self.options.multi_label
        write_classifier(self.model, self.pixels, self.classes, folder, several=several)
        noise = self._noise()
        plain: Any = load_image_classifier(str(folder), self.config.dtype, None).to(noise.device).eval()
        arguments, _ = take_size(plain, self.pixels.size)
        return logits_of(plain(noise.to(next(plain.parameters()).dtype), **arguments))

    def _noise(self) -> Tensor:
        shape = (2, self.pixels.channels, *self.pixels.size)
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(next(self.model.parameters()).device)

    @property
    def _fresh(self) -> int | None:
        return len(self.classes) if self.options.train_head else None

    def _measured(self, examples: Sequence[Example]) -> dict[str, float]:
        if not examples:
            return {}
        return overall(*self._answers(examples), several=self.options.multi_label)

    def _answers(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """What the model says of the examples, and should say: each [examples, classes], on the CPU."""
        logits: list[Tensor] = []
        paths = [one.path for one in examples]
        with contextlib.closing(read_images(paths, self.pixels, self.config.num_workers)) as groups:
            for group in groups:
                if failed := [error for error in group.errors if error is not None]:
                    raise together(failed)
                assert group.images is not None
                logits.append(self._logits(group.images.to(self.device)))
        return torch.cat(logits).cpu().float(), targets_of(examples, self.classes)

    def _logits(self, images: Tensor) -> Tensor:
        return logits_of(self.model(images.to(next(self.model.parameters()).dtype), **self.arguments))

    def _examined(self, found: Found, notes: Notes) -> dict[Path, str]:
        """What each file holds.

        Raises:
            DataError: Naming what cannot be read, and classes without an image.
        """
        paths = list(dict.fromkeys(one.path for one in found.all))
        told = "classes without an image that is read; remove their folders or fill them"
        problems = [DataError(told, found.empty)] if found.empty else []
        try:
            keys = examine_all(paths, notes, self.config.num_workers)
        except DataError as error:
            raise together([*problems, error]) from error
        if problems:
            raise problems[0]
        return dict(zip(paths, keys, strict=True))

    def _held_out(self, found: Found, keys: Mapping[Path, str]) -> Found:
        """With a share to measure with, where the data has no part for that."""
        if found.validation is not None:
            return found
        share, several = self.options.validation_fraction, self.options.multi_label
        training, held_out = hold_out(found.training, share, self.config.seed, keys, several=several)
        return replace(found, training=training, validation=held_out)

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
