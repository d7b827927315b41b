"""A checkpoint's modules, without a model around them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adapterkit.adapter import AdapterConfig, AdapterModule
from adapterkit.checkpoint import Checkpoint, Part
from adapterkit.engine.skeletons import Skeleton
from adapterkit.errors import BaseMismatchError, BaseNeededError
from adapterkit.handle.building import SHARED, checked_module, checked_shared, skeletons_of
from adapterkit.handle.fitting import check_fit
from adapterkit.handle.former_ids import as_now
from adapterkit.handle.loading import config_of
from adapterkit.points import InjectionPoint, Points
from adapterkit.tools.shapes import MadeUp


@dataclass(frozen=True)
class Placed:
    """A module of a checkpoint at its point.

    Attributes:
        key: The point's id.
        config: Of the part.
        point, module: None where no model is at hand, and no point that has a weight would have such tensors.
        sized: Whether the tensors tell all of the point's sizes.
        tells: Whether they tell its shape. Where they do not, it may be a convolution, flattened.
    """

    key: str
    config: AdapterConfig
    point: InjectionPoint | None = None
    module: AdapterModule | None = None
    sized: bool = True
    tells: Callable[[InjectionPoint], bool] = lambda _: True

    def require_shape(self, source: object) -> None:
        """Raises BaseNeededError where the shape of a new tensor would be a guess."""
        if self.point is not None and not self.tells(self.point):
            raise base_needed("its tensors do not tell whether it is a convolution", source, self.key)


def modules(checkpoint: Checkpoint, points: Points | None = None, source: object = None) -> Iterator[Placed]:
    """The modules that hold a checkpoint's tensors, one after another; the tensors are shared, not copied.

    Args:
        checkpoint: Whose.
        points: The model's; without them points are made up, from ids and shapes.
        source: Named in errors.

    Raises:
        BaseMismatchError: The model has no such point.
        CheckpointError: The tensors are not those that the type asks for.
    """
    known = {point.id: point for point in points or ()}
    checkpoint = as_now(checkpoint, points) if points else checkpoint
    for part in checkpoint.parts:
        config = config_of(part, source)
        made = MadeUp(config, source)
        find = _finder(known, source) if known else made.point
        own = {key: find(key, tensors) for key, tensors in part.tensors.items() if key != SHARED}
        if SHARED in part.tensors and not known and not all(map(made.sized, own)):
            yield from (Placed(key, config) for key in own)  # of which sizes what they share is cannot be told either
            continue
        for placed in _of_part(part, config, own, source):
            yield placed if known else dataclasses.replace(placed, sized=made.sized(placed.key), tells=made.tells)


Find = Callable[[str, Mapping[str, Tensor]], "InjectionPoint | None"]


def _finder(known: Mapping[str, InjectionPoint], source: object) -> Find:
    def find(key: str, _: object) -> InjectionPoint:
        if key not in known:
            raise BaseMismatchError("the base has no such point; is it the model that the adapter is for?", source, key)
        return known[key]

    return find


def _of_part(
    part: Part, config: AdapterConfig, points: Mapping[str, InjectionPoint | None], source: object
) -> Iterator[Placed]:
    shared = _shared(part, config, [point for point in points.values() if point is not None], source)
    skeletons = skeletons_of(config)
    for key, point in points.items():
        if point is None:
            yield Placed(key, config)
            continue
        module, skeleton = skeletons.at(point, training=False)
        check_fit(skeleton.expected, key, part.tensors[key], source)
        if skeleton.lacks:  # buffers that are in no file are computed
            with torch.random.fork_rng(devices=[]):
                module = checked_module(config, point).eval()
            module.load_state_dict(part.tensors[key], strict=True, assign=True)
        else:
            skeleton.fill(module, part.tensors[key])
        if shared is not None:
            module.bind(shared)
        yield Placed(key, config, point, module.requires_grad_(False))


def _shared(part: Part, config: AdapterConfig, points: list[InjectionPoint], source: object) -> nn.Module | None:
    if not points:
        return None
    with torch.device("meta"):
        shared = checked_shared(config, points)
    if shared is None:
        return None
    skeleton = Skeleton(shared)
    check_fit(skeleton.expected, SHARED, part.tensors.get(SHARED, {}), source)
    if skeleton.lacks:
        with torch.random.fork_rng(devices=[]):
            shared = checked_shared(config, points)
    assert shared is not None
    shared.load_state_dict(part.tensors.get(SHARED, {}), strict=True, assign=True)
    return shared.eval().requires_grad_(False)


def base_needed(what: str, source: object, key: str) -> BaseNeededError:
    """The error for what only the model tells."""
    return BaseNeededError(
        f"{what}; name the model that it is for: --base MODEL, or points=ak.points(model)", source, key
    )
