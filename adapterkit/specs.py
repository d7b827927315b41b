"""What a plug-in hands over: frozen descriptions that hold `"module:attr"` strings, so that nothing heavy is imported.

    AdapterSpec("gate", "my_package:Gate", kinds={"output"}, summary="one learnt gate per feature")

A spec is checked when it is made; its target is imported by `load()` and by nothing else.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from typing import Any, ClassVar

from adapterkit.errors import ConfigError, MissingDependencyError, PluginLoadError, did_you_mean
from adapterkit.torchvision_ops import ensure_torchvision_ops

POINT_KINDS = frozenset({"weight", "norm", "output", "attention", "tokens"})

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_DASHED_NAME = re.compile(r"[a-z][a-z0-9_-]*")
_TARGET = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_CLASS = re.compile(r"[A-Za-z_]\w*:[A-Za-z_]\w*")


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a spec came from: the plug-in's entry-point name, its distribution and that distribution's version.

    A plug-in that was registered in the process has no distribution: nothing can be installed that would provide it.
    """

    plugin: str
    distribution: str
    version: str

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}".strip() or f"{self.plugin} (registered in this process)"


@dataclass(frozen=True, slots=True)
class Spec:
    """A name and the `"module:attr"` that it stands for.

    Args:
        name: What users write. Lower case, digits, underscores (a task's and a command's name may hold dashes).
        target: `"package.module:attribute"`.
        origin: Filled in by the plug-in manager; a plug-in leaves it out.

    Raises:
        ConfigError: Listing every field that is wrong.
    """

    kind: ClassVar[str] = "spec"
    name_pattern: ClassVar[re.Pattern[str]] = _NAME
    class_names: ClassVar[str] = ""
    """The field that holds classes as `"package:Class"`, where there is one."""

    name: str
    target: str
    origin: Origin | None = field(default=None, kw_only=True, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.class_names and not isinstance(given := getattr(self, self.class_names), str):
            object.__setattr__(self, self.class_names, tuple(given))
        if problems := list(self.problems()):
            raise ConfigError(problems, where=f"{type(self).__name__} {self.name!r}")

    def problems(self) -> Iterator[str]:
        """One sentence for each field that cannot be used."""
        if not self.name_pattern.fullmatch(str(self.name)):
            yield f"name {self.name!r} does not match {self.name_pattern.pattern}"
        if not _TARGET.fullmatch(str(self.target)):
            yield f"target {self.target!r} is not of the form 'package.module:attribute'"
        if self.class_names:
            yield from _class_problems(self.class_names, getattr(self, self.class_names))

    def load(self) -> Any:
        """Import the target and return it.

        Raises:
            MissingDependencyError: A package that the target needs is not installed.
            PluginLoadError: The import fails otherwise, or the module lacks the attribute.
        """
        module_name, _, path = self.target.partition(":")
        if module_name not in sys.modules:
            self.prepare()
        try:
            value: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise self._import_failure(error, module_name) from error
        except Exception as error:  # a mismatched binary raises RuntimeError or OSError, not ImportError
            raise PluginLoadError(f"{self} failed to import: {type(error).__name__}: {error}", self._plugin) from error
        for part in path.split("."):
            try:
                value = getattr(value, part)
            except AttributeError as error:
                hint = did_you_mean(part, dir(value))
                raise PluginLoadError(
                    f"{self}: {module_name} has no attribute {part!r}.{hint}", self._plugin
                ) from error
        return value

    def prepare(self) -> None:
        """What must happen before the target is imported."""
        ensure_torchvision_ops()

    @property
    def extra_name(self) -> str:
        """The extra of its distribution that brings what the target needs: its field `extra`, where it has one."""
        return getattr(self, "extra", "")

    @property
    def _plugin(self) -> str:
        return self.origin.plugin if self.origin else ""

    def _import_failure(self, error: ModuleNotFoundError, module_name: str) -> Exception:
        missing = error.name or ""
        if f"{module_name}.".startswith(f"{missing}."):
            return PluginLoadError(f"{self}: there is no module {missing!r}", self._plugin)
        distribution = self.origin.distribution if self.origin else "adapterkit"
        wanted = f"'{distribution}[{self.extra_name}]'" if self.extra_name else missing.partition(".")[0]
        return MissingDependencyError(f"{self} needs {missing!r}, which is not installed. Run: pip install {wanted}")

    def __str__(self) -> str:
        source = f" from {self.origin}" if self.origin else ""
        return f"{self.kind} {self.name!r} ({self.target}){source}"


@dataclass(frozen=True, slots=True)
class AdapterSpec(Spec):
    """An adapter type. `target` is its config class; `kinds` are the kinds of injection point where it can act."""

    kind: ClassVar[str] = "adapter"

    kinds: Set[str]
    summary: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.kinds, str):
            object.__setattr__(self, "kinds", frozenset(self.kinds))
        Spec.__post_init__(self)

    def problems(self) -> Iterator[str]:
        yield from Spec.problems(self)
        if isinstance(self.kinds, str) or not self.kinds or not self.kinds <= POINT_KINDS:
            given = self.kinds if isinstance(self.kinds, str) else sorted(map(str, self.kinds))
            yield f"kinds {given!r} must be a non-empty set of {', '.join(sorted(POINT_KINDS))}"


