"""The learning rate as a function of the step, and the rate and decay of each parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from adapterkit.adapter import AdapterConfig, AdapterModule
from adapterkit.errors import ConfigError
from adapterkit.handle.building import Built
from adapterkit.handle.listing import points
from adapterkit.handle.training import trained_parameters
from adapterkit.points import InjectionPoint, ParameterPoint, Points
from adapterkit.selectors import Table
from adapterkit.training.config import Rate
from adapterkit.training.depths import Depths
from adapterkit.training.parts import parts_of
from adapterkit.training.run import Run
from adapterkit.training.state import Trainable, own_parameters


def factor(run: Run, step: int) -> float:
    """What multiplies every rate at step `step` (from 0): a linear rise over the warm-up, then the schedule's."""
    warmup = run.config.warmup_steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return run.schedule.factor(step - warmup, max(run.config.steps - warmup, 1))


class Rates:
    """What each point's parameters learn with: as the run says, or a selector says for some points.

    Args:
        run: The run.
        model: The base.
        chosen: The configs of the adapter, each with its points.
        extra: What else trains, by file name.

    Raises:
        ConfigError: A selector selects nothing that trains.
    """

    def __init__(
        self, run: Run, model: Any, chosen: Sequence[tuple[AdapterConfig, Points]], extra: Mapping[str, nn.Module]
    ) -> None:
        self._run, self._chosen, self._extra = run, chosen, extra
        self._points = {point.id: point for _, points in chosen for point in points}
        self._table: Table[Rate] = Table({rate.select: rate for rate in run.config.rates})
        decay = run.config.layer_decay
        self._depths = Depths(points(model) if decay else (), decay or 1.0)
        self._owners = _owners(model, extra) if run.config.rates or decay else {}
        if idle := self._table.idle([*self._points.values(), *self._owners.values()]):
            roles = ", ".join(sorted({point.role for point in (*self._points.values(), *self._owners.values())}))
            raise ConfigError(
                [f"rates: {text!r} selects nothing that trains; what does: {roles}" for text in idle], "run"
            )

    def trained(self, modules: Mapping[str, AdapterModule]) -> list[Trainable]:
        """Every parameter that trains: of the adapter, whose type may want other rates for some, and of what else does.

        Args:
            modules: The adapter's, by point.
        """
        found = []
        for config, own in self._chosen:
            part = Built(config, own, {point.id: modules[point.id] for point in own})
            for name, parameter, wanted in trained_parameters(part):
                rate, decay = self._at(self._points[name.rpartition("/")[0]])
                found.append(Trainable(name, parameter, rate * wanted, decay))
        for key, module in self._extra.items():
            for name, parameter in own_parameters(module):
                rate, decay = self._at(self._owners.get(id(parameter)))
                found.append(Trainable(f"{key}.{name}", parameter, rate, decay))
        return found

    def _at(self, point: InjectionPoint | None) -> tuple[float, float]:
        own = None if point is None else self._table.at(point, None)
        rate = self._run.learning_rate if own is None or own.learning_rate is None else own.learning_rate
        decay = self._run.config.weight_decay if own is None or own.weight_decay is None else own.weight_decay
        return rate * self._depths.factor(point), decay


def _owners(model: Any, extra: Mapping[str, nn.Module]) -> dict[int, InjectionPoint]:
    """Whose the parameters of these modules of the base are."""
    mine = {id(parameter) for module in extra.values() for _, parameter in own_parameters(module)}
    if not mine:
        return {}
    found: dict[int, InjectionPoint] = {}
    for point in points(model):
        root = model if isinstance(model, nn.Module) else parts_of(model)[point.component]
        for _, parameter in own_parameters(root.get_submodule(point.path)):
            if id(parameter) in mine and isinstance(point, ParameterPoint):
                found[id(parameter)] = point
    return found
