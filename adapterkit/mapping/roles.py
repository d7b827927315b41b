"""Roles that a user gives to the layers of a model: `{"attn.q": "encoder.*.query", "attn.o": "encoder.*.out|*.proj"}`.

A role's value is a glob of module paths, as in selectors: `*` also spans dots, alternatives are separated by `|`, and
in a pipeline a path may begin with its component.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import nn

from adapterkit.errors import ConfigError, IncompatibleTargetError, TargetNotFoundError, near_matches, shown
from adapterkit.mapping.layers import base_children, layer_layout
from adapterkit.points import InjectionPoint, WeightPoint

_ROLE = re.compile(r"[a-z][a-z0-9_]*(\.[a-z0-9_]+)*")

Place = tuple[str, str]
"""Model and path."""


@dataclass(frozen=True)
class RoleMap:
    """Roles by path.

    Attributes:
        roles: Role -> glob of module paths.

    Raises:
        ConfigError: Something in it is no role or no glob.
    """

    roles: Mapping[str, str]

    def __post_init__(self) -> None:
        given: object = self.roles
        if not isinstance(given, Mapping):
            told = f"expected a mapping such as {{'attn.q': 'layers.*.query'}}, not {shown(given)}"
            raise ConfigError([told], "roles")
        if problems := [problem for item in given.items() if (problem := _problem(*item))]:
            raise ConfigError(problems, "roles")
        object.__setattr__(self, "roles", dict(self.roles))  # the user's own may change

    def apply(
        self, points: Iterable[InjectionPoint], roots: Mapping[str, nn.Module], starts: Mapping[str, str] | None = None
    ) -> list[InjectionPoint]:
        """The points of a model with these roles. What is given a role has its path for a site.

        Args:
            points: What the backends found.
            roots: The models by name.
            starts: Component -> its path, of those that are parts of a model: their sites begin below it.

        Raises:
            TargetNotFoundError: A glob matches no module.
            IncompatibleTargetError: It matches none with a weight that an adapter can act in.
            ConfigError: Two roles claim one module, or a role claims a projection that holds several points.
        """
        order = _places(roots)
        rank = {id(module): number for number, module in reversed([*enumerate(order.values())])}
        found = [(point, id(roots[point.model].get_submodule(point.path))) for point in points]
        weights: dict[int, list[InjectionPoint]] = {}
        for point, module in found:
            if isinstance(point, WeightPoint):
                weights.setdefault(module, []).append(point)
        claims = self._claims(order)
        named = [
            (_named(role, place, order[place], weights.get(module, []), starts or {}), module)
            for module, (place, role) in claims.items()
        ]
        kept = [
            (point, module) for point, module in found if not isinstance(point, WeightPoint) or module not in claims
        ]
        return [point for point, module in sorted([*kept, *named], key=lambda item: rank[item[1]])]

    def _claims(self, order: Mapping[Place, nn.Module]) -> dict[int, tuple[Place, str]]:
        """Where each named module is, and its role, by the module's identity: it may be at several places."""
        claims: dict[int, tuple[Place, str]] = {}
        for role, glob in self.roles.items():
            for place in _matching(role, glob, order):
                _, other = claims.setdefault(id(order[place]), (place, role))
                if other != role:
                    raise ConfigError([f"{place[1]!r} is claimed by {other!r} and by {role!r}"], "roles")
        return claims


def _problem(role: object, glob: object) -> str | None:
    if not isinstance(role, str) or not _ROLE.fullmatch(role):
        return f"{shown(role)} is no role; write words of a-z, 0-9 and _ joined by dots, such as attn.q"
    if not isinstance(glob, str) or not all(part.strip() for part in glob.split("|")):
        return f"{role!r} needs a glob of module paths such as 'layers.*.query', not {shown(glob)}"
    return None


def _places(roots: Mapping[str, nn.Module]) -> dict[Place, nn.Module]:
    """Every module by its place, in model order."""
    return {(name, path): module for name, root in roots.items() for path, module in _walk(root, "")}


def _walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    yield path, module
    for name, child in base_children(module):
        yield from _walk(child, f"{path}.{name}" if path else name)


def _matching(role: str, glob: str, order: Mapping[Place, nn.Module]) -> list[Place]:
    found: list[Place] = []
    for pattern in glob.split("|"):
        here = [(c, path) for c, path in order if fnmatchcase(path, pattern) or fnmatchcase(f"{c}.{path}", pattern)]
        if not here:
            close = near_matches(pattern, [path for _, path in order if path])
            near = f" Closest: {', '.join(close)}." if close else ""
            raise TargetNotFoundError(f"roles: {pattern!r}, which should be {role!r}, matches no module.{near}")
        usable = [place for place in here if layer_layout(order[place]) is not None]
        if not usable:
            kinds = ", ".join(sorted({type(order[place]).__name__ for place in here}))
            raise IncompatibleTargetError(
                f"roles: {pattern!r}, which should be {role!r}, matches only modules without a weight that adapters "
                f"can act in ({kinds}); a role is given to Linear, Conv, Embedding and Conv1D modules"
            )
        found += usable
    return found


def _named(
    role: str, place: Place, module: nn.Module, there: list[InjectionPoint], starts: Mapping[str, str]
) -> InjectionPoint:
    component, path = place
    if len(there) > 1:
        held = ", ".join(point.role for point in there)
        raise ConfigError([f"{path!r} cannot be {role!r}: it is fused and holds {held}; select those instead"], "roles")
    if there:
        return replace(there[0], role=role, site=path.removeprefix(f"{starts.get(there[0].component, '')}."))
    found = layer_layout(module)
    if found is None:
        raise TypeError(f"{path} was checked to have a weight")
    layout, inputs, outputs = found
    return WeightPoint(role, path, path, inputs, outputs, layout, tags={"component": component})
