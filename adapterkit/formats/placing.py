"""Where the modules of a file act: on which model of a pipeline, and on which of its points."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence

import torch

from adapterkit.contract.codec import Context, Place
from adapterkit.errors import ConfigError, did_you_mean, shown
from adapterkit.formats.container import Entry
from adapterkit.formats.dialect import Dialect
from adapterkit.formats.foreign_names import ForeignNames
from adapterkit.formats.module_keys import Found
from adapterkit.formats.modules import Modules, made_up
from adapterkit.formats.pipeline_parts import candidates
from adapterkit.formats.prefixes import ANY, DENOISER
from adapterkit.points import Points

_SAMPLE = 4
"""Modules whose shapes are compared, to tell which of several models is meant."""


class Placing:
    """Where the modules of a file act.

    Args:
        points: The model's; none where no model is at hand.
        dialect, context: How the file is read.
        entries: What the file has.
        component: See `ModuleFileOptions`.

    Raises:
        ConfigError: There is no such component.
    """

    def __init__(
        self, points: Points, dialect: Dialect, context: Context, entries: Mapping[str, Entry], component: str = ""
    ) -> None:
        self._modules, self._component = Modules(points), component
        self._components = {} if points.model is None else points.model.components
        if component and self._components and component not in self._components:
            near = did_you_mean(component, self._components) or f" There are {', '.join(self._components)}."
            raise ConfigError([f"component {shown(component)} is none of the model's.{near}"], "load()")
        self._names = {name: ForeignNames(one) for name, one in self._components.items()}
        self._dialect, self._context, self._entries = dialect, context, entries
        self._known: dict[tuple[str, str, str], list[Place] | None] = {}

    def all(self, found: Sequence[Found]) -> Iterator[tuple[Found, Sequence[Place] | None]]:
        """Every module with its places, in the order of the file."""
        if not self._components:
            return ((one, self._made_up(one)) for one in found)
        parts: dict[str, list[Found]] = {}
        for one in found:
            parts.setdefault(one.prefix.part, []).append(one)
        chosen = self._chosen(parts)
        return ((one, self._places(chosen.get(one.prefix.part, ()), one)) for one in found)

    def _made_up(self, one: Found) -> list[Place] | None:
        shape = self._shape(one)
        return None if shape is None else [made_up(one.prefix.text[:-1] or DENOISER, one.name, shape)]

    def _shape(self, one: Found) -> tuple[int, ...] | None:
        entries = {name: self._entries[key] for name, key in one.keys.items()}
        tensors = {name: torch.empty(e.shape, dtype=e.dtype, device="meta") for name, e in entries.items()}
        return self._dialect.shape(tensors, self._context)

    def _places(self, components: Sequence[str], one: Found) -> list[Place] | None:
        for name in components:
            key = name, one.prefix.text, one.name
            if key not in self._known:
                self._known[key] = self._placed(name, one)
            if (places := self._known[key]) is not None:
                return places
        return None

    def _placed(self, component: str, one: Found) -> list[Place] | None:
        pieces = self._names[component].find(one.name, flat=one.prefix.flat, original=one.prefix.original)
        return None if pieces is None else self._modules.placed(component, pieces)

    def _chosen(self, parts: Mapping[str, Sequence[Found]]) -> dict[str, list[str]]:
        """Part -> the component that it is. A text encoder is one part at most: that which fits it best."""
        scored = [
            (*self._fit(component, own), -rank, part, component)
            for part, own in parts.items()
            for rank, component in enumerate(self._candidates(part))
        ]
        chosen: dict[str, list[str]] = {}
        for _, hits, _, part, component in sorted(scored, reverse=True):
            taken = part in chosen or any([component] == other for other in chosen.values())
            if part == ANY:
                chosen.setdefault(part, []).append(component)
            elif hits and not taken:
                chosen[part] = [component]
        return chosen

    def _candidates(self, part: str) -> Sequence[str]:
        named = self._component and part in (DENOISER, ANY)
        return [self._component] if named else candidates(part, self._components)

    def _fit(self, component: str, found: Sequence[Found]) -> tuple[float, int]:
        """Which part of the modules that it has are of its shapes, and how many it has."""
        placed = [(one, places) for one in found if (places := self._places([component], one)) is not None]
        sample = placed[:_SAMPLE]
        told = [(shape, places[0].shape) for one, places in sample if (shape := self._shape(one)) is not None]
        fits = sum(_same(shape, here) for shape, here in told)
        return (fits / len(told) if told else 0.5), len(placed)


def _same(told: Sequence[int], here: Sequence[int]) -> bool:
    """Whether shapes agree; a 1 x 1 convolution may be a matrix."""
    return functools.reduce(int.__mul__, told, 1) == functools.reduce(int.__mul__, here, 1) and told[0] == here[0]
