"""A base model: its points, and its weights one by one. Of one in files nothing else is in memory."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from adapterkit.errors import IncompatibleTargetError, ModelNotFoundError
from adapterkit.handle.view import View
from adapterkit.kernels.weights import base_weight, wide_dtype
from adapterkit.mapping.component import Component
from adapterkit.mapping.model import MappedModel, map_model
from adapterkit.points import InjectionPoint, ParameterPoint, Points
from adapterkit.tools.original import open_original
from adapterkit.tools.stored import StoredModel, by_name, is_whole
from adapterkit.tools.tensor_files import TensorFiles, TensorMap, Tensors, weight_files
from adapterkit.training.skeleton import skeleton


class Base:
    """A model or pipeline.

    Args:
        mapped: What it is; on the meta device where its weights are in files.
        models: Component -> what is stored of it in files.
        label: What errors call it.
    """

    def __init__(self, mapped: MappedModel, models: Mapping[str, StoredModel] | None = None, label: str = "") -> None:
        self.mapped, self.models, self.label = mapped, models or {}, label or mapped.label

    @functools.cached_property
    def points(self) -> Points:
        """Its points; `points.model` reads the weights."""
        return self.mapped.points().of(_FileView(self) if self.models else View(self.mapped))

    def model(self, component: str) -> StoredModel:
        """A component's files.

        Raises:
            ModelNotFoundError: They are not here.
        """
        if component not in self.models:
            raise ModelNotFoundError(f"the weights of {self.label} are needed, and are not in a folder here")
        return self.models[component]


class _FileView(View):
    """A `ModelView` whose values are read from files."""

    def __init__(self, base: Base) -> None:
        super().__init__(base.mapped)
        self._base = base

    def values(self, point: InjectionPoint) -> tuple[Tensor, Tensor | None]:
        if not isinstance(point, ParameterPoint):
            raise IncompatibleTargetError(f"there is no weight at {point.id}")
        weight, bias = base_weight(self._base.model(point.model).module(point.path), point)
        if weight is None or not is_whole(weight.dtype):
            raise IncompatibleTargetError(f"the weight at {point.id} is no dense floating-point one (quantized?)")
        wide = wide_dtype(weight.dtype)
        return weight.to(wide), None if bias is None else bias.to(wide)


def base_of(model: object, tensors: Mapping[str, Tensor] | None = None) -> Base:
    """A base in memory; nothing of it is changed.

    Args:
        model: A torch module or a diffusers pipeline.
        tensors: A state dict of the module, in the place of its own values: it may be on the meta device.

    Raises:
        UnsupportedModelError: No backend knows it.
    """
    mapped = map_model(model)
    if tensors is None:
        return Base(mapped)
    held = TensorMap(tensors)
    return Base(mapped, {name: _stored(one, held, "the state dict") for name, one in mapped.models.items()})


def _stored(component: Component, tensors: Tensors, label: str) -> StoredModel:
    names = [name for name, _ in component.root.named_parameters()]
    return StoredModel(component.root, tensors, by_name(names, tensors), label)


def open_base(name: str) -> Base:
    """A base model: a folder of transformers, diffusers or timm, an original checkpoint, a hub id, or `timm:NAME`.

    Of what is not in a folder here, there are points and no weights.

    Raises:
        ModelNotFoundError: There is no model of a known layout at that place.
        UnsupportedModelError: No backend knows it.
    """
    if Path(name).is_file():
        return Base(*open_original(Path(name)), name)
    shape = skeleton(name)
    mapped = map_model(shape)
    models: dict[str, StoredModel] = {}
    folder = Path(name)
    for component, one in mapped.models.items():
        inside = folder / component if not isinstance(shape, nn.Module) else folder
        if inside.is_dir():
            models[component] = _stored(one, TensorFiles(weight_files(inside)), str(inside))
    return Base(mapped, models, name)
