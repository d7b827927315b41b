"""The tables of specs that the plug-in manager fills: what has a name, of each kind."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TypeVar, cast

from adapterkit.errors import PluginConflictError, UnknownNameError
from adapterkit.specs import (
    AdapterSpec,
    BackendSpec,
    CallbackSpec,
    CodecSpec,
    CommandSpec,
    FormatSpec,
    LayerSpec,
    NamingSpec,
    OptimizerSpec,
    Origin,
    RecipeSpec,
    ScheduleSpec,
    Spec,
    TaskSpec,
)

SPEC_CLASSES: tuple[type[Spec], ...] = (
    AdapterSpec,
    BackendSpec,
    LayerSpec,
    FormatSpec,
    CodecSpec,
    NamingSpec,
    TaskSpec,
    RecipeSpec,
    OptimizerSpec,
    ScheduleSpec,
    CallbackSpec,
    CommandSpec,
)

_S = TypeVar("_S", bound=Spec)


class Catalog:
    """Specs by name, and by `plugin:name`, which always resolves.

    Every lookup raises UnknownNameError with the near matches and with `hint()`.
    """

    def __init__(self) -> None:
        self._specs: dict[type[Spec], dict[str, Spec]] = {cls: {} for cls in SPEC_CLASSES}
        self._qualified: dict[type[Spec], dict[str, Spec]] = {cls: {} for cls in SPEC_CLASSES}

    def hint(self) -> str:
        """A sentence that may explain why a name is missing."""
        return ""

    def adapters(self) -> Mapping[str, AdapterSpec]:
        """Every adapter type by name."""
        return self._named(AdapterSpec)

    def backends(self) -> Mapping[str, BackendSpec]:
        """Every backend by name."""
        return self._named(BackendSpec)

    def layers(self) -> Mapping[str, LayerSpec]:
        """Every layer handler by name."""
        return self._named(LayerSpec)

    def formats(self) -> Mapping[str, FormatSpec]:
        """Every file format by name."""
        return self._named(FormatSpec)

    def codecs(self) -> Mapping[str, CodecSpec]:
        """Every codec by name."""
        return self._named(CodecSpec)

    def namings(self) -> Mapping[str, NamingSpec]:
        """Every naming by name."""
        return self._named(NamingSpec)

    def tasks(self) -> Mapping[str, TaskSpec]:
        """Every training task by name."""
        return self._named(TaskSpec)

    def recipes(self) -> Mapping[str, RecipeSpec]:
        """Every recipe of the task `diffusion` by name."""
        return self._named(RecipeSpec)

    def optimizers(self) -> Mapping[str, OptimizerSpec]:
        """Every optimizer by name."""
        return self._named(OptimizerSpec)

    def schedules(self) -> Mapping[str, ScheduleSpec]:
        """Every schedule by name."""
        return self._named(ScheduleSpec)

    def callbacks(self) -> Mapping[str, CallbackSpec]:
        """Every callback of a training by name."""
        return self._named(CallbackSpec)

    def commands(self) -> Mapping[str, CommandSpec]:
        """Every subcommand by name."""
        return self._named(CommandSpec)

    def adapter(self, name: str) -> AdapterSpec:
        """The adapter type of this name, or of this `plugin:name`."""
        return self._find(AdapterSpec, name)

    def backend(self, name: str) -> BackendSpec:
        """The backend of this name, or of this `plugin:name`."""
        return self._find(BackendSpec, name)

    def layer(self, name: str) -> LayerSpec:
        """The layer handler of this name, or of this `plugin:name`."""
        return self._find(LayerSpec, name)

    def format(self, name: str) -> FormatSpec:
        """The file format of this name, or of this `plugin:name`."""
        return self._find(FormatSpec, name)

    def task(self, name: str) -> TaskSpec:
        """The training task of this name, or of this `plugin:name`."""
        return self._find(TaskSpec, name)

    def optimizer(self, name: str) -> OptimizerSpec:
        """The optimizer of this name, or of this `plugin:name`."""
        return self._find(OptimizerSpec, name)

    def schedule(self, name: str) -> ScheduleSpec:
        """The schedule of this name, or of this `plugin:name`."""
        return self._find(ScheduleSpec, name)

    def callback(self, name: str) -> CallbackSpec:
        """The callback of this name, or of this `plugin:name`."""
        return self._find(CallbackSpec, name)

    def command(self, name: str) -> CommandSpec:
        """The subcommand of this name, or of this `plugin:name`."""
        return self._find(CommandSpec, name)

    def provider(self, kind: str, name: str) -> tuple[str, str]:
        """The distribution that provides something, and its version.

        Args:
            kind: "adapter", "backend", "layer", "format", "codec", "naming", "task", "recipe", "optimizer",
                "schedule", "callback" or "command".
            name: Its name.
        """
        classes = {cls.kind: cls for cls in self._specs}
        if kind not in classes:
            raise UnknownNameError("kind", kind, classes)
        origin = self._find(classes[kind], name).origin
        return (origin.distribution, origin.version) if origin else ("", "")

    def spec_of(self, cls: type) -> AdapterSpec | None:
        """The adapter type whose config class is `cls`, if it is registered. Imports nothing."""
        for spec in self.adapters().values():
            module_name, _, path = spec.target.partition(":")
            if (cls.__module__, cls.__qualname__) == (module_name, path):
                return spec
            # A package may define the class in a submodule and name the package in its target.
            if getattr(sys.modules.get(module_name), path, None) is cls:
                return spec
        return None

    def check_free(self, specs: Iterable[Spec], origin: Origin) -> None:
        """Raise PluginConflictError, naming both sides, if any of these names is taken."""
        clashes = [(spec, taken) for spec in specs if (taken := self._specs[type(spec)].get(spec.name))]
        if clashes:
            what = "; ".join(f"{s.kind} {s.name!r} comes from {t.origin} and from {origin}" for s, t in clashes)
            qualified = f"{origin.plugin}:{clashes[0][0].name}"
            raise PluginConflictError(
                f"{what}. The first to be found keeps the name: uninstall one of them, or write {qualified!r}",
                origin.plugin,
            )

    def qualify(self, specs: Iterable[Spec], origin: Origin) -> None:
        """Make these available as `plugin:name`."""
        for spec in specs:
            self._qualified[type(spec)][f"{origin.plugin}:{spec.name}"] = spec

    def publish(self, specs: Iterable[Spec], origin: Origin) -> None:
        """Make these available by their names, which must be free, and as `plugin:name`."""
        specs = list(specs)
        self.qualify(specs, origin)
        for spec in specs:
            self._specs[type(spec)][spec.name] = spec

    def withdraw(self, plugin: str) -> None:
        """Forget everything that a plug-in provides."""
        for table in (*self._specs.values(), *self._qualified.values()):
            for key in [key for key, spec in table.items() if spec.origin and spec.origin.plugin == plugin]:
                del table[key]

    def provided_by(self, origin: Origin) -> list[Spec]:
        """What a plug-in provides, by whichever name."""
        return [spec for table in self._qualified.values() for spec in table.values() if spec.origin == origin]

    def _named(self, cls: type[_S]) -> Mapping[str, _S]:
        return MappingProxyType(cast("dict[str, _S]", self._specs[cls]))

    def _find(self, cls: type[_S], name: object) -> _S:
        known = isinstance(name, str)  # users and files say anything
        spec = self._specs[cls].get(name) or self._qualified[cls].get(name) if known else None
        if spec is None:
            raise UnknownNameError(cls.kind, name, self._specs[cls], self.hint())
        return cast("_S", spec)
