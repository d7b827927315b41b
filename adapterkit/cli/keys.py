"""What a section of a run file takes: keys with their types, defaults and meanings, read off the class that checks."""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from adapterkit.cli.tables import Row

if TYPE_CHECKING:
    from docstring_parser import Docstring

COLUMNS = ("key", "type", "default", "meaning")
_REQUIRED = "(required)"


def keys_of(section: type, prefix: str = "") -> list[Row]:
    """The keys of a pydantic model, or of a dataclass; those of nested models follow their own.

    Args:
        section: The class that checks the values.
        prefix: What goes before a key, such as `options.`.
    """
    meanings = _meanings(section)
    rows: list[Row] = []
    for name, annotation, limits, default in _fields(section):
        rows.append(
            {
                "key": prefix + name,
                "type": ", ".join([_type(annotation), *limits]),
                "default": default,
                "meaning": meanings.get(name, ""),
            }
        )
        many = "[]" if _is_list(annotation) else ""
        rows += [row for inner in _sections(annotation) for row in keys_of(inner, f"{prefix}{name}{many}.")]
    return rows


def _fields(section: type) -> Iterator[tuple[str, Any, list[str], str]]:
    """Name, annotation, limits and default of every key."""
    if dataclasses.is_dataclass(section):
        for field in dataclasses.fields(section):
            if field.init:
                yield field.name, field.type, [], _default(field)
        return
    model: Any = section
    for name, field in model.model_fields.items():
        default = _REQUIRED if field.is_required() else _shown(field.get_default(call_default_factory=True))
        yield name, field.annotation, [text for text in map(_limit, field.metadata) if text], default


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return _shown(field.default)
    return _REQUIRED if field.default_factory is dataclasses.MISSING else _shown(field.default_factory())


def _shown(value: Any) -> str:
    """As a run file says it."""
    words = {None: "null", True: "true", False: "false", "": '""'}
    if isinstance(value, (str, bool, type(None))):
        return words.get(value, str(value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _limit(bound: object) -> str:
    """A bound that pydantic keeps beside a type, as a comparison."""
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    return next((f"{sign} {_shown(getattr(bound, key))}" for key, sign in signs.items() if hasattr(bound, key)), "")


def _type(annotation: Any) -> str:
    if isinstance(annotation, str):  # a dataclass's, as its source has it
        return annotation
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(inner[0])
    if origin is Literal:
        return " | ".join(map(str, inner))
    if origin in (Union, types.UnionType):
        return " | ".join(map(_type, inner))
    if annotation is type(None):
        return "null"
    name = getattr(origin or annotation, "__name__", str(annotation))
    return f"{name}[{', '.join(map(_type, inner))}]" if inner else name


def _is_list(annotation: Any) -> bool:
    return any(get_origin(one) in (list, tuple) for one in (annotation, *get_args(annotation)))


def _sections(annotation: Any) -> Iterable[type]:
    """The pydantic models in an annotation."""
    from pydantic import BaseModel

    if inspect.isclass(annotation) and get_origin(annotation) is None:
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [found for inner in get_args(annotation) for found in _sections(inner)]


def description_of(section: type) -> str:
    """What the docstring of a class says before its attributes."""
    text = _parsed(section)
    return "\n\n".join(part for part in (text.short_description, text.long_description) if part)


def _meanings(section: type) -> dict[str, str]:
    """What the `Attributes:` of a class and of those that it comes from say, in one line each."""
    found: dict[str, str] = {}
    for cls in reversed(section.__mro__[:-1]):
        for item in _parsed(cls).params:
            for name in item.arg_name.split(", "):
                found[name] = " ".join((item.description or "").split())
    return found


def _parsed(cls: type) -> Docstring:
    from docstring_parser import DocstringStyle, parse

    return parse(inspect.cleandoc(cls.__doc__ or ""), style=DocstringStyle.GOOGLE)
