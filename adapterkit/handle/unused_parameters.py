"""Parameters that train and that a call may not reach: experts without a token, adapters without a row of the batch.

Whoever averages gradients between processes waits for each of them. So they are in the graph of what the model returns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map_only

from adapterkit.handle.building import parameters_of

if TYPE_CHECKING:
    from adapterkit.handle.state import State


class _Reaching(torch.autograd.Function):
    """A tensor as it is, in whose graph are parameters that have no effect on it."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *parameters: nn.Parameter) -> Tensor:
        ctx.parameters = parameters
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        parameters: tuple[nn.Parameter, ...] = ctx.parameters
        if not _is_distributed():  # who averages gradients makes those that lack, and of the kind that it needs
            torch.autograd.Variable._execution_engine.queue_callback(lambda: _fill(parameters))  # type: ignore[attr-defined]
        return grad, *(None for _ in parameters)


class Unreached:
    """A forward hook of an adapted model."""

    def __init__(self, state: State, model: str) -> None:
        self._state, self._model = state, model

    def __call__(self, module: nn.Module, args: tuple[Any, ...], result: Any) -> Any:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        found = [one for one in parameters_of(self._modules()) if one.requires_grad and one.is_leaf]
        found = [one for one in found if not hasattr(one, "device_mesh")]  # sharding asks for no gradient
        if not found:
            return None

        def reach(y: Tensor) -> Tensor:
            return _Reaching.apply(y, *found) if y.is_floating_point() else y  # type: ignore[no-any-return]

        return tree_map_only(Tensor, reach, result)

    def _modules(self) -> list[nn.Module]:
        found: list[nn.Module] = []
        state = self._state
        selection = state.switch.current
        names = selection.names if not state.switch.folded else frozenset()
        left_out = selection.routes is not None and _is_distributed()
        for name in state.trained:
            attached = state.adapters[name]
            if name in names:
                found += attached.facts.experts.get(self._model, ())
            elif left_out:
                points = attached.points
                found += [one for key, one in attached.modules.items() if points[key].model == self._model]
        return found


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _fill(parameters: tuple[nn.Parameter, ...]) -> None:
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
