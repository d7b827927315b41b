"""How training images are changed: by the transforms of timm, and mixed by those of torchvision."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adapterkit.errors import ConfigError
from adapterkit.torchvision_ops import ensure_torchvision_ops
from adapterkit.training.classification.options import Options
from adapterkit.training.classification.preprocessing import Pixels

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Steps:
    """One transform after the other."""

    steps: Sequence[Callable[[Any], Any]]

    def __call__(self, image: Image.Image) -> Tensor:
        found: Any = image
        for step in self.steps:
            found = step(found)
        return found


@dataclass(frozen=True)
class Flipping:
    """Mirrors tensors along an axis, each with a probability of one half."""

    axes: Sequence[int]

    def __call__(self, image: Tensor) -> Tensor:
        flipped = [axis for axis in self.axes if torch.rand(()) < 0.5]
        return image.flip(flipped) if flipped else image


def training_transform(pixels: Pixels, options: Options) -> Callable[[Image.Image], Tensor]:
    """What makes the model's input of a training image, drawing from the global generators.

    Whatever the options leave out is as where the model is measured: its own sides, crop, interpolation and values.

    Raises:
        ConfigError: timm has no such policy, or it is for images of one channel.
    """
    whole = options.crop_scale is None and not options.auto_augment and not options.colour
    axes = [axis for axis, wanted in ((-1, options.flip), (-2, options.vertical_flip)) if wanted]
    steps: list[Any] = [pixels.transform] if whole else [*_picture_steps(pixels, options)]
    steps += [Flipping(axes)] if axes else []
    if options.random_erasing:
        erasing: Any = importlib.import_module("timm.data.random_erasing")
        steps.append(erasing.RandomErasing(options.random_erasing, device="cpu"))
    return steps[0] if len(steps) == 1 else Steps(steps)


def check_policy(options: Options) -> None:
    """Asks timm for the policy, before a model is loaded.

    Raises:
        ConfigError: timm has no such policy.
    """
    if options.auto_augment:
        factory: Any = importlib.import_module("timm.data.transforms_factory")
        with _named(options):
            factory.transforms_imagenet_train((32, 32), auto_augment=options.auto_augment, separate=True)


@contextlib.contextmanager
def _named(options: Options) -> Iterator[None]:
    try:
        yield
    except (AssertionError, ValueError, KeyError, IndexError) as error:
        raise ConfigError(
            [f"options.auto_augment: timm has no {options.auto_augment!r} ({error!s:.100})"], "run"
        ) from error


def _picture_steps(pixels: Pixels, options: Options) -> list[Any]:
    """From an image to normalised values."""
    factory: Any = importlib.import_module("timm.data.transforms_factory")
    look, scale = pixels.look, options.crop_scale
    if pixels.channels == 1 and (options.auto_augment or options.colour):
        raise ConfigError(["options.auto_augment, options.colour: the model takes images of one channel"], "run")
    with _named(options):
        crop, change, end = factory.transforms_imagenet_train(
            pixels.size,
            scale=scale or (1.0, 1.0),
            ratio=options.crop_ratio if scale else (pixels.size[1] / pixels.size[0],) * 2,  # the whole, or its centre
            hflip=0.0,
            color_jitter=options.colour or None,
            force_color_jitter=True,
            auto_augment=options.auto_augment,
            interpolation=look.interpolation,
            mean=tuple(value / look.scale for value in look.mean),
            std=tuple(value / look.scale for value in look.std),
            separate=True,
        )
    for transform in change.transforms:
        _keep_a_bit(transform)
    return [*crop.transforms, *change.transforms, *end.transforms]


def _keep_a_bit(transform: Any) -> None:
    """At timm, posters have no bits at either end of the magnitudes, which Pillow refuses: one is kept."""
    changes: Any = importlib.import_module("timm.data.auto_augment")
    policies = [*getattr(transform, "ops", ()), *(op for part in getattr(transform, "policy", ()) for op in part)]
    for op in policies:
        if op.aug_fn is changes.posterize:
            op.aug_fn = _posterize


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    from PIL import ImageOps

    return image if bits >= 8 else ImageOps.posterize(image, max(bits, 1))


def mixing(options: Options) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """Mixes the images and targets of a batch by mixup, by cutmix, or by one of them by chance; None for neither."""
    if not (options.mixup or options.cutmix) or not options.mix_probability:
        return None
    ensure_torchvision_ops()
    transforms: Any = importlib.import_module("torchvision.transforms.v2")
    made = [transforms.MixUp(alpha=options.mixup)] if options.mixup else []
    made += [transforms.CutMix(alpha=options.cutmix)] if options.cutmix else []
    one = transforms.RandomChoice(made) if len(made) > 1 else made[0]
    return one if options.mix_probability == 1 else transforms.RandomApply([one], p=options.mix_probability)
