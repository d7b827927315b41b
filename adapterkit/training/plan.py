"""A run as it would be: its data, its points and what it takes, found before weights are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapterkit.adapter import AdapterConfig
from adapterkit.handle.listing import points
from adapterkit.points import InjectionPoint, Points
from adapterkit.training.best import check_best
from adapterkit.training.blocks import waiting_bytes
from adapterkit.training.checked import CheckedTask
from adapterkit.training.data_record import DataRecord
from adapterkit.training.needs import Needs, check_room, needs_of
from adapterkit.training.run import Run
from adapterkit.training.task import Task
from adapterkit.training.timing import foretold
from adapterkit.training.trackers import tracker_names


@dataclass(frozen=True)
class Plan:
    """What `--dry-run` shows.

    Attributes:
        record: What the task found in the data.
        becomes: What that becomes for the model.
        points: Where the adapter would act, with what it costs there.
        needs: Of memory and disk.
        time: What runs of before tell; None where there are none like it.
    """

    record: DataRecord
    becomes: Mapping[str, str]
    points: Points
    needs: Needs
    time: str | None = None

    @property
    def facts(self) -> Mapping[str, str]:
        """What is told, by name."""
        time = {} if self.time is None else {"time": self.time}
        return {**self.record.facts, **self.becomes, "it takes": str(self.needs), **time}


def plan_of(run: Run) -> Plan:
    """Looks at the data, the model and the disk.

    Raises:
        DataError: The data cannot be used.
        ConfigError: A tracker is unknown, or is not installed; or `best` is no figure of the task.
        StateError: The disk has too little room.
        AdapterKitError: The adapter does not fit the model.
    """
    tracker_names(run)
    task = CheckedTask(run)
    record = task.survey(None)
    check_best(run.config.best, task.measures())
    outline = task.outline()
    model = task.load_model() if outline is None else outline
    chosen, needs = foreseen(run, model, task)
    becomes = {} if outline is None else task.foresee(outline)
    return Plan(record, becomes, chosen, needs, foretold(run))


def parts_of_adapter(run: Run, model: Any, task: Task) -> list[tuple[AdapterConfig, Points]]:
    """The run's adapter, and what the task trains beside it as parts of it, each with its points.

    A fresh head of an adapter that trains heads itself, such as `Trainable("*")`, is the adapter's.

    Raises:
        AdapterKitError: One does not fit the model.
    """
    own = points(model, adapter=run.adapter)
    beside = [_without(config, points(model, adapter=config), run.adapter, own) for config in task.also()]
    return [(run.adapter, own), *((config, points(model, adapter=config)) for config in beside if config is not None)]


def _without(config: AdapterConfig, its: Points, adapter: AdapterConfig, own: Points) -> AdapterConfig | None:
    """The config, but not where the adapter is the same; None where nothing is left."""
    ids = {point.id for point in own}

    def same(point: InjectionPoint) -> bool:
        return point.id in ids and replace(adapter.at(point), targets=config.targets) == config.at(point)

    left = [point for point in its if not same(point)]
    if len(left) == len(its):
        return config
    return replace(config, settings={point.id: config.settings.get(point.id, {}) for point in left}) if left else None


def all_points(parts: Sequence[tuple[AdapterConfig, Points]]) -> Points:
    """The points of all parts, with what each costs there."""
    costs = {key: cost for _, own in parts for key, cost in own.costs.items()}
    return Points([point for _, own in parts for point in own], costs)


def foreseen(run: Run, model: Any, task: Task) -> tuple[Points, Needs]:
    """Where a run's adapter acts in a model or its outline, and what it takes.

    Raises:
        StateError: The disk has too little room.
        ConfigError: The model has fewer blocks than are to be swapped.
        AdapterKitError: The adapter does not fit the model.
    """
    chosen = all_points(parts_of_adapter(run, model, task))
    config = run.config
    waiting = waiting_bytes(task.core(model), config.block_swap, config.dtype) if config.block_swap else 0
    needs = needs_of(run, model, chosen, waiting)
    check_room(Path(run.config.output), needs)
    return chosen, needs
