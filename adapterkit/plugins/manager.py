"""The plug-in manager: loads every plug-in in isolation and answers which adapter, backend, format, … has a name.

A plug-in that fails is recorded, named in one warning and skipped; it never breaks the rest. Three environment
variables steer this: ADAPTERKIT_LOAD_PLUGINS=a,b loads these distributions only (empty: none),
ADAPTERKIT_STRICT_PLUGINS=1 makes every failure an error, ADAPTERKIT_TRACE_PLUGINS=1 prints each hook call to stderr.
Plug-in code runs with the rights of the user who starts it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Literal, TypeVar, cast

import pluggy

from adapterkit import __version__, hookspecs
from adapterkit.errors import (
    PluginConflictError,
    PluginError,
    PluginIncompatibleError,
    PluginLoadError,
    blaming,
    did_you_mean,
)
from adapterkit.plugins.catalog import SPEC_CLASSES, Catalog
from adapterkit.plugins.discovery import Candidate, candidates, check_compatible, is_allowed
from adapterkit.plugins.matching import match, peel
from adapterkit.specs import BackendSpec, Origin, Spec

STRICT = "ADAPTERKIT_STRICT_PLUGINS"
TRACE = "ADAPTERKIT_TRACE_PLUGINS"

Status = Literal["active", "failed", "conflict", "incompatible", "blocked"]

_REGISTERS = {f"adapterkit_register_{cls.kind}s": cls for cls in SPEC_CLASSES}
_RESOLVE = "adapterkit_resolve_backend"
_HOOKS = frozenset({*_REGISTERS, _RESOLVE})

_HEAVY = frozenset({"torch", "torchvision", "transformers", "diffusers", "timm", "accelerate", "peft"})
_SLOW = 0.5
"""Seconds of importing a plug-in that are worth a warning: everybody waits for them at every start."""

_log = logging.getLogger(__name__)

_T = TypeVar("_T")


@dataclass(frozen=True)
class PluginRecord:
    """What became of one plug-in.

    Args:
        name: Its entry-point name.
        dist: The distribution that provides it.
        version: That distribution's version.
        status: `active`, or why not.
        error: The error that kept it from being active.
        provides: What it registered, as `"adapter lora"`. For `conflict`: `error` names what only `plugin:name` has.
        seconds: What importing it took.
        heavy: The large libraries that it imported, which adapterkit's start waits for.
    """

    name: str
    dist: str
    version: str
    status: Status
    error: PluginError | None = None
    provides: tuple[str, ...] = ()
    seconds: float = 0.0
    heavy: tuple[str, ...] = ()

    @property
    def slow(self) -> str | None:
        """What is wrong with how long it takes, or None."""
        if not self.heavy and self.seconds < _SLOW:
            return None
        what = f", importing {', '.join(self.heavy)}" if self.heavy else ""
        return f"takes {self.seconds:.1f} s whenever adapterkit starts{what}; its entry module should import less"


class PluginManager(pluggy.PluginManager, Catalog):
    """Knows what is installed. A new one is empty; see `get_plugin_manager` for the one that adapterkit uses."""

    def __init__(self) -> None:
        pluggy.PluginManager.__init__(self, hookspecs.GROUP)
        Catalog.__init__(self)
        self.add_hookspecs(hookspecs)
        self.records: list[PluginRecord] = []

    def load_builtin(self) -> None:
        """Register what adapterkit itself provides. To be called first, so that its names are taken."""
        from adapterkit.plugins import builtin

        self.register(builtin, name="adapterkit", distribution="adapterkit", version=__version__)

    def load_entry_points(self) -> None:
        """Load every installed plug-in, each in isolation.

        Raises:
            PluginError: A plug-in fails and ADAPTERKIT_STRICT_PLUGINS is set.
        """
        for candidate in candidates():
            if not is_allowed(candidate):
                self._record(_origin(candidate), "blocked")
                continue
            began, loaded = time.perf_counter(), _HEAVY & sys.modules.keys()
            try:
                with contextlib.redirect_stdout(sys.stderr):  # standard output is for what was asked for
                    self._load(candidate)
            except (Exception, SystemExit) as error:  # noqa: BLE001 - third-party code may raise anything at import
                self._fail(_origin(candidate), error)
            self._time(time.perf_counter() - began, sorted((_HEAVY & sys.modules.keys()) - loaded))

    def register(
        self, plugin: object, name: str | None = None, *, distribution: str = "", version: str = ""
    ) -> str | None:
        """Add a plug-in from this process, with the checks that an installed one undergoes.

        Args:
            plugin: A module or object that holds hook implementations.
            name: The name that qualifies what it provides; the module's own name by default.
            distribution: What files are to record as the provider; nothing by default, since it is not installed.
            version: Its version.

        Returns:
            The name.

        Raises:
            PluginError: It breaks a rule of the hooks. Nothing of it stays registered.
            PluginConflictError: It provides a name that is taken.
        """
        own_name = plugin.__name__ if isinstance(plugin, ModuleType) else type(plugin).__name__
        origin = Origin(name or own_name, distribution, version)
        self._install(plugin, origin)
        return origin.plugin

    def unregister(self, plugin: Any = None, name: str | None = None) -> Any:
        """Remove a plug-in and everything that it provides."""
        name = name or self.get_name(plugin)
        removed = super().unregister(plugin=plugin, name=name)
        if name is not None:
            self.withdraw(name)
        self.records = [record for record in self.records if record.name != name]
        return removed

    def _load(self, candidate: Candidate) -> None:
        check_compatible(candidate)
        self._install(candidate.load(), _origin(candidate), qualify_conflicts=True)

    def _install(self, plugin: object, origin: Origin, *, qualify_conflicts: bool = False) -> None:
        """Register hooks and specs, all of them or none; with `qualify_conflicts` also the specs beside a conflict."""
        self._register_hooks(plugin, origin)
        specs: list[Spec] = []
        try:
            specs = self._collect(plugin, origin)
            self.check_free(specs, origin)
        except BaseException as error:
            super().unregister(name=origin.plugin)
            if qualify_conflicts and isinstance(error, PluginConflictError):
                self.qualify(specs, origin)
                self.publish([spec for spec in specs if spec.name not in self._specs[type(spec)]], origin)
            raise
        self.publish(specs, origin)
        self._record(origin, "active")

    def _register_hooks(self, plugin: object, origin: Origin) -> None:
        if self.has_plugin(origin.plugin):
            taken = next((record for record in self.records if record.name == origin.plugin), None)
            whose = f"{taken.dist} {taken.version}" if taken else "another distribution"
            raise PluginConflictError(f"{whose} and {origin} both provide a plug-in of this name", origin.plugin)
        _check_hooks(plugin, self, origin)
        try:
            super().register(plugin, origin.plugin)
        except (pluggy.PluginValidationError, ValueError) as error:
            # Older releases of pluggy leave a plug-in half registered here.
            if self.has_plugin(origin.plugin):
                super().unregister(name=origin.plugin)
            raise PluginLoadError(" ".join(str(error).split()), origin.plugin) from error

    def _collect(self, plugin: object, origin: Origin) -> list[Spec]:
        specs: dict[tuple[str, str], Spec] = {}
        for hook_name, cls in _REGISTERS.items():
            for spec in self._registered(hook_name, cls, plugin, origin):
                if (cls.kind, spec.name) in specs:
                    raise PluginLoadError(f"{hook_name} returned {cls.kind} {spec.name!r} twice", origin.plugin)
                specs[cls.kind, spec.name] = replace(spec, origin=origin)
        return list(specs.values())

    def _registered(self, hook_name: str, cls: type[Spec], plugin: object, origin: Origin) -> list[Spec]:
        implementations = [i for i in getattr(self.hook, hook_name).get_hookimpls() if i.plugin is plugin]
        if not implementations:
            return []
        try:
            results = self._call(hook_name, plugin)
            specs = [spec for result in results for spec in _checked(result, hook_name, cls, origin)]
        except (Exception, SystemExit) as error:
            if isinstance(error, PluginError):
                raise
            raise PluginLoadError(f"{hook_name} raised {type(error).__name__}: {error}", origin.plugin) from error
        if len(results) < len(implementations):
            raise PluginLoadError(f"{hook_name} returned None; expected a list of {cls.__name__}", origin.plugin)
        return specs

    def _call(self, hook_name: str, plugin: object, **arguments: object) -> Any:
        """Call one hook of one plug-in: pluggy abandons a call to all of them when one raises."""
        others = [other for other in self.get_plugins() if other is not plugin]
        return self.subset_hook_caller(hook_name, others)(**arguments)

    def _fail(self, origin: Origin, error: BaseException) -> None:
        if not isinstance(error, PluginError):
            cause = error
            error = PluginLoadError(f"{type(cause).__name__}: {cause}", origin.plugin)
            error.__cause__ = cause
        if _flag(STRICT):
            raise error
        status: Status = "failed"
        if isinstance(error, PluginConflictError):
            status = "conflict"
        elif isinstance(error, PluginIncompatibleError):
            status = "incompatible"
        self._record(origin, status, error)
        what = "is skipped in part" if self.provided_by(origin) else "is skipped"
        _log.warning("%s (%s) %s. See: adapterkit plugins", error, origin, what)

    def _time(self, seconds: float, heavy: list[str]) -> None:
        """Notes what the plug-in that was loaded last has cost."""
        record = self.records[-1] = replace(self.records[-1], seconds=seconds, heavy=tuple(heavy))
        if record.slow is not None:
            _log.warning("the plug-in %s (%s %s) %s", record.name, record.dist, record.version, record.slow)

    def _record(self, origin: Origin, status: Status, error: PluginError | None = None) -> None:
        provides = tuple(f"{spec.kind} {spec.name}" for spec in self.provided_by(origin))
        self.records.append(PluginRecord(origin.plugin, origin.distribution, origin.version, status, error, provides))

    def backend_for(self, model: object) -> BackendSpec:
        """The backend that speaks for `model`; wrappers such as `torch.compile`'s are looked through.

        Raises:
            AmbiguousBackendError: Several backends claim the same class.
            UnsupportedModelError: No backend claims it.
        """
        model = peel(model)
        return self._resolved(model) or match(model, self.backends(), self.hint())

    def _resolved(self, model: object) -> BackendSpec | None:
        # pluggy keeps implementations in reverse order of call: the latest to register is asked first.
        implementations = reversed(getattr(self.hook, _RESOLVE).get_hookimpls())
        for plugin in dict.fromkeys(implementation.plugin_name for implementation in implementations):
            try:
                name = self._call(_RESOLVE, self.get_plugin(plugin), model=model)
                if name is not None:
                    return self.backend(name)
            except Exception as error:  # third-party code may raise anything
                if _flag(STRICT):
                    raise PluginError(f"{_RESOLVE} failed: {error}", plugin) from error
                _log.warning("plug-in %r: %s is ignored: %s", plugin, _RESOLVE, error)
        return None

    def hint(self) -> str:
        broken = [record for record in self.records if record.error is not None]
        if not broken:
            return ""
        names = ", ".join(f"{record.name} ({record.dist}: {record.status})" for record in broken)
        return f"Not loaded: {names}. See: adapterkit plugins"


def _check_hooks(plugin: object, manager: PluginManager, origin: Origin) -> None:
    found = False
    for name in dir(plugin):
        options = manager.parse_hookimpl_opts(plugin, name)
        if options is None:
            if name in _HOOKS:
                raise PluginLoadError(f"{name} lacks the decorator @adapterkit.hookimpl", origin.plugin)
            continue
        hook_name = options.get("specname") or name
        if hook_name not in _HOOKS:
            raise PluginLoadError(f"there is no hook {hook_name!r}.{did_you_mean(hook_name, _HOOKS)}", origin.plugin)
        found = True
    if not found:
        raise PluginLoadError(f"{plugin!r} implements none of the hooks {', '.join(sorted(_HOOKS))}", origin.plugin)


def _checked(result: object, hook_name: str, cls: type[Spec], origin: Origin) -> Iterator[Spec]:
    if not isinstance(result, Iterable) or isinstance(result, (str, bytes, Mapping)):
        raise PluginLoadError(f"{hook_name} returned {result!r}; expected a list of {cls.__name__}", origin.plugin)
    for item in cast("Iterable[object]", result):
        if not isinstance(item, cls):
            raise PluginLoadError(f"{hook_name} returned {item!r}; expected only {cls.__name__}", origin.plugin)
        yield item


def _origin(candidate: Candidate) -> Origin:
    return Origin(candidate.name, candidate.distribution, candidate.version)


def _flag(variable: str) -> bool:
    return os.environ.get(variable, "").lower() not in ("", "0", "false", "no")


def class_of(spec: Spec, base: type[_T]) -> type[_T]:
    """The class that a spec names.

    Raises:
        MissingDependencyError, PluginLoadError: See `Spec.load`.
        PluginError: It is no subclass of `base`.
    """
    with contextlib.redirect_stdout(sys.stderr):
        cls: object = spec.load()
    if isinstance(cls, type) and issubclass(cls, base):
        return cls
    raise PluginError(f"{spec} is {cls!r}; expected a subclass of {base.__module__}.{base.__name__}", owner(spec))


def instance_of(spec: Spec, base: type[_T]) -> _T:
    """A new instance of the class that a spec names; errors as for `class_of`."""
    cls = class_of(spec, base)
    with blaming(spec, f"{cls.__name__}()", owner(spec)):
        return cls()


def owner(spec: Spec) -> str:
    """The name of the plug-in that registered a spec."""
    return spec.origin.plugin if spec.origin else ""


@functools.cache
def get_plugin_manager() -> PluginManager:
    """The manager of this process, with the built-ins and every installed plug-in. Loaded on the first call."""
    manager = PluginManager()
    if _flag(TRACE):
        manager.trace.root.setwriter(sys.stderr.write)
        manager.enable_tracing()
    manager.load_builtin()
    manager.load_entry_points()
    return manager
