"""Image classifiers of timm and transformers: their heads, the size of their images, the names of their classes."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.errors import AdapterKitError, ConfigError, TargetNotFoundError
from adapterkit.handle.listing import points
from adapterkit.training.sizes import Size, size_of


def is_transformers(model: nn.Module) -> bool:
    """Whether the model is one of transformers', else of timm's."""
    return any(base.__module__.partition(".")[0] == "transformers" for base in type(model).__mro__)


def heads_of(model: nn.Module, classes: int) -> dict[str, nn.Module]:
    """The layers that tell the classes apart, by their paths.

    Raises:
        ConfigError: The model's backend knows of none.
    """
    try:
        found = {point.path: model.get_submodule(point.path) for point in points(model, "head")}
    except TargetNotFoundError:
        found = {}
    fitting = {path: head for path, head in found.items() if getattr(head, "out_features", classes) == classes}
    if not fitting:
        raise ConfigError(
            [
                f"options.train_head: no layer of {type(model).__name__} is known as its head. Set it to false, and "
                "train the layer as an adapter of the type trainable, with targets: 'path:...'"
            ],
            "run",
        )
    return fitting


def made_for(model: Any) -> Size | None:
    """The size of the images that a model has positions for; None where it tells none."""
    if is_transformers(model):
        told = getattr(getattr(model.config, "vision_config", model.config), "image_size", None)
    else:
        told = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return size_of(told)


def take_size(model: Any, size: Size) -> tuple[Mapping[str, Any], str]:
    """Makes a model interpolate its positions where images are of another size than it was made for.

    Returns:
        Arguments for its forward, and a note for the user, empty where nothing was to be done.
    """
    made = made_for(model)
    arguments: dict[str, Any] = {}
    if made is None or made == size:
        return arguments, ""
    if not is_transformers(model):
        if not callable(getattr(model, "set_input_size", None)):
            return arguments, ""
        model.set_input_size(img_size=size)
    elif "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
        arguments = {"interpolate_pos_encoding": True}
    else:
        return arguments, ""
    told = "model: made for images of {} x {}; its positions are interpolated for {} x {}"
    return arguments, told.format(*made, *size)


@contextlib.contextmanager
def trying(name: str, size: Size) -> Iterator[None]:
    """Turns what a model raises about images of a size into an error that says which keys to change.

    Raises:
        ConfigError: In the place of any error that is none of adapterkit's.
    """
    try:
        yield
    except (AdapterKitError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        problem = (
            f"options.resolution: {name} does not take images of {size[0]} x {size[1]} ({type(error).__name__}: "
            f"{error!s:.300}); set a size that it takes, for timm also in options.model_args: {{img_size: ...}}"
        )
        raise ConfigError([problem], "run") from error


def logits_of(output: Any) -> Tensor:
    """[images, classes], from what a classifier returns."""
    return output.logits if hasattr(output, "logits") else output


def in_order_of(told: Sequence[str], classes: Sequence[str]) -> list[str] | None:
    """The classes in the order in which a model names them; None where it names others."""
    mine = {_plain(name): name for name in classes}
    names = [_plain(name) for name in told]
    return [mine[name] for name in names] if sorted(names) == sorted(mine) and len(mine) == len(classes) else None


def _plain(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())
