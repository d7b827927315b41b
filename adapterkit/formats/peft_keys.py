"""Keys of PEFT's files: which adapter and which module each belongs to, and what of an adapter it is there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from adapterkit.formats.dialect import Dialect

_MODEL, _WRAPPER = "base_model.model.", "base_model."
PREFIXES = (_MODEL, _WRAPPER)
BASE_LAYER = "base_layer"
_COPY, _ORIGINAL = "modules_to_save", "original_module"
_ROWS = "trainable_tokens_delta"
_LAYER = ("weight", "bias")


@dataclass(frozen=True)
class Foreign:
    """A module as a file calls it.

    Attributes:
        path: Its path, without the wrappers'; "" for what belongs to no module.
        depth: How many wrappers of parameters lie around the one that is meant: 0 for the outermost.
        parameter: The parameter's own name, where the file says it.
        part: "rows" for single rows of an embedding, which act where the model reads them, and not in the module alone;
            "inner" for what lies inside of a module that is wrapped itself.
    """

    path: str
    depth: int = 0
    parameter: str = ""
    part: str = ""


@dataclass
class Grouped:
    """The keys of one adapter.

    Attributes:
        modules: Module -> name -> key.
        whole: Those that belong to no module, name -> key.
        unknown: Those whose names nobody knows.
        base: Those of the base's own weights, which stand beside the adapters in a model's state dict.
    """

    modules: dict[Foreign, dict[str, str]] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    base: list[str] = field(default_factory=list)


def is_wrapped(key: str) -> bool:
    """Whether a key is one of PEFT's, by its prefix."""
    return key.startswith(PREFIXES)


def by_adapter(keys: Iterable[str], dialect: Dialect) -> tuple[dict[str, dict[str, str]], list[str]]:
    """The adapters whose keys these are.

    The state dict of a model in memory has an adapter's name behind those of its tensors, and the base's own weights.

    Args:
        keys: Of the file.
        dialect: Who knows which names.

    Returns:
        Name ("" where there are none) -> key without prefix and name -> key; and, beside names, the other keys.
    """
    plain: dict[str, str] = {}
    named: dict[str, dict[str, str]] = {}
    for key in keys:
        own = next((key.removeprefix(prefix) for prefix in PREFIXES if key.startswith(prefix)), key)
        name, own = _adapter_in(own, dialect)
        (named.setdefault(name, {}) if name else plain)[own] = key
    if not named or (_are_copies(named) and any(_is_learnt(own, dialect) for own in plain)):
        return {"": {own: key for part in (plain, *named.values()) for own, key in part.items()}}, []
    return named, list(plain.values())


def _are_copies(named: Mapping[str, Mapping[str, str]]) -> bool:
    """Whether one name stands in copies of modules alone: with bias="all" PEFT writes their biases so into files."""
    return len(named) == 1 and all(_COPY in own.split(".") for keys in named.values() for own in keys)


def _is_learnt(key: str, dialect: Dialect) -> bool:
    """Whether a key is of an adapter's tensor, and not of a weight or bias of the base."""
    split = dialect.split(key)
    return split is not None and split[1].removeprefix(f"{BASE_LAYER}.") not in _LAYER


def _adapter_in(key: str, dialect: Dialect) -> tuple[str, str]:
    """An adapter's name in a key, and the key without it."""
    words = key.split(".")
    if _COPY in words[:-2]:
        at = words.index(_COPY) + 1
        return words[at], ".".join((*words[:at], *words[at + 1 :]))
    split = dialect.split(key)
    if split is not None and split[1] not in _LAYER:
        return "", key
    for at in (-2, -1):
        rest = words[:at] + words[len(words) + at + 1 :]
        found = dialect.split(".".join(rest)) if len(rest) > 1 else None
        if found is not None and found[1] not in _LAYER:
            return words[at], ".".join(rest)
    return "", key


def grouped(
    keys: Mapping[str, str], dialect: Dialect, parameter: Callable[[str], tuple[str, str, str] | None]
) -> Grouped:
    """Keys by module.

    Args:
        keys: Key without prefix -> key, of one adapter.
        dialect: Who knows which names.
        parameter: Tells parameters that have names of their own.
    """
    found = Grouped()
    for own, key in keys.items():
        words = own.split(".")
        if _ORIGINAL in words:
            found.base.append(key)
            continue
        copied = ".".join(word for word in words if word != _COPY)
        split = dialect.split(copied)
        if (known := parameter(_without_wrappers(copied)[0])) is not None and (split is None or split[1] in _LAYER):
            path, weight, name = known
            found.modules.setdefault(Foreign(path, parameter=weight), {})[name] = key
        elif "." not in own or _is_files(key, split):
            found.whole[own] = key
            if split is not None:
                found.modules.setdefault(Foreign(""), {})[own] = key
        elif split is None:
            found.unknown.append(key)
        else:
            _put(found, *split, key, copied=copied != own)
    return found


def _is_files(key: str, split: tuple[str, str] | None) -> bool:
    """Whether a key is the wrapper's own; beside prompts a layer begins so too."""
    outside = key.startswith(_WRAPPER) and not key.startswith(_MODEL)
    return outside and (split is None or split[1] not in _LAYER)


def _put(found: Grouped, module: str, name: str, key: str, *, copied: bool) -> None:
    path, depth, inner = _without_wrappers(module)
    part = "rows" if name.endswith(_ROWS) else "inner" if inner else ""
    if name in _LAYER:
        name, depth, part = f"{BASE_LAYER}.{name}" if depth else name, 0, ""
    names = found.modules.setdefault(Foreign(path, depth, part=part), {})
    if name in names:  # with bias="all" PEFT writes the bias of a saved module twice
        found.base.append(key if copied else names[name])
    if name not in names or not copied:
        names[name] = key


def _without_wrappers(path: str) -> tuple[str, int, bool]:
    """A path without wrappers in it, how many were at its end, and whether others were before."""
    words = path.split(".")
    if BASE_LAYER not in words:
        return path, 0, False
    depth = next((i for i, word in enumerate(reversed(words)) if word != BASE_LAYER), len(words))
    inner = BASE_LAYER in words[: len(words) - depth]
    return ".".join(word for word in words if word != BASE_LAYER), depth, inner
