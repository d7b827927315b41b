"""Where a module of PEFT's files acts in the model at hand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from adapterkit.codec import Place
from adapterkit.formats.modules import Module, Modules
from adapterkit.formats.peft_config import PeftConfig
from adapterkit.formats.peft_keys import Foreign
from adapterkit.points import InjectionPoint, ParameterPoint, Points


class ModelNames:
    """The modules of a model, found by what a file of PEFT calls them.

    Args:
        points: The model's.
        config: The file's.
    """

    def __init__(self, points: Points, config: PeftConfig) -> None:
        self._config = config
        self._modules = Modules(points)
        self._component = next(iter(self._modules.components), "")
        self._own = self._modules.paths(self._component)
        self._others: dict[str, list[InjectionPoint]] = {}
        for point in points:
            if not isinstance(point, ParameterPoint) and point.component == self._component:
                self._others.setdefault(point.path, []).append(point)
        self.parameters = {
            f"{module.path}.{name}": module
            for modules in self._own.values()
            for module in modules
            for name in module.points[0].parameters
            if name not in ("weight", "bias")
        }

    def look_at(self, modules: Iterable[Foreign]) -> None:
        """Finds out how the file's names differ from the model's."""

    def pattern_path(self, foreign: Foreign) -> str:
        """What patterns of the config are matched with."""
        return foreign.path

    def places(self, foreign: Foreign) -> Sequence[Place] | None:
        """Where a module's tensors act; None where the model has no such module."""
        if not foreign.path:
            return [self._place(point) for points in self._others.values() for point in points]
        if module := self._module(foreign):
            return module.places
        if foreign.path in self._others:
            return [self._place(point) for point in self._others[foreign.path]]
        return None

    def _place(self, point: InjectionPoint) -> Place:
        return Place(point, point.shape, model=self._modules.model)

    def _module(self, foreign: Foreign) -> Module | None:
        own = self._own.get(foreign.path, ())
        if foreign.parameter:
            return next((module for module in own if module.parameter == foreign.parameter), None)
        targets = self._config.target_parameters
        adapted = [one for one in own if any(_ends(f"{one.path}.{one.parameter}", target) for target in targets)]
        if len(own) > 1 and adapted:
            order = sorted(adapted, key=lambda module: module.parameter, reverse=True)
            return order[foreign.depth] if foreign.depth < len(order) else None
        return own[0] if len(own) == 1 else None


def _ends(path: str, end: str) -> bool:
    return path == end or path.endswith(f".{end}")
