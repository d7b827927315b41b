"""Where a type can act on the tiny models."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

import adapterkit as ak
from adapterkit.errors import AdapterKitError, IncompatibleTargetError
from adapterkit.handle.building import checked_module
from adapterkit.mapping.fused import fused_points
from adapterkit.testing import families
from adapterkit.testing.models import EXAMPLES, Example


@dataclass(frozen=True)
class Placement:
    """Where a type acts on a tiny model.

    Attributes:
        where: In words.
        config: With its targets.
        moves: Seed -> what its parameters are moved by, in every dtype: found in the first check that asks for it.
    """

    where: str
    config: ak.AdapterConfig
    moves: dict[int, float] = dataclasses.field(default_factory=dict[int, float])


def placements(config: ak.AdapterConfig, example: Example) -> tuple[Placement, ...]:
    """Its own targets where they can be had, and every point that it accepts where those are more."""
    families.register()
    return _placements(_Same(config), example)


def placement_at(role: str, config: ak.AdapterConfig, example: Example) -> Placement | None:
    """The points of one role alone; None where it cannot act there."""
    families.register()
    try:
        wanted = dataclasses.replace(config, targets=role)
    except AdapterKitError:  # a type may say that its targets are fixed
        return None
    there = {point.role for point in chosen(wanted, points_of(example))} == {role}
    return Placement(role, wanted) if there else None


def reads_side_inputs(config: ak.AdapterConfig) -> bool:
    """Whether there is an example of side inputs that it reads on any of the tiny models."""
    placed = [(place.config, example) for example in EXAMPLES for place in placements(config, example)]
    with torch.device("meta"):  # draws no random numbers
        return any(wanted.example_context(chosen(wanted, points_of(example)), 1) for wanted, example in placed)


class _Same:
    """A config as a key: itself, for a type's own equality may be wrong, and its values may have no hash."""

    def __init__(self, config: ak.AdapterConfig) -> None:
        self.config = config

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.config is self.config

    def __hash__(self) -> int:
        return id(self.config)


@lru_cache(maxsize=32)
def _placements(same: _Same, example: Example) -> tuple[Placement, ...]:
    """Where a type can act on a tiny model: what each of its checks would find out again."""
    return tuple(_found_placements(same.config, points_of(example)))


@lru_cache(maxsize=len(EXAMPLES))
def points_of(example: Example) -> tuple[ak.InjectionPoint, ...]:
    """The points of a tiny model: each model that it makes has the same."""
    return tuple(ak.points(example.make()))


def _found_placements(config: ak.AdapterConfig, points: Sequence[ak.InjectionPoint]) -> Iterator[Placement]:
    own = chosen(config, points)
    if own and all(_can_act(config, point) for point in own):
        yield Placement(config.targets, config)
    accepted = [point for point in points if point.kind in config.kinds and config.accepts(point) is None]
    fused = {point.id for point in fused_points(points)}  # the layers of which the parts are there too
    accepted = [point for point in accepted if point.id not in fused and _can_act(config, point)]
    wide = " ".join(dict.fromkeys(point.role for point in accepted))
    if not wide or {point.id for point in own} == {point.id for point in accepted}:
        return
    try:
        wider = dataclasses.replace(config, targets=wide)
    except AdapterKitError:  # a type may say that its targets are fixed
        return
    if chosen(wider, points):
        yield Placement("every point", wider)


def _can_act(config: ak.AdapterConfig, point: ak.InjectionPoint) -> bool:
    """Whether the module has what the point asks for: positions, or an equivalent weight where the model reads it."""
    try:
        with torch.device("meta"):
            checked_module(config, point)
    except IncompatibleTargetError:
        return False
    return True


def chosen(config: ak.AdapterConfig, points: Sequence[ak.InjectionPoint]) -> list[ak.InjectionPoint]:
    """The points that a config selects; none where its selector matches nothing."""
    try:
        return config.choose(points, "the tiny model")
    except AdapterKitError:
        return []
