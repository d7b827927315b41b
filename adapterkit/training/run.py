"""A run that has been checked as a whole: its keys, its adapter, its task and the task's own keys."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from pydantic import BaseModel

from adapterkit.adapter import AdapterConfig
from adapterkit.errors import AdapterKitError, ConfigError, PluginError, shown
from adapterkit.formats.source import path_of
from adapterkit.handle.building import check_name
from adapterkit.plugins.manager import class_of, get_plugin_manager, owner
from adapterkit.selectors import Selector
from adapterkit.specs import Spec, TaskSpec
from adapterkit.training.config import RunConfig, Section, check_section, installed_versions, read_values
from adapterkit.training.hints import hint, paths_of

if TYPE_CHECKING:
    from adapterkit.training.events import Callback
    from adapterkit.training.optimizer import OptimizerConfig
    from adapterkit.training.schedule import ScheduleConfig
    from adapterkit.training.task import Task

_Named = TypeVar("_Named", bound=Section)
_INSTEAD = {"bake": "`adapterkit bake` does it afterwards", "torch_compile": "leave out one of them"}


@dataclass(frozen=True)
class Run:
    """What `train` needs.

    Attributes:
        config: The keys of the run file.
        adapter: What to add to the model.
        task: The class that turns data into a loss.
        options: That class's own keys.
        optimizer: What changes the parameters.
        schedule: How the learning rate goes on after the warm-up.
        callbacks: Who is told what happens: classes, their options, and the plug-ins that they are from.
    """

    config: RunConfig
    adapter: AdapterConfig
    task: type[Task]
    options: BaseModel
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    callbacks: tuple[tuple[type[Callback], BaseModel, str], ...] = ()

    @property
    def learning_rate(self) -> float:
        """That of the run file, or what is usual with the optimizer."""
        given = self.config.learning_rate
        return self.optimizer.usual_rate if given is None else given

    def at(self, folder: Path) -> Run:
        """The run with another folder."""
        return dataclasses.replace(self, config=self.config.model_copy(update={"output": str(folder)}))

    def make_task(self) -> Task:
        """The task, which has loaded nothing yet."""
        return self.task(self.config, self.options)

    def resolved(self) -> dict[str, Any]:
        """The run file with nothing left to defaults, and the versions of the libraries, as JSON values."""
        values = {
            **self.config.model_dump(),
            "adapter": {"type": self.config.adapter["type"], **self.adapter.to_dict()},
            "options": self.options.model_dump(mode="json"),
            "optimizer": _whole(self.config.optimizer, self.optimizer),
            "learning_rate": self.learning_rate,
            "scheduler": _whole(self.config.scheduler, self.schedule),
            "versions": installed_versions(),
        }
        if self.config.epochs is not None:
            del values["steps"]  # they follow from the data
        return json.loads(json.dumps(values))  # tuples become lists


def _whole(given: str | Mapping[str, Any], section: Section) -> dict[str, Any]:
    """A section with its `type` and all of its keys."""
    return {"type": given if isinstance(given, str) else given["type"], **section.model_dump(mode="json")}


def load_run(path: Path | str | None, overrides: Sequence[str] = (), **values: Any) -> Run:
    """Reads and checks a run.

    Args:
        path: The run file, or None where `values` and `overrides` say everything.
        overrides: `key=value` or `section.key=value`.
        **values: Keys that take precedence over all others.

    Raises:
        ConfigError: With every problem that was found.
    """
    given: Any = overrides
    if isinstance(given, str) or not isinstance(given, Sequence) or not all(isinstance(one, str) for one in given):
        raise ConfigError([f"expected a list of overrides such as 'steps=500', not {shown(given)}"], "load_run()")
    problems: list[str] = []
    merged = read_values(None if path is None else path_of(path, "load_run()"), overrides, problems) | values
    run = check_run(merged, problems)
    if problems or run is None:
        raise ConfigError(problems, str(path) if path is not None else "run")
    return run


def check_run(values: Mapping[str, Any], problems: list[str]) -> Run | None:
    """The run that these values describe, or None after adding to `problems`."""
    task = _load_task(values.get("task"), problems)
    known = _known(values, task)
    config = cast("RunConfig | None", check_section(RunConfig, values, problems, known=known))
    adapter = check_adapter(values.get("adapter"), problems, known)
    options = _check_options(task, values.get("options", {}), problems, known)
    optimizer, schedule = check_method(values, problems)
    _check_formats(values.get("export"), problems)
    if config is not None:
        _check_name(config.adapter_name, problems)
        _check_rates(config, problems)
        if config.bake and task is not None:
            _check_bake(task, problems)
        if config.early_stop is not None and config.best is None:
            problems.append("early_stop: say with `best` by which figure, such as best=accuracy")
        for key in ("bake", "torch_compile") if config.block_swap else ():
            if getattr(config, key):
                problems.append(f"block_swap: does not go with {key}; {_INSTEAD[key]}")
        if config.epochs is not None and "steps" in values:
            problems.append(f"epochs: is {config.epochs:g}, and steps is {config.steps}; give one of them")
        if config.ema is not None and optimizer is not None and optimizer.averages:
            problems.append("ema: the optimizer averages by itself; set ema to null")
    callbacks = _check_callbacks(config.callbacks, problems) if config is not None else ()
    if config is None or adapter is None or task is None or options is None or optimizer is None or schedule is None:
        return None
    return Run(config, adapter, task, options, optimizer, schedule, callbacks)


def _check_callbacks(
    given: Sequence[str | Mapping[str, Any]], problems: list[str]
) -> tuple[tuple[type[Callback], BaseModel, str], ...]:
    from adapterkit.training.events import Callback  # which imports torch

    found: list[tuple[type[Callback], BaseModel, str]] = []
    for number, one in enumerate(given):
        section = {"type": one} if isinstance(one, str) else one
        try:
            spec = get_plugin_manager().callback(str(section.get("type")))
            cls = class_of(spec, Callback)
        except AdapterKitError as error:
            problems.append(f"callbacks.{number}: {error}")
            continue
        values = {key: value for key, value in section.items() if key != "type"}
        options = check_section(cls.Options, values, problems, f"callbacks.{number}.")
        found += [(cls, options, owner(spec))] if options is not None else []
    return tuple(found)


def _known(values: Mapping[str, Any], task: type[Task] | None) -> list[str]:
    """Every key that a run of this adapter and task may have, dotted."""
    section, adapter = values.get("adapter"), None
    with contextlib.suppress(AdapterKitError):  # which `check_adapter` tells
        name = section.get("type") if isinstance(section, Mapping) else None
        adapter = class_of(get_plugin_manager().adapter(name), AdapterConfig) if isinstance(name, str) else None
    options = None if task is None else task.Options
    return [*paths_of(RunConfig), *paths_of(adapter, "adapter."), *paths_of(options, "options.")]


def _check_name(name: str, problems: list[str]) -> None:
    try:
        check_name(name, ())
    except AdapterKitError as error:
        problems.append(f"adapter_name: {error}")


def _check_formats(names: object, problems: list[str]) -> None:
    for name in names if isinstance(names, list) else ():
        if not isinstance(name, str):
            continue  # the run's own check says what is wrong
        try:
            get_plugin_manager().format(name)
        except AdapterKitError as error:
            problems.append(f"export: {error}")


def _check_bake(task: type[Task], problems: list[str]) -> None:
    from adapterkit.training.task import Task  # which imports torch

    if task.write_model is Task.write_model:
        problems.append("bake: this task does not write models; set it to false, and see `adapterkit bake`")


def _check_rates(config: RunConfig, problems: list[str]) -> None:
    for number, rate in enumerate(config.rates):
        try:
            Selector(rate.select)
        except AdapterKitError as error:
            problems.append(f"rates.{number}.select: {error}")


def check_method(
    values: Mapping[str, Any], problems: list[str]
) -> tuple[OptimizerConfig | None, ScheduleConfig | None]:
    """The optimizer and the schedule; None in the place of one after adding to `problems`."""
    from adapterkit.training.optimizer import OptimizerConfig  # which import torch
    from adapterkit.training.schedule import ScheduleConfig

    manager = get_plugin_manager()
    optimizer = _named("optimizer", values, manager.optimizer, OptimizerConfig, problems)
    return optimizer, _named("scheduler", values, manager.schedule, ScheduleConfig, problems)


def _named(
    key: str, values: Mapping[str, Any], find: Callable[[str], Spec], base: type[_Named], problems: list[str]
) -> _Named | None:
    """What a name, or `type` and further keys, under `key` describes."""
    given = values.get(key, RunConfig.model_fields[key].default)
    section = {"type": given} if isinstance(given, str) else given
    if not isinstance(section, Mapping):
        return None  # the run's own check says what is wrong
    name = section.get("type")
    if not isinstance(name, str):
        problems.append(f"{key}.type: this key is required, a name such as {RunConfig.model_fields[key].default!r}")
        return None
    try:
        cls = class_of(find(name), base)
    except AdapterKitError as error:
        problems.append(f"{key}: {error}")
        return None
    found = check_section(cls, {k: v for k, v in section.items() if k != "type"}, problems, f"{key}.")
    return cast("_Named | None", found)


def check_adapter(section: object, problems: list[str], known: Sequence[str] = ()) -> AdapterConfig | None:
    """The adapter that `type` and its fields describe, or None after adding to `problems`.

    Args:
        section: What is under `adapter`.
        problems: Takes up a sentence for every value at fault.
        known: All keys of the run, for hints; by default those of the type.
    """
    if not isinstance(section, Mapping):
        return None  # the run's own check says what is wrong
    name = section.get("type")
    if not isinstance(name, str):
        problems.append(f"adapter.type: name an adapter type, such as {next(iter(get_plugin_manager().adapters()))!r}")
        return None
    try:
        cls = class_of(get_plugin_manager().adapter(name), AdapterConfig)
    except AdapterKitError as error:
        problems.append(f"adapter.type: {error}")
        return None
    values = {key: value for key, value in section.items() if key != "type"}
    return _build_adapter(cls, values, problems, known or list(paths_of(cls, "adapter.")))


def _build_adapter(
    cls: type[AdapterConfig], values: dict[str, Any], problems: list[str], known: Sequence[str]
) -> AdapterConfig | None:
    fields = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(set(values) - fields)
    problems += [f"unknown key {f'adapter.{key}'!r}.{hint(f'adapter.{key}', known)}" for key in unknown]
    try:
        adapter = cls.from_dict({key: value for key, value in values.items() if key in fields})
    except ConfigError as error:
        problems += [f"adapter.{problem}" for problem in error.problems]
        return None
    except AdapterKitError as error:
        problems.append(f"adapter: {error}")
        return None
    return None if unknown else adapter


def _load_task(name: object, problems: list[str]) -> type[Task] | None:
    if not isinstance(name, str):
        return None
    from adapterkit.training.task import Task  # which imports torch

    try:
        spec = get_plugin_manager().task(name)
        task = class_of(spec, Task)
        _check_declared(task, spec)
    except AdapterKitError as error:
        problems.append(f"task: {error}")
        return None
    return task


def _check_declared(task: type[Task], spec: TaskSpec) -> None:
    options, suffixes = getattr(task, "Options", None), task.suffixes
    if not isinstance(options, type) or not issubclass(options, BaseModel):
        raise PluginError(f"{spec}: Options is {options!r}; expected a subclass of Section", owner(spec))
    if not isinstance(suffixes, (tuple, list)) or not suffixes or not all(str(s).startswith(".") for s in suffixes):
        raise PluginError(f"{spec}: suffixes is {suffixes!r}; expected endings such as ('.txt',)", owner(spec))


def _check_options(
    task: type[Task] | None, section: object, problems: list[str], known: Sequence[str]
) -> BaseModel | None:
    if task is None or not isinstance(section, Mapping):
        return None
    return check_section(task.Options, section, problems, "options.", known)
