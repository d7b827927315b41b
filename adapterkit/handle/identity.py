"""Which adapters a handle is about.

The same model is the same root module. A handle on all models of a state, on some of them, or on more under the same
names, is about that state, which grows when an adapter is added. Any other handle, which shares a part alone, has
adapters of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from adapterkit.errors import AttachError
from adapterkit.handle.state import State, states_at
from adapterkit.mapping.component import Component
from adapterkit.mapping.model import MappedModel, map_model


def mapped_as_found(model: object, backend: str | None, roles: Mapping[str, str] | None) -> MappedModel:
    """`map_model`, with the models' names as the adapters that are there know them.

    Where neither backend nor roles are given, those with which these adapters were placed hold.

    Raises:
        TargetNotFoundError, IncompatibleTargetError, ConfigError: The roles do not fit the model.
    """
    mapped = map_model(model, backend, roles)
    if roles is not None:
        mapped.points()  # finds a glob that matches nothing
    state = state_of(mapped)
    if state is None:
        return mapped
    if backend is None and roles is None and state.mapped.has_roots_of(mapped):
        return state.mapped
    return known_as(mapped, state)


def known_as(mapped: MappedModel, state: State) -> MappedModel:
    """The same models, under the names that they have in a state."""
    names = {id(one.root): name for name, one in state.mapped.models.items()}
    components: dict[str, Component] = {}
    for name, one in mapped.models.items():
        there = names.get(id(one.root), name)
        own, theirs = mapped.of(name), state.mapped.of(there)
        if name == there and (own.keys() == theirs.keys() or not theirs):
            components |= own
        elif one.parts:  # the names of several models, or one name for all of them
            components |= theirs
        else:
            components[there] = dataclasses.replace(one, name=there)
    return mapped if components == mapped.components else MappedModel(components, mapped.label, mapped.roles)


def state_of(mapped: MappedModel) -> State | None:
    """The state that models already have, or None.

    Raises:
        AttachError: They have several, which cannot become one.
    """
    roots = [one.root for one in mapped.components.values()]
    for state in states_at(roots[0]):
        if state.mapped is mapped:
            return state
    found = list({id(state): state for root in roots for state in states_at(root)}.values())
    around = [state for state in found if _covers(state.mapped, mapped)]
    same = [state for state in around if _covers(mapped, state.mapped)]
    if same or len(around) == 1:
        return (same or around)[0]
    within = [state for state in found if _holds(mapped, state.mapped)]
    if not within:
        return None
    first, *others = within
    for other in others:
        _join(first, other)
    return first


def _covers(large: MappedModel, small: MappedModel) -> bool:
    """Whether all models of one are among those of another."""
    return {id(one.root) for one in small.components.values()} <= {id(one.root) for one in large.components.values()}


def _holds(large: MappedModel, small: MappedModel) -> bool:
    """Whether all models of one are among those of another, under the same names."""
    there = large.models
    return all(name in there and there[name].root is one.root for name, one in small.models.items())


def _join(first: State, second: State) -> None:
    """Makes one state of two, which lie in models of one pipeline."""
    if common := sorted(first.adapters.keys() & second.adapters.keys()):
        told = " and ".join(", ".join(one.mapped.components) for one in (first, second))
        raise AttachError(
            f"{told} have adapters that were added by themselves, and {common[0]!r} is in both; remove it "
            "from one of them to have a handle on all of them together"
        )
    one, two = sorted((first, second), key=id)  # everybody takes them in this order
    with one.lock, two.lock:
        first.absorb(second)
