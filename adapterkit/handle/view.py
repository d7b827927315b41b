"""The model at hand, as formats see it: see `adapterkit.contract.view`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from adapterkit.contract.view import ComponentView, ModelView
from adapterkit.errors import IncompatibleTargetError
from adapterkit.handle.starting import base_values
from adapterkit.mapping.component import Component
from adapterkit.mapping.model import MappedModel
from adapterkit.plugins.matching import class_keys
from adapterkit.points import InjectionPoint, Points


class View(ModelView):
    """A `ModelView` of a mapped model; what it is not asked for costs nothing."""

    def __init__(self, mapped: MappedModel) -> None:
        self._mapped = mapped

    @property
    def components(self) -> Mapping[str, ComponentView]:
        return self._components

    @functools.cached_property
    def _components(self) -> Mapping[str, ComponentView]:
        return {name: _component(one, self._mapped.paths(name)) for name, one in self._mapped.models.items()}

    def values(self, point: InjectionPoint) -> tuple[Tensor, Tensor | None]:
        values = base_values("the file", point, self._mapped)
        if values is None:
            raise IncompatibleTargetError(f"the weight at {point.id} has no values here: it is on the meta device")
        return values


def _component(one: Component, paths: tuple[str, ...]) -> ComponentView:
    return ComponentView(one.name, tuple(class_keys(type(one.root))), _config(one.root), paths)


def _config(root: nn.Module) -> Mapping[str, Any]:
    """What transformers and diffusers keep at a model."""
    config: Any = getattr(root, "config", None)
    if isinstance(config, Mapping):
        return dict(config)
    as_dict: Callable[[], Mapping[str, Any]] | None = getattr(config, "to_dict", None)
    return {} if as_dict is None else as_dict()


def seen(mapped: MappedModel) -> Points:
    """The model's points, for a format."""
    return mapped.points().of(View(mapped))
