"""Where the adapted modules of a model are, and whether they still are there, and as large as they were."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from adapterkit.points import InjectionPoint, ParameterPoint

Place = tuple[str, str]
"""A model's name, and a path in it."""

_NEAR, _FIRST = 16, 4  # steps and weights of a look before each forward: two microseconds


def place_of(point: InjectionPoint) -> Place:
    """Where a point's module is."""
    return (point.model, point.path)


class Places:
    """The adapted modules of one state, each by the place at which it was found."""

    def __init__(self) -> None:
        self._modules: dict[Place, tuple[nn.Module, nn.Module]] = {}
        self._shapes: dict[tuple[Place, str], tuple[int, ...]] = {}
        self._steps: _Steps | None = None

    def put(self, point: InjectionPoint, root: nn.Module, module: nn.Module) -> None:
        """Keeps in mind that a point's module is in a model, and how large the whole weight is."""
        place, known = place_of(point), len(self._shapes)
        before = self._modules.get(place)
        self._modules[place] = (root, module)
        if isinstance(point, ParameterPoint) and point.layout.index is None:
            name = point.layout.parameter
            parameter = module._parameters.get(name)
            if parameter is not None and parameter.is_floating_point():
                self._shapes.setdefault((place, name), tuple(parameter.shape))
        if before is None or before[1] is not module or before[0] is not root or len(self._shapes) > known:
            self._steps = None

    def take(self, other: Places) -> None:
        """Keeps in mind what another one does."""
        self._modules |= other._modules
        self._shapes |= other._shapes
        self._steps = None

    def resize(self, place: Place, name: str, shape: tuple[int, ...]) -> None:
        """A weight is of another size from now on."""
        self._shapes[place, name] = shape
        self._steps = None

    def move(self, place: Place, module: nn.Module) -> None:
        """Another module is adapted there from now on."""
        self._modules[place] = (self._modules[place][0], module)
        self._steps = None

    def keep(self, places: Iterable[Place]) -> None:
        """Forgets all others."""
        kept = set(places)
        if kept >= self._modules.keys():
            return
        self._modules = {place: both for place, both in self._modules.items() if place in kept}
        self._shapes = {key: shape for key, shape in self._shapes.items() if key[0] in kept}
        self._steps = None

    def __getitem__(self, place: Place) -> nn.Module:
        return self._modules[place][1]

    def __iter__(self) -> Iterator[Place]:
        return iter(self._modules)

    def near(self) -> bool:
        """Whether the modules next to the root are where they were: heads, embeddings, lists of layers."""
        return self._known().same(_NEAR, _FIRST)

    def same(self) -> bool:
        """Whether all are."""
        return self._known().same(None, None)

    def lost(self) -> dict[Place, nn.Module | None]:
        """The places where another module is now, and which one; None where there is none."""
        self._steps = None  # a part of the way may be another, and lead to the same module
        there = {place: (module, found_at(root, place[1])) for place, (root, module) in self._modules.items()}
        return {place: found for place, (module, found) in there.items() if found is not module}

    def resized(self) -> dict[tuple[Place, str], tuple[tuple[int, ...], tuple[int, ...]]]:
        """The weights that have another shape: which it was, and which it is."""
        now = {key: self[key[0]]._parameters.get(key[1]) for key in self._shapes}
        both = {key: (self._shapes[key], tuple(one.shape)) for key, one in now.items() if one is not None}
        return {key: (was, shape) for key, (was, shape) in both.items() if _differ(was, shape)}

    def unheard(self) -> list[tuple[Place, int, int]]:
        """The embeddings that say that they have more rows than they have: how many, and how many they have.

        What the model reads of a weight while adapters act is what they make of it, and a resize that sets the `data`
        of that leaves the weight as it was.
        """
        embeddings = ((place, name, self[place]) for place, name in self._shapes)
        both = ((p, m.num_embeddings, m._parameters.get(n)) for p, n, m in embeddings if isinstance(m, nn.Embedding))
        return [(place, told, len(one)) for place, told, one in both if one is not None and told > len(one) > 0]

    def _known(self) -> _Steps:
        if self._steps is None:
            self._steps = _Steps(self._modules, self._shapes)
        return self._steps

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_steps": None}


class _Steps:
    """Every step of the ways from the models to the adapted modules, the first steps first."""

    def __init__(
        self,
        modules: Mapping[Place, tuple[nn.Module, nn.Module]],
        shapes: Mapping[tuple[Place, str], tuple[int, ...]],
    ) -> None:
        steps: dict[tuple[int, str], tuple[int, str, dict[str, nn.Module | None], nn.Module | None]] = {}
        for (_, path), (root, module) in modules.items():
            names = path.split(".") if path else []
            parent: nn.Module | None = root
            for depth, name in enumerate(names):
                children = {} if parent is None else parent._modules  # there is no such way: it does not lead there
                child = module if depth == len(names) - 1 else children.get(name)
                steps[id(children), name] = (depth, name, children, child)
                parent = child
        ordered = sorted(steps.values(), key=lambda step: step[0])
        self._names = [name for _, name, _, _ in ordered]
        self._parents = [children for _, _, children, _ in ordered]
        self._children = [child for _, _, _, child in ordered]
        sized = sorted(shapes.items(), key=lambda item: item[0][0][1].count("."))
        self._sizes = [(modules[place][1]._parameters, name, shape) for (place, name), shape in sized]
        rows = [(modules[place][1], shape[0]) for (place, _), shape in sized if shape]
        self._rows = [(module.__dict__, count) for module, count in rows if isinstance(module, nn.Embedding)]

    def same(self, steps: int | None, sizes: int | None) -> bool:
        """Whether they are what they were; of the first steps and weights alone, where numbers are given."""
        # One call for all: a look costs 40 ns a step.
        if [*map(dict.get, self._parents[:steps], self._names[:steps])] != self._children[:steps]:
            return False
        for told, count in self._rows[:sizes]:  # no generators: Dynamo refuses any beside a model that it compiles
            if told.get("num_embeddings", 0) > count:
                return False
        for held, name, shape in self._sizes[:sizes]:
            one = held.get(name)
            if one is not None and one.shape != shape and _differ(shape, tuple(one.shape)):
                return False
        return True


def _differ(was: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return was != shape and 0 not in shape  # what has no numbers is elsewhere: partitioned over devices


def found_at(root: nn.Module, path: str) -> nn.Module | None:
    """What is at a path now; through wrappers that answer for what they wrap."""
    module: Any = root
    for name in path.split(".") if path else ():
        module = getattr(module, name, None)
        if not isinstance(module, nn.Module):
            return None
    return module