@dataclass(frozen=True, slots=True)
class BackendSpec(Spec):
    """A model family. `models` are its classes as `"package:Class"`; `extra` is what brings its library."""

    kind: ClassVar[str] = "backend"
    class_names: ClassVar[str] = "models"

    models: tuple[str, ...]
    extra: str = ""
    summary: str = ""


@dataclass(frozen=True, slots=True)
class LayerSpec(Spec):
    """How a class of layers keeps its weight. `classes` are theirs, or their tensors', as `"package:Class"`."""

    kind: ClassVar[str] = "layer"
    class_names: ClassVar[str] = "classes"

    classes: tuple[str, ...]
    extra: str = ""
    summary: str = ""


@dataclass(frozen=True, slots=True)
class FormatSpec(Spec):
    """A file layout for adapters. `apart` are types that it alone holds, beside the others of an adapter."""

    kind: ClassVar[str] = "format"

    summary: str = ""
    apart: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CodecSpec(Spec):
    """How an adapter type is said, module by module, in a dialect that several formats share: `lycoris`, `peft`."""

    kind: ClassVar[str] = "codec"

    dialect: str
    summary: str = ""

    def problems(self) -> Iterator[str]:
        yield from Spec.problems(self)
        if not _NAME.fullmatch(str(self.dialect)):
            yield f"dialect {self.dialect!r} does not match {_NAME.pattern}"


@dataclass(frozen=True, slots=True)
class NamingSpec(Spec):
    """What other tools call the modules of models of some classes. `models` are theirs as `"package:Class"`."""

    kind: ClassVar[str] = "naming"
    class_names: ClassVar[str] = "models"

    models: tuple[str, ...]
    summary: str = ""


@dataclass(frozen=True, slots=True)
class TaskSpec(Spec):
    """Something to train on: turns data into a loss."""

    kind: ClassVar[str] = "task"
    name_pattern: ClassVar[re.Pattern[str]] = _DASHED_NAME

    summary: str = ""


@dataclass(frozen=True, slots=True)
class RecipeSpec(Spec):
    """How pipelines are trained by the task `diffusion`. `pipelines` are their classes as `"package:Class"`."""

    kind: ClassVar[str] = "recipe"
    class_names: ClassVar[str] = "pipelines"

    pipelines: tuple[str, ...]
    summary: str = ""


@dataclass(frozen=True, slots=True)
class OptimizerSpec(Spec):
    """A rule that changes parameters. `target` is its `OptimizerConfig`; `extra` is what brings its library."""

    kind: ClassVar[str] = "optimizer"

    extra: str = ""
    summary: str = ""


@dataclass(frozen=True, slots=True)
class ScheduleSpec(Spec):
    """How the learning rate goes on after the warm-up. `target` is its `ScheduleConfig`."""

    kind: ClassVar[str] = "schedule"

    summary: str = ""


@dataclass(frozen=True, slots=True)
class CallbackSpec(Spec):
    """Something that is told what happens in a training. `target` is a `Callback`; `extra` brings its library."""

    kind: ClassVar[str] = "callback"

    extra: str = ""
    summary: str = ""


@dataclass(frozen=True, slots=True)
class CommandSpec(Spec):
    """A subcommand of `adapterkit`. `target` is a click command; `help` is its line in `adapterkit --help`."""

    kind: ClassVar[str] = "command"
    name_pattern: ClassVar[re.Pattern[str]] = _DASHED_NAME

    help: str = ""

    def prepare(self) -> None:
        """Nothing: a command imports what it needs when it runs, and its module stays light."""


def _class_problems(name: str, given: tuple[str, ...]) -> Iterator[str]:
    """What is wrong with classes as `"package:Class"`."""
    if isinstance(given, str):
        yield f"{name} must be a non-empty sequence of 'package:Class'; for one write ({given!r},)"
    elif not given:
        yield f"{name} must be a non-empty sequence of 'package:Class', not ()"
    for one in [given] if isinstance(given, str) else given:
        if not _CLASS.fullmatch(str(one)):
            package, _, cls = str(one).partition(":")
            top = f"{package.partition('.')[0]}:{cls}"
            hint = f"; write {top!r}, whatever module the class is in" if _CLASS.fullmatch(top) else ""
            yield f"{name} holds {one!r}, which is not of the form 'package:Class'{hint}"
