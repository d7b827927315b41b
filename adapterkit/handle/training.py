"""The part of the handle that says what trains."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.adapter import AdapterModule
from adapterkit.engine.scopes import Key
from adapterkit.engine.switch import Switch
from adapterkit.errors import ConfigError, IncompatibleTargetError, StateError
from adapterkit.handle import choices
from adapterkit.handle.base import Access
from adapterkit.handle.building import Built, parameters_of
from adapterkit.handle.starting import Values, base_values
from adapterkit.handle.state import Attached, State
from adapterkit.handle.step_watches import Untold, watch_steps
from adapterkit.kernels.spans import read_span
from adapterkit.points import InjectionPoint, ParameterPoint


class Learning(Access):
    """What requires grad, and what training must know of it."""

    # -- what trains ------------------------------------------------------------------------------------------------

    def train(self, *names: str) -> None:
        """Makes these adapters, and nothing else on the model, require grad.

        Raises:
            UnknownNameError: There is no such adapter.
            ConfigError: None is named.
            StateError: The model was made in `torch.inference_mode()`.
        """
        choices.check_names(names, self._state.adapters)
        if not names:
            raise ConfigError(["name the adapters that should train; freeze() stops all"], "train()")
        self._check()
        self._require_trainable()
        state = self._state
        state.train(names)
        for watch in state.watches:
            watch.stop()
        state.watches = watch_steps(state, names)

    def _require_trainable(self) -> None:
        for component in self._mapped.models.values():
            first = next(component.root.parameters(), None)
            if first is not None and first.is_inference():
                raise StateError(
                    f"the {component.name} was made in torch.inference_mode(), and nothing can be trained beside such "
                    "tensors; make or load it outside of that"
                )

    def freeze(self, *names: str) -> None:
        """Makes these adapters not require grad; all of them where none is named. The base is left alone."""
        choices.check_names(names, self._state.adapters)
        self._state.set_trainable(names or self._state.adapters, value=False)
        self._state.tell_learning()

    @property
    def trained(self) -> list[str]:
        """The names of the adapters that train, in the order in which they were attached."""
        return [name for name in self._state.adapters if name in self._state.trained]

    def parameters(self, *names: str) -> Iterator[nn.Parameter]:
        """The parameters of these adapters; of all where none is named."""
        choices.check_names(names, self._state.adapters)
        chosen = [self._state.adapters[name] for name in names or list(self._state.adapters)]
        yield from parameters_of(module for one in chosen for module in one.modules.values())

    def parameter_groups(self, *names: str, lr: float) -> list[dict[str, Any]]:
        """The parameters that train, as groups for a torch optimizer: each with the learning rate its type wants.

        Args:
            names: Of these adapters; of all where none is named.
            lr: The learning rate that `AdapterConfig.rate` multiplies.
        """
        choices.check_names(names, self._state.adapters)
        groups: dict[float, list[nn.Parameter]] = {}
        for part in (part for name in names or list(self._state.adapters) for part in self._state.adapters[name].parts):
            for _, parameter, rate in trained_parameters(part):
                groups.setdefault(rate, []).append(parameter)
        return [{"params": found, "lr": lr * rate} for rate, found in groups.items()]

    def penalty(self, *names: str) -> Tensor | float:
        """The sum of what the types of these adapters add to a loss; 0.0 where they add nothing.

        Args:
            names: Of these adapters; of those that train where none is named.
        """
        choices.check_names(names, self._state.adapters)
        chosen = [self._state.adapters[name] for name in names or sorted(self._state.trained)]
        terms = [module.penalty() for one in chosen for module in one.modules.values()]
        return sum((term for term in terms if term is not None), 0.0)

    @torch.no_grad()
    def after_step(self, step: int, steps: int | None = None) -> None:
        """Tells the adapters that train of an optimizer step: some adapt themselves (`AdapterConfig.after_step`).

        Call it between `optimizer.step()` and `optimizer.zero_grad()`; adapterkit's trainer does.

        Args:
            step: Number of this step, from 1.
            steps: Of the whole training; None where nobody knows.
        """
        for watch in self._state.watches:
            if isinstance(watch, Untold):
                watch.stop()
        for name in sorted(self._state.trained):
            for part in self._state.adapters[name].parts:
                part.config.after_step(part.modules, step, steps)

    @contextlib.contextmanager
    def observing(self, name: str) -> Iterator[None]:
        """Shows an adapter the inputs of its points in every forward inside the block, for types that start from data.

        The adapter itself does not act inside. An example: `with adapters.observing("style"): model(**batch)`. Types
        that start from gradients (`AdapterConfig.observes_gradients`) see those too, of `loss.backward()` in the block.

        Raises:
            UnknownNameError: There is no such adapter.
            IncompatibleTargetError: A point has no input that could be seen.
            StateError: Weights are merged.
        """
        attached = self._attached(name)
        self._check()
        self._require_unmerged("observe inputs")
        state = self._state
        selection = state.switch.current.without(frozenset({name}))
        with self._block(selection, "observe inputs") as block, observing(state, attached, block):
            yield


def trained_parameters(part: Built) -> Iterator[tuple[str, nn.Parameter, float]]:
    """`point id/name`, parameter and rate of what trains of an adapter; what its points share once, at the first."""
    points = {point.id: point for point in part.points}
    seen: set[int] = set()
    for key, module in part.modules.items():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{key}/{name}", parameter, part.config.at(key).rate(name, points[key])


@contextlib.contextmanager
def observing(state: State, attached: Attached, block: Key | None) -> Iterator[None]:
    """Every forward inside a block shows each module of an adapter its input; at the end the config hears of it.

    Forwards of other threads and tasks do not, unless they were started in the block.

    Raises:
        IncompatibleTargetError: A point has no input that could be seen.
    """
    unseen = [point.id for point in attached.points.values() if not _is_called(point)]
    if unseen:
        raise IncompatibleTargetError(
            f"{attached.type_name} cannot observe inputs at {unseen[0]}: only a weight point whose module "
            "is called has an input of its own; narrow its targets"
        )
    with contextlib.ExitStack() as stack:
        for part, point in ((one, point) for one in attached.parts for point in one.points):
            watch, module = _Watch(part.modules[point.id], point, state.switch, block), state.module(point)
            stack.callback(module.register_forward_pre_hook(watch, with_kwargs=True).remove)
            if part.config.observes_gradients:
                stack.callback(module.register_forward_hook(watch.output, with_kwargs=True).remove)
        try:
            yield
        except BaseException:
            for module in attached.modules.values():
                module.forget()
            raise
    with torch.no_grad():
        for part in attached.parts:
            part.config.observed(part.modules, functools.partial(_base_values, state, attached))


def _base_values(state: State, attached: Attached, key: str) -> Values:
    values = base_values(attached.type_name, attached.points[key], state.mapped)
    if values is None:
        raise IncompatibleTargetError(f"the weight at {key} has no values: it is on the meta device")
    return values


def _is_called(point: InjectionPoint) -> bool:
    return isinstance(point, ParameterPoint) and not point.is_read


class _Watch:
    def __init__(self, adapter: AdapterModule, point: InjectionPoint, switch: Switch, block: Key | None) -> None:
        self._adapter, self._point, self._switch, self._block = adapter, point, switch, block

    @torch.no_grad()
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._switch.is_in(self._block):
            return
        self._adapter.observe(self._input(args, kwargs))

    def output(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
        """A forward hook: the output, on which a backward calls `observe_gradient`."""
        if not torch.is_grad_enabled() or not self._switch.is_in(self._block):
            return y
        if not y.requires_grad:  # the base is frozen; what computes on it must not meet a leaf
            y = y + torch.zeros((), dtype=y.dtype, device=y.device, requires_grad=True)
        x = self._input(args, kwargs)

        @torch.no_grad()
        def see(grad: Tensor) -> None:
            part = grad if self._point.span is None else read_span(grad, self._point.span, self._point.feature_axis)
            self._adapter.observe_gradient(x, part)

        y.register_hook(see)
        return y

    def _input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        x = (args[0] if args else next(iter(kwargs.values()))).detach()
        return x if self._point.in_span is None else read_span(x, self._point.in_span, -1)
