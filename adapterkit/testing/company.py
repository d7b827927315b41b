"""Checks of what an adapter computes beside others: routes, sums, averages, the order of adding."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import adapterkit as ak
from adapterkit.adapter import AdapterModule, AdditiveModule
from adapterkit.errors import AdapterKitError, ConfigError, RoutingError
from adapterkit.testing.case import Case
from adapterkit.testing.subject import (
    NAME,
    TIGHT,
    Subject,
    assert_close,
    assert_same,
    flat_gradients,
    move,
    randomise,
    skip,
)

_OTHER = "other"
_UNROUTED = "the type cannot be routed anywhere, and says so by a RoutingError at activation"


class CompanyChecks(Case):
    """Routes, sums, averages, the order of adding."""

    def test_routed_equals_one_by_one(self) -> None:
        """Each row of a routed batch is the output with its adapter alone, within 1e-10; None is the base."""
        routed = False
        for subject in self.subjects():
            routed = _check_rows(subject, [NAME, None, NAME]) or routed
        if not routed:
            skip(_UNROUTED)

    def test_two_are_routed_together(self) -> None:
        """Rows with two adapters of the type, of different settings, are those outputs alone, within 1e-10."""
        routed = False
        for subject in self.subjects():
            _add_another(subject)
            routed = _check_rows(subject, [NAME, _OTHER, None, _OTHER]) or routed
        if not routed:
            skip(_UNROUTED)

    def test_routed_gradients_are_those_one_by_one(self) -> None:
        """A routed batch's gradient is the sum of its rows' own, within 1e-10: a row of the base adds nothing."""
        routed = False
        for subject in self.subjects():
            routes = [NAME, None, NAME]
            if not _can_route(subject, routes):
                continue
            routed = True
            parameters = subject.trained
            with subject.adapters.routed(routes):
                found = flat_gradients(subject().square().sum(), parameters)
            expected = torch.zeros_like(found)
            for index in (0, 2):
                expected += flat_gradients(subject.row(index, NAME).square().sum(), parameters)
            assert_close(found, expected, TIGHT, f"{subject.label}: the gradients of a routed batch")
        if not routed:
            skip(_UNROUTED)

    def test_additive_is_a_sum(self) -> None:
        """An `AdditiveModule` keeps `forward(x, base) = base(x) + delta(x)`: halves of it add up, and it cancels."""
        summed = 0
        for subject in self.subjects():
            modules = subject.adapters.modules(NAME)
            if not all(isinstance(module, AdditiveModule) for module in modules.values()):
                continue
            summed += 1
            _check_forwards(subject, modules)
            _copy(subject.adapters, "copy", subject.config)
            together = subject.run({NAME: 0.5, "copy": 0.5})
            assert_close(together, subject.run(), TIGHT, f"{subject.label}: half of it and half of a copy")
            cancelled = subject.run({NAME: 1.0, "copy": -1.0})
            assert_close(cancelled, subject.run(None), TIGHT, f"{subject.label}: it less a copy of it")
        if not summed:
            skip("the type does not say that it is additive")

    def test_an_average_with_itself_is_itself(self) -> None:
        """`Average(a, a) = a` within 1e-10, and `Stack(a)` is a bit for bit."""
        for subject in self.subjects():
            if not all(module.scalable for module in subject.adapters.modules(NAME).values()):
                continue
            alone = subject.run()
            assert_close(subject.run(ak.Average(NAME, NAME)), alone, TIGHT, f"{subject.label}: Average(a, a)")
            assert_same(subject.run(ak.Stack(NAME)), alone, f"{subject.label}: Stack(a)")

    def test_the_order_of_adding_does_not_matter(self) -> None:
        """Added before or after another of the type, an adapter has the same bits and gives the same output."""
        for subject in self.subjects():
            _add_another(subject)
            subject.adapters.freeze()  # torch rounds another way where a weight requires grad
            values, alone, both = _values(subject), subject.bits(), _both(subject)
            for name in (NAME, _OTHER):
                subject.adapters.remove(name)
            _add_another(subject)
            subject.adapters.add(NAME, subject.config)
            randomise(subject.adapters, NAME, scale=subject.move)
            subject.adapters.freeze()
            for key, tensor in _values(subject).items():
                assert_same(tensor, values[key], f"{subject.label}: {key}, added after another")
            assert_same(subject.bits(), alone, f"{subject.label}: the output, added after another")
            if both is not None:
                again = _both(subject)
                assert again is not None, f"{subject.label}: both act together in one order of adding alone"
                assert_close(again, both, TIGHT, f"{subject.label}: the output of both, added in another order")


def _can_route(subject: Subject, routes: Sequence[str | None]) -> bool:
    """Whether these routes are allowed: what is not is said when they are chosen, not in a forward."""
    try:
        with subject.adapters.routed(routes):
            return True
    except RoutingError:
        return False


def _check_forwards(subject: Subject, modules: Mapping[str, AdapterModule]) -> None:
    """Raises AssertionError where a type's own forward is not the sum of the base's output and its delta."""

    def check(module: Any, args: tuple[Any, ...], output: Tensor) -> None:
        x, base = args
        expected = base(x) + module.delta(x)
        assert_close(output, expected, TIGHT, f"{subject.label}: {module.at}: its forward and base(x) + delta(x)")

    subject.model.eval()
    own = [one for one in modules.values() if one.abilities.forward and one.abilities.delta]
    handles = [module.register_forward_hook(check) for module in own]
    try:
        subject.run()
    finally:
        for handle in handles:
            handle.remove()


def _check_rows(subject: Subject, routes: Sequence[str | None]) -> bool:
    """Compares each row of a routed batch with the row alone; False where it cannot be routed."""
    if not _can_route(subject, routes):
        return False
    with subject.adapters.routed(routes):
        together = subject(len(routes))
    for index, route in enumerate(routes):
        alone = subject.row(index, route, len(routes))
        assert_close(together[index : index + 1], alone, TIGHT, f"{subject.label}: row {index}, {route}")
    return True


def _add_another(subject: Subject) -> None:
    """Adds a second adapter of the type: at the same points, of other settings where the config has numbers."""
    adapters = subject.adapters
    for config in _variants(subject.config):
        if _shapes(config, subject) != _shapes(subject.config, subject):
            continue  # one block gives side inputs to both
        try:
            adapters.add(_OTHER, config, seed=1)
        except AdapterKitError:  # not every number can be changed alone
            continue
        break
    move(adapters, _OTHER, subject, seed=1)


def _shapes(config: ak.AdapterConfig, subject: Subject) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: value.shape for name, value in config.example_context(subject.points, 1).items()}


def _variants(config: ak.AdapterConfig) -> Iterator[ak.AdapterConfig]:
    """Configs with one number changed, and at last the config itself."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if type(value) is int or (type(value) is float and value):  # a 0 is often a probability
            try:
                yield dataclasses.replace(config, **{item.name: value + 1 if type(value) is int else value / 2})
            except AdapterKitError:
                continue
    yield config


def _both(subject: Subject) -> Tensor | None:
    """The output of both together, or None where they cannot act so."""
    try:
        return subject.bits([NAME, _OTHER])
    except (ConfigError, RoutingError):
        return None


def _values(subject: Subject) -> dict[str, Tensor]:
    return {key: tensor.detach().clone() for key, tensor in subject.adapters.state_dict(NAME).items()}


def _copy(adapters: ak.Adapters, name: str, config: ak.AdapterConfig) -> None:
    adapters.add(name, config)
    for one, other in zip(adapters.parameters(name), adapters.parameters(NAME), strict=True):
        one.data.copy_(other.data)
    for one, other in zip(adapters.state_dict(name).values(), adapters.state_dict(NAME).values(), strict=True):
        one.copy_(other)
