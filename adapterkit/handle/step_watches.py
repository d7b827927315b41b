"""What training does without, in a loop that is not ours: a warning, once.

Nothing in such a loop is ours but the parameters of adapters. That one has changed since the last backward, or was in a
step of torch's optimizers, is how a step is noticed; the look costs a backward nothing.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from adapterkit.adapter import AdapterModule
from adapterkit.engine.attach import site_of
from adapterkit.engine.site import Site
from adapterkit.handle.building import Built
from adapterkit.handle.state import State

_STEPS = 3


class _Watch:
    """Counts the steps, in each of which something is as it should not be."""

    def __init__(self, parameter: nn.Parameter | None) -> None:
        self._parameter = parameter
        self._version: int | None = None
        self._stepped = False
        self._steps = 0
        self._hook: RemovableHandle | None = None
        self._after: RemovableHandle | None = None
        if parameter is not None:
            self._hook = parameter.register_post_accumulate_grad_hook(self)
            self._after = register_optimizer_step_post_hook(_After(self))
            weakref.finalize(self, self._after.remove)

    def __call__(self, parameter: Tensor) -> None:
        """After a backward."""
        if self._version is not None and (self._stepped or self._version != parameter._version):
            self._steps += 1
        self._version, self._stepped = parameter._version, False
        if self._as_it_should_be():
            self.stop()
        elif self._is_certain():
            self._warn()

    def _as_it_should_be(self) -> bool:
        return False

    def _is_certain(self) -> bool:
        return self._steps >= _STEPS

    def _told(self) -> str:
        raise NotImplementedError

    def _warn(self) -> None:
        self.stop()
        warnings.warn(self._told(), stacklevel=3)

    def after(self, optimizer: torch.optim.Optimizer) -> None:
        """After a step of any of torch's optimizers: one that is fused leaves the versions of what it changes."""
        self._stepped = self._stepped or self._is_of(optimizer)

    def _is_of(self, optimizer: torch.optim.Optimizer) -> bool:
        return any(parameter is self._parameter for group in optimizer.param_groups for parameter in group["params"])

    def stop(self) -> None:
        """Counts no more."""
        for hook in (self._hook, self._after):
            if hook is not None:
                hook.remove()
        self._hook = self._after = None

    def __getstate__(self) -> dict[str, Any]:  # a copied parameter has no hooks
        return {**self.__dict__, "_hook": None, "_after": None}


class Untold(_Watch):
    """An adapter that adapts itself after every step, and is told of none: it is told from then on, without the end.

    Args:
        name: What it is called.
        part: One of its types, which trains.
    """

    def __init__(self, name: str, part: Built) -> None:
        super().__init__(_first_trained(part.modules.values()))
        self._name, self._part = name, part
        self._warned = False

    def _warn(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._warned = True
        warnings.warn(self._told(), stacklevel=3)

    def _told(self) -> str:
        return (
            f"{self._name!r} ({type(self._part.config).__name__}) adapts itself after each optimizer step, and was not "
            f"told of the first {_STEPS}. From here on it is, but not of how many there will be. Call "
            "adapters.after_step(step, steps) between optimizer.step() and zero_grad(), and add adapters.penalty() to "
            "the loss"
        )

    @torch.no_grad()
    def after(self, optimizer: torch.optim.Optimizer) -> None:
        """From the warning on it is told."""
        if not self._warned:
            super().after(optimizer)
        elif self._is_of(optimizer):
            self._steps += 1
            self._part.config.after_step(self._part.modules, self._steps, None)


class _After:
    """A hook of all optimizers, which keeps no model alive."""

    def __init__(self, watch: _Watch) -> None:
        self._watch = weakref.ref(watch)

    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if (watch := self._watch()) is not None:
            watch.after(optimizer)


class UnreachedHead(_Watch):
    """Adapters at a head that no gradient reaches, while one reaches others that come before it.

    A loss that is fused with the head reads its weight. Inside of the model's forward that has the adapters in it;
    outside it is the base's.

    Args:
        heads: Point id -> the modules there that train.
        sites: What is kept there. Where a weight was seen from outside, one backward is enough.
        before: A parameter that trains, of what comes before them.
    """

    def __init__(
        self, heads: Mapping[str, Sequence[AdapterModule]], sites: Sequence[Site], before: nn.Parameter | None
    ) -> None:
        super().__init__(before)
        self._heads, self._sites = heads, sites

    def _is_certain(self) -> bool:
        return super()._is_certain() or any(site.seen for site in self._sites)

    def _as_it_should_be(self) -> bool:
        return not self._unreached()

    def _unreached(self) -> list[str]:
        return [key for key, modules in self._heads.items() if not any(map(_is_reached, modules))]

    def _told(self) -> str:
        return (
            f"no gradient reaches the adapter at {self._unreached()[0]}: the loss does not call that layer, and reads "
            "its weight outside of the model's forward, where it is the base's. Compute the loss in the model's "
            "forward, call the layer, or leave it out of the targets"
        )


def _first_trained(modules: Iterable[nn.Module]) -> nn.Parameter | None:
    return next((one for module in modules for one in module.parameters() if one.requires_grad), None)


def _is_reached(module: nn.Module) -> bool:
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return not trained or any(parameter.grad is not None for parameter in trained)


def watch_steps(state: State, names: Iterable[str]) -> list[_Watch]:
    """Begins to count the steps of adapters that train."""
    watches: list[_Watch] = []
    heads: dict[str, list[AdapterModule]] = {}
    others: list[AdapterModule] = []
    sites: list[Site] = []
    for name in names:
        one = state.adapters[name]
        watches += [Untold(name, part) for part in one.parts if part.config.adapts]
        for key, module in one.modules.items():
            if one.points[key].role != "head":
                others.append(module)
            elif (site := site_of(state.module(one.points[key]))) is not None:
                heads.setdefault(key, []).append(module)
                sites.append(site)
    return [*watches, UnreachedHead(heads, sites, _first_trained(others))] if heads else watches
