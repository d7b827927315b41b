"""Points for an adapter without its model: their shapes are read off its tensors.

No type is asked for its layout. Each builds, on the meta device, a module at a point whose sizes are primes; where
these come back in the shapes of its tensors, the file's tensors have the point's sizes. Where they do not (a Kronecker
product splits them), the sizes are products of two of the file's, and what is tried tells which. Either is proved by
building again.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adapterkit.adapter import AdapterConfig
from adapterkit.errors import BaseNeededError
from adapterkit.points import InjectionPoint, NormPoint, Tag, WeightLayout, WeightPoint

Shapes = Mapping[str, tuple[int, ...]]


class _Sizes(NamedTuple):
    out: int
    width: int
    kernel: tuple[int, ...]


_ASKED = (_Sizes(1009, 1013, (53, 59, 61)), _Sizes(1019, 1021, (67, 71, 73)))
"""Sizes to ask with; the second, where a rank is one of the first."""
_MOST_TRIED = 5000
_KERNEL = 9


class _Made(NamedTuple):
    point: InjectionPoint
    told: bool


class MadeUp:
    """Points of one config, from ids and tensors.

    Args:
        config: Of the part.
        source: Named in errors.
    """

    def __init__(self, config: AdapterConfig, source: object) -> None:
        self._config, self._source = config, source
        self._known: dict[Hashable, _Made | None] = {}
        self._guessed: set[str] = set()

    def point(self, key: str, tensors: Mapping[str, Tensor]) -> InjectionPoint | None:
        """A point of this id for which the type makes such tensors; None where none that has a weight is it.

        Raises:
            BaseNeededError: The config asks for what only the model knows of the point.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        alike = (key.partition("@")[0], repr(self._config.settings.get(key)), *sorted(shapes.items()))
        if not shapes:  # nothing tells
            return None
        if alike not in self._known:
            self._known[alike] = next(self._fitting(key, shapes), None) or self._tried(key, shapes)
        found = self._known[alike]
        if found is None:
            return None
        if not found.told:
            self._guessed.add(key)
        return _renamed(found.point, key)

    def sized(self, key: str) -> bool:
        """Whether the tensors of a point that was made up tell all of its sizes."""
        return key not in self._guessed

    def tells(self, point: InjectionPoint) -> bool:
        """Whether they tell, too, that it is no convolution of a kernel of 3 x 3."""
        out, width = point.shape[0], math.prod(point.shape[1:])
        if point.kind != "weight" or len(point.shape) != 2 or width % _KERNEL:
            return True
        return self._shapes(_weight(point.id, _Sizes(out, width // _KERNEL, (3, 3)), True)) != self._shapes(point)

    def _fitting(self, key: str, shapes: Shapes) -> Iterator[_Made]:
        deep = sorted({max(len(shape) - 2, 0) for shape in shapes.values()} | {0}, reverse=True)
        for asked, axes, bias in itertools.product(_ASKED, deep, (True, False)):
            if axes > len(asked.kernel):
                continue
            for make in (_weight, _norm):
                sizes = asked._replace(kernel=asked.kernel[:axes])
                made = self._shapes(make(key, sizes, bias))
                found = None if made is None else _found(sizes, made, shapes)
                if found is not None and self._shapes(point := make(key, found[0], bias)) == shapes:
                    yield _Made(point, found[1] or make is _norm)

    def _tried(self, key: str, shapes: Shapes) -> _Made | None:
        """The weight of sizes that are products for which the type makes these tensors; None for none or several."""
        kernels = {shape[2:] for shape in shapes.values() if len(shape) > 2} or {()}
        sizes = sorted({size for shape in shapes.values() for size in shape[:2]})
        products = sorted({a * b for a, b in itertools.product(sizes, (1, *sizes))})
        if len(kernels) * len(products) ** 2 > _MOST_TRIED:
            return None
        tried = (_weight(key, _Sizes(*one), True) for one in itertools.product(products, products, kernels))
        fitting = [point for point in tried if self._shapes(point) == shapes]
        return _Made(fitting[0], told=True) if len(fitting) == 1 else None

    def _shapes(self, point: InjectionPoint) -> Shapes | None:
        """Those of what the type makes at a point; None where it can make nothing there."""
        if point.kind not in self._config.kinds:
            return None
        try:
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of sizes that are no layer's
                module = self._config.at(point).build(point)
            return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        except BaseNeededError as error:
            raise BaseNeededError(str(error), self._source, point.id) from error
        except Exception:  # noqa: BLE001 - a type may fail in any way at a size that is no layer's
            return None


def _found(asked: _Sizes, made: Shapes, shapes: Shapes) -> tuple[_Sizes, bool] | None:
    """The sizes that stand where those that were asked with came out; None where these cannot be a point's tensors.

    Returns:
        The sizes, 1 for one that no tensor tells; and whether they tell all of them.
    """
    if made.keys() != shapes.keys() or any(len(made[name]) != len(shapes[name]) for name in made):
        return None
    sizes: dict[int, int] = {}
    primes = {asked.out, asked.width, *asked.kernel}
    for name, own in made.items():
        for was, size in zip(own, shapes[name], strict=True):
            if (sizes.setdefault(was, size) if was in primes else was) != size:
                return None
    kernel = tuple(sizes.get(prime, 1) for prime in asked.kernel)
    return _Sizes(sizes.get(asked.out, 1), sizes.get(asked.width, 1), kernel), primes <= sizes.keys()


def _weight(key: str, sizes: _Sizes, bias: bool) -> InjectionPoint:
    ones = (1,) * len(sizes.kernel)
    layout = WeightLayout("conv", bias, sizes.kernel, ones, (0,) * len(ones), ones) if ones else _LINEAR[bias]
    return _named(WeightPoint, key, sizes.width, sizes.out, layout)


def _norm(key: str, sizes: _Sizes, bias: bool) -> InjectionPoint:
    return _named(NormPoint, key, sizes.out, sizes.out, WeightLayout("norm", bias, access="read"))


_LINEAR: Sequence[WeightLayout] = (WeightLayout("linear"), WeightLayout("linear", bias=True))


def _renamed(point: InjectionPoint, key: str) -> InjectionPoint:
    return _named(type(point), key, point.in_features, point.out_features, point.layout)


def _named(cls: type[InjectionPoint], key: str, width: int, out: int, layout: WeightLayout) -> InjectionPoint:
    role, _, place = key.partition("@")
    component, _, site = place.partition(".")
    return cls(role, site, site, width, out, layout, tags=_Tags(component))


class _Tags(dict[str, Tag]):
    """The tags of a made-up point: its component, and no others that anybody could rely on."""

    def __init__(self, component: str) -> None:
        super().__init__(component=component)

    def get(self, key: str, default: object = None) -> Tag:  # type: ignore[override]
        if key not in self:
            raise BaseNeededError(f"a selector of its config asks for the tag {key!r}, which the base alone can tell")
        return self[key]
