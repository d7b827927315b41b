"""Towers of any model, and models that a user's own module holds: found by what their classes and configs tell.

A module inside another one is a model of its own where a library, or a backend, says that it is a model, and where it
is not the very model that its class wraps, whose config it has. A model that no family knows must also be a tower: take
something that the one around takes beside others. An encoder and a decoder of text are one model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from adapterkit.backend import Backend
from adapterkit.mapping.kinds import modalities, tower_kind
from adapterkit.mapping.layers import base_children, layer_layout
from adapterkit.mapping.structure import base_modules
from adapterkit.plugins.manager import get_plugin_manager, instance_of
from adapterkit.plugins.matching import class_keys

_MODELS = frozenset({"transformers:PreTrainedModel", "diffusers:ModelMixin"})
_ANY = "torch:Module"

Found = tuple[str, nn.Module, str]
"""A path, the model there, and the word for it."""


def towers(model: nn.Module) -> Mapping[str, str]:
    """The models inside one that are mapped by themselves: see `Backend.parts`.

    They have the names that they have alone, and that of the attribute where that would be the name of several.
    """
    found = [*_inside(model, "", model, {id(model)})]
    names = [word for _, _, word in found]
    named: dict[str, str] = {}
    for path, _, word in found:
        own = word if names.count(word) == 1 else path.rpartition(".")[2]
        named["_".join(path.split(".")) if own in named or not own.isidentifier() else own] = path
    return named


def _inside(module: nn.Module, path: str, around: nn.Module, seen: set[int]) -> Iterator[Found]:
    """The first models on every way down.

    Args:
        module: Where to look.
        path: Its own.
        around: The nearest model of a library that it is, or is in, or the first of all modules.
        seen: Ids of modules that were met.
    """
    for name, child in base_children(module):
        if id(child) in seen:
            continue
        seen.add(id(child))
        inner = f"{path}.{name}" if path else name
        is_model = _is_model(child)
        word = _word(child, around) if is_model else None
        below = [*_inside(child, inner, child if is_model else around, seen)]
        if word is None or _only_holds(child, below):
            yield from below
        else:
            yield inner, child, word


def _only_holds(module: nn.Module, inside: list[Found]) -> bool:
    """Whether all layers of a module are in models inside it."""
    apart = {id(one) for _, model, _ in inside for one in base_modules([model])}
    return all(layer_layout(one) is None for one in base_modules([module]) if id(one) not in apart)


def _is_model(module: nn.Module) -> bool:
    keys = class_keys(type(module))
    # What timm has made by name; its models' own parts are no models, though some are of such a class.
    made = keys[0].startswith("timm:") and "pretrained_cfg" in module.__dict__
    return made or not _MODELS.isdisjoint(keys) or _is_known(module)


def _is_known(module: nn.Module) -> bool:
    """Whether a backend claims its class, and not every class."""
    keys = set(class_keys(type(module))) - {_ANY}
    return any(not keys.isdisjoint(spec.models) for spec in get_plugin_manager().backends().values())


def _word(module: nn.Module, around: Any) -> str | None:
    """What a model inside another is called; None where it is what that wraps, or a piece of it."""
    known, inner = _is_known(module), getattr(module, "config", None)
    if _is_model(around) and inner is not None and type(inner) is type(getattr(around, "config", None)):
        return None
    alone = instance_of(get_plugin_manager().backend_for(module), Backend).component_of(module)
    return alone if known or not modalities(around) or not modalities(module) else tower_kind(module, around)
