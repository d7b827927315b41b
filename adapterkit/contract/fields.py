"""What the fields of a config may hold: JSON values, of the annotated types."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Set
from typing import TYPE_CHECKING, Any, TypeGuard

from adapterkit.errors import ConfigError, shown
from adapterkit.specs import POINT_KINDS

if TYPE_CHECKING:
    from adapterkit.contract.config import AdapterConfig


def checked_values(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for a dataclass from JSON values.

    Raises:
        ConfigError: Unknown or missing keys.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ConfigError([f"unknown key {key!r}; known: {', '.join(fields)}" for key in unknown], cls.__name__)
    required = [n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING]
    missing = [f"missing key {key!r}" for key in required if key not in values]
    if missing:
        raise ConfigError(missing, cls.__name__)
    return {name: _thaw(fields[name].type, value) for name, value in values.items()}


def checked_overrides(cls: type[AdapterConfig], values: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for `dataclasses.replace` from JSON values.

    Raises:
        ConfigError: Unknown keys, or fields that no point can have for itself.
    """
    fields = {f.name: f for f in dataclasses.fields(cls) if f.name not in {"targets", "settings", *cls.common}}
    if unknown := sorted(set(values) - set(fields)):
        raise ConfigError([f"no point has {key!r} for itself; known: {', '.join(fields)}" for key in unknown])
    return {name: _thaw(fields[name].type, value) for name, value in values.items()}


def _thaw(annotation: object, value: Any) -> Any:
    """JSON has no tuples; give back those that the annotation asks for."""
    return tuple(value) if isinstance(value, list) and str(annotation).startswith("tuple") else value


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether this is a finite number, which a float can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def kind_problems(kinds: Any) -> list[str]:
    """What is wrong with the kinds that a class says: a class attribute, so the same for all of its configs."""
    example = ', such as kinds: ClassVar[frozenset[Kind]] = frozenset({"weight"})'
    if isinstance(kinds, Set) and kinds and kinds <= POINT_KINDS:
        return []
    given = f"not {shown(sorted(map(str, kinds)) if isinstance(kinds, Set) else kinds)}" if kinds else "and has none"
    known = ", ".join(sorted(POINT_KINDS))
    return [f"the class must say at which kinds of points it acts (of {known}), {given}: set `kinds`{example}"]


def _every(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda values: isinstance(values, tuple) and all(map(check, values))


_SCALARS: dict[str, Callable[[Any], bool]] = {
    "int": lambda v: isinstance(v, int) and not isinstance(v, bool) and -(1 << 63) <= v < 1 << 63,
    "float": is_number,
    "bool": lambda v: isinstance(v, bool),
    "str": lambda v: isinstance(v, str),
    "None": lambda v: v is None,
}
_KINDS: dict[str, Callable[[Any], bool]] = {
    **_SCALARS,
    **{f"tuple[{name}, ...]": _every(check) for name, check in _SCALARS.items()},
}


def type_problems(config: Any) -> list[str]:
    """Fields whose value does not fit an annotation of plain values; others are the type's own business."""
    problems = []
    for item in dataclasses.fields(config):
        annotation = item.type.__name__ if isinstance(item.type, type) else str(item.type)
        options = [part.strip() for part in annotation.split("|")]
        if not all(option in _KINDS for option in options):
            continue
        value = getattr(config, item.name)
        if not any(_KINDS[option](value) for option in options):
            problems.append(f"{item.name} must be {' or '.join(options)}, not {shown(value)}")
    return problems
