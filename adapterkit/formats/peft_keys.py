"""Keys of PEFT's files: which module of the model each belongs to, and what of an adapter it is there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from adapterkit.formats.dialect import Dialect
from adapterkit.formats.modules import Module

PREFIXES = ("base_model.model.", "base_model.")
BASE_LAYER = "base_layer"


@dataclass(frozen=True)
class Foreign:
    """A module as a file calls it.

    Attributes:
        path: Its path, without the wrappers' prefix; "" for what belongs to no module.
        depth: How many wrappers of parameters lie around the one that is meant: 0 for the outermost.
        parameter: The parameter's own name, where the file says it.
    """

    path: str
    depth: int = 0
    parameter: str = ""


def is_wrapped(key: str) -> bool:
    """Whether a key is one of PEFT's, by its prefix."""
    return key.startswith(PREFIXES)


def bare(key: str) -> str:
    """A key without the wrappers' prefix."""
    return next((key.removeprefix(prefix) for prefix in PREFIXES if key.startswith(prefix)), key)


def grouped(
    keys: Iterable[str], dialect: Dialect, parameters: Mapping[str, Module]
) -> tuple[dict[Foreign, dict[str, str]], dict[str, str], list[str]]:
    """Keys by module.

    Args:
        keys: Of the file.
        dialect: Who knows which names.
        parameters: Path of a parameter of the model -> its module, for those that are not called weight or bias.

    Returns:
        Module -> name -> key; those that belong to no module, name -> key; those whose names nobody knows.
    """
    found: dict[Foreign, dict[str, str]] = {}
    whole: dict[str, str] = {}
    unknown: list[str] = []
    for key in keys:
        own = bare(key)
        split = dialect.split(own)
        inner = _without_wrappers(own)[0]
        if split is None and inner in parameters:
            module = parameters[inner]
            name = "weight" if inner == f"{module.path}.{module.parameter}" else "bias"
            found.setdefault(Foreign(module.path, parameter=module.parameter), {})[name] = key
        elif "." not in own:
            whole[own] = key
            if split is not None:
                found.setdefault(Foreign(""), {})[own] = key
        elif split is None:
            unknown.append(key)
        else:
            path, depth = _without_wrappers(split[0])
            depth = 0 if split[1] in ("weight", "bias") else depth
            found.setdefault(Foreign(path, depth), {})[split[1]] = key
    return found, whole, unknown


def _without_wrappers(path: str) -> tuple[str, int]:
    """A path without wrappers in it, and how many were at its end."""
    words = path.split(".")
    if BASE_LAYER not in words:
        return path, 0
    depth = next((i for i, word in enumerate(reversed(words)) if word != BASE_LAYER), len(words))
    return ".".join(word for word in words if word != BASE_LAYER), depth
