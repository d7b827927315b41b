"""Showing adapters the inputs of their points, without acting on them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from adapterkit.adapter import AdapterModule
from adapterkit.errors import IncompatibleTargetError
from adapterkit.kernels.spans import read_span
from adapterkit.points import InjectionPoint, WeightLayout
from adapterkit.state import Attached, State


@contextlib.contextmanager
def observing(state: State, attached: Attached) -> Iterator[None]:
    """Every forward inside the block shows each module of an adapter its input; at the end the config hears of it.

    Raises:
        IncompatibleTargetError: A point has no input that could be seen.
    """
    unseen = [point.id for point in attached.points.values() if not _is_called(point)]
    if unseen:
        raise IncompatibleTargetError(
            f"{type(attached.config).__name__} cannot observe inputs at {unseen[0]}: only a weight point whose module "
            "is called has an input of its own; narrow its targets"
        )
    with contextlib.ExitStack() as stack:
        for key, point in attached.points.items():
            watch = _Watch(attached.modules[key], point)
            stack.callback(state.mapped.module(point).register_forward_pre_hook(watch, with_kwargs=True).remove)
        try:
            yield
        except BaseException:
            for module in attached.modules.values():
                module.forget()
            raise
    with torch.no_grad():
        attached.config.observed(attached.modules)


def _is_called(point: InjectionPoint) -> bool:
    return isinstance(point.layout, WeightLayout) and point.layout.access != "read"


class _Watch:
    def __init__(self, adapter: AdapterModule, point: InjectionPoint) -> None:
        self._adapter, self._span = adapter, point.in_span

    @torch.no_grad()
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        self._adapter.observe(x.detach() if self._span is None else read_span(x.detach(), self._span, -1))
