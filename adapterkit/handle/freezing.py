"""How the parameters of a base were found, kept at their modules: several handles may freeze what they share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import nn

from adapterkit.mapping.structure import base_modules

_FOUND = "_adapterkit_found"


@dataclass
class _Found:
    """Of one module: name of a parameter -> whether it required grad, and who has frozen it."""

    flags: dict[str, bool] = field(default_factory=dict[str, bool])
    holders: int = 0


def freeze(roots: Iterable[nn.Module], *, again: bool) -> None:
    """Lets no parameter of the base require grad.

    Args:
        roots: The models; of what is in them nothing that is an adapter's.
        again: Whether the same caller has frozen them before.
    """
    seen: set[int] = set()
    for module in base_modules(roots):
        fresh = _FOUND not in module.__dict__
        found: _Found = module.__dict__.setdefault(_FOUND, _Found())
        found.holders += fresh or not again
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                found.flags.setdefault(name, parameter.requires_grad)
                parameter.requires_grad_(False)


def thaw(roots: Iterable[nn.Module]) -> None:
    """The last of those who have frozen these models gives back what was found."""
    for module in base_modules(roots):
        found: _Found | None = module.__dict__.get(_FOUND)
        if found is None:
            continue
        found.holders -= 1
        if found.holders > 0:
            continue
        del module.__dict__[_FOUND]
        for name, flag in found.flags.items():
            if (parameter := module._parameters.get(name)) is not None:
                parameter.requires_grad_(flag)


def hand_over(old: nn.Module, new: nn.Module) -> None:
    """One module has taken another's place."""
    if _FOUND in old.__dict__:
        new.__dict__[_FOUND] = old.__dict__.pop(_FOUND)


def base_parameters(roots: Iterable[nn.Module]) -> Iterator[nn.Parameter]:
    """The parameters of everything that is no adapter's, a shared one once."""
    seen: set[int] = set()
    for module in base_modules(roots):
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield parameter
