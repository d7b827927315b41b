"""The values that adapters start from, for those that were attached to a model without any, on the meta device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from adapterkit.engine.slots import has_meta
from adapterkit.errors import StateError
from adapterkit.handle.building import Built, build_new
from adapterkit.handle.refilling import like
from adapterkit.handle.state import Attached, State
from adapterkit.mapping.model import MappedModel


def without_values(attached: Attached) -> bool:
    """Whether a module of this adapter waits for its values."""
    return any(module.empty or has_meta(module) for module in attached.modules.values())


def require_values(names: Iterable[str], state: State, what: str) -> None:
    """Raises StateError where one of these adapters waits for its values, and the model has its own."""
    skeleton = any(next(root.parameters()).is_meta for root in state.roots)
    for name in names:
        modules = state.adapters[name].modules.values()
        if any(module.empty for module in modules) or (not skeleton and any(map(has_meta, modules))):
            raise StateError(f"cannot {what} {name!r}: it has no values; initialise({name!r}) gives it those of add()")


def initialise(name: str, attached: Attached, mapped: MappedModel) -> None:
    """Gives an adapter the values that `add` gives it on a model that has some: the same bits.

    Raises:
        StateError: It was not added, but read from a file; or the model has no values.
    """
    fresh = [_built_again(name, part, mapped) for part in attached.parts]
    for part, new in zip(attached.parts, fresh, strict=True):
        for key, module in part.modules.items():
            _take_over(module, new.modules[key])
            module.empty = False


def _built_again(name: str, part: Built, mapped: MappedModel) -> Built:
    if part.seed is None:
        raise StateError(f"{name!r} was read from a file; load_into({name!r}, path) gives it its values")
    made = build_new(part.config, mapped, part.seed, part.dtype)
    if any(map(has_meta, made.modules.values())):
        raise StateError(f"cannot initialise {name!r}: the model is on the meta device; give the base its values first")
    if made.modules.keys() != part.modules.keys():
        raise StateError(f"cannot initialise {name!r}: its config chooses other points of the model now; add it again")
    return made


@torch.no_grad()
def _take_over(module: nn.Module, new: nn.Module) -> None:
    """The values of a module that is like this one, in the parameters and buffers that are there."""
    theirs = dict(new.named_modules())
    for path, one in module.named_modules():
        for own in (one._parameters, one._buffers):
            for name, tensor in [(name, tensor) for name, tensor in own.items() if tensor is not None]:
                value: Any = getattr(theirs[path], name)
                if not tensor.is_meta:
                    tensor.copy_(like(value, tensor))
                else:
                    own[name] = value.requires_grad_(tensor.requires_grad)
