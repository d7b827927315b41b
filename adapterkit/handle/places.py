"""Where the adapted modules of a model are, and whether they still are there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from adapterkit.points import InjectionPoint

Place = tuple[str, str]
"""A component's name, and a path in it."""

_NEAR = 16  # steps of a look before each forward: a microsecond


def place_of(point: InjectionPoint) -> Place:
    """Where a point's module is."""
    return (point.component, point.path)


class Places:
    """The adapted modules of one state, each by the place at which it was found."""

    def __init__(self) -> None:
        self._modules: dict[Place, tuple[nn.Module, nn.Module]] = {}
        self._steps: _Steps | None = None

    def put(self, place: Place, root: nn.Module, module: nn.Module) -> None:
        """Keeps in mind that a module is at a place in a model."""
        self._modules[place] = (root, module)
        self._steps = None

    def keep(self, places: Iterable[Place]) -> None:
        """Forgets all others."""
        kept = set(places)
        self._modules = {place: both for place, both in self._modules.items() if place in kept}
        self._steps = None

    def __getitem__(self, place: Place) -> nn.Module:
        return self._modules[place][1]

    def both(self, place: Place) -> tuple[nn.Module, nn.Module]:
        """The model, and the module in it."""
        return self._modules[place]

    def __iter__(self) -> Iterator[Place]:
        return iter(self._modules)

    def near(self) -> bool:
        """Whether the modules next to the root are where they were: heads, embeddings, lists of layers."""
        return self._known().same(_NEAR)

    def same(self) -> bool:
        """Whether all are."""
        return self._known().same(None)

    def lost(self) -> dict[Place, nn.Module | None]:
        """The places where another module is now, and which one; None where there is none."""
        self._steps = None  # a part of the way may be another, and lead to the same module
        there = {place: (module, found_at(root, place[1])) for place, (root, module) in self._modules.items()}
        return {place: found for place, (module, found) in there.items() if found is not module}

    def _known(self) -> _Steps:
        if self._steps is None:
            self._steps = _Steps(self._modules)
        return self._steps

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_steps": None}


class _Steps:
    """Every step of the ways from the models to the adapted modules, the first steps first."""

    def __init__(self, modules: Mapping[Place, tuple[nn.Module, nn.Module]]) -> None:
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

    def same(self, first: int | None) -> bool:
        """Whether they are what they were; of the first steps alone, where a number is given."""
        # One call for all: a look costs 40 ns a step.
        return [*map(dict.get, self._parents[:first], self._names[:first])] == self._children[:first]


def found_at(root: nn.Module, path: str) -> nn.Module | None:
    """What is at a path now; through wrappers that answer for what they wrap."""
    module: Any = root
    for name in path.split(".") if path else ():
        module = getattr(module, name, None)
        if not isinstance(module, nn.Module):
            return None
    return module
