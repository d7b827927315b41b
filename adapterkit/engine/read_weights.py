"""What a model gets in place of a parameter that it reads: stand-ins that fold adapters in only where they are used."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adapterkit.engine.bases import Computed, ReadBase, SpanBase, WholeBase
from adapterkit.engine.context import no_side
from adapterkit.engine.folding import Part, check_bias, fold
from adapterkit.errors import AttachError
from adapterkit.kernels.spans import write_spans
from adapterkit.kernels.sums import combine
from adapterkit.kernels.weights import canonical, point_weight
from adapterkit.points import InjectionPoint, ParameterPoint, WeightLayout

_OF_THE_STACK = frozenset(("shape", "dtype", "device", "is_meta", "requires_grad", "data_ptr"))
"""What is asked of the parameter itself, by the model and by offload hooks."""


class StackedWeight:
    """A parameter [experts, ...] that a model reads expert by expert, with the adapters of each in its weight.

    Only what is indexed is made: never the weights, or the updates, of all experts at once. A batched product with all
    of them adds each expert's effect to its rows. Whatever else is done to it is done to the whole, which is then made.
    """

    def __init__(
        self,
        parameter: Tensor,
        parts: Mapping[int, Sequence[Part]],
        other: Tensor | None,
        *,
        is_bias: bool,
    ) -> None:
        self._parameter, self._parts, self._other, self._is_bias = parameter, parts, other, is_bias

    def __getitem__(self, index: Any) -> Tensor:
        if isinstance(index, Tensor) and index.ndim == 0 and index.dtype != torch.bool:
            index = int(index)
        if not isinstance(index, int):
            return self.whole()[index]
        return self._one(index % len(self._parameter))

    def _one(self, index: int) -> Tensor:
        own = self._parameter[index]
        parts = self._parts.get(index)
        if not parts:
            return own
        layout = _layout(parts[0][0])
        if self._is_bias:
            folded = None if self._other is None else fold(canonical(self._other[index], layout), own, parts)[1]
            return own if folded is None else folded
        bias = None if self._other is None else self._other[index]
        # In the parameter's own order of memory: products then round as they do with the parameter.
        folded, folded_bias = fold(canonical(own, layout), bias, parts)
        check_bias(bias, folded_bias, parts)
        return canonical(folded, layout).contiguous()

    def whole(self) -> Tensor:
        """All experts in one tensor."""
        return torch.stack([self._one(index) for index in range(len(self._parameter))])

    def __len__(self) -> int:
        return len(self._parameter)

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """The whole, moved or cast. To the meta device goes the parameter: an offload hook puts it away."""
        return (self._parameter if _goes_away(*args, **kwargs) else self.whole()).to(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._parameter if name in _OF_THE_STACK else self.whole(), name)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.bmm and len(args) == 2 and isinstance(args[1], cls) and not kwargs:
            return args[1]._bmm(args[0])
        made = [arg.whole() if isinstance(arg, cls) else arg for arg in args]
        named = {key: arg.whole() if isinstance(arg, cls) else arg for key, arg in (kwargs or {}).items()}
        return function(*made, **named)

    def _bmm(self, x: Tensor) -> Tensor:
        """X [experts, tokens, in] times the stack [experts, in, out]."""
        y = torch.bmm(x, self._parameter)
        return torch.stack([self._expert(index, x[index], y[index]) for index in range(len(self._parameter))])

    def _expert(self, index: int, x: Tensor, y: Tensor) -> Tensor:
        parts = self._parts.get(index, ())
        base = Computed(lambda other: other @ self._parameter[index], x, y=y)
        spans = [
            (point.span, combine(x, SpanBase(base, point.span, -1, point, self._reader(point)), active))
            for point, active in parts
            if point.span is not None
        ]
        if spans:
            return write_spans(y, spans, -1)
        return (
            combine(x, WholeBase(base, x, no_side, parts[0][0], self._reader(parts[0][0])), parts[0][1]) if parts else y
        )

    def _reader(self, point: InjectionPoint) -> ReadBase:
        bias = None if self._other is None else self._other.detach()
        return lambda: point_weight(self._parameter.detach(), bias, point, _layout(point))


_OF_THE_PARAMETER = frozenset(
    getattr(Tensor, name).__get__
    for name in ("device", "dtype", "is_meta", "itemsize", "layout", "ndim", "requires_grad", "shape")
) | frozenset(
    getattr(Tensor, name)
    for name in ("__len__", "dim", "element_size", "is_floating_point", "ndimension", "nelement", "numel", "size")
)
"""What adapters do not change."""


class ReadWeight(Tensor):
    """A parameter that was read, perhaps only for its dtype: adapters are folded in where it is computed with, once.

    A tensor to whoever asks, of the parameter's shape, dtype and device, but with no storage of its own: every function
    of torch gets the folded one in its place.
    """

    _parameter: Tensor
    _fold: Callable[[], Tensor]

    @staticmethod
    def of(parameter: Tensor, fold: Callable[[], Tensor], learning: Sequence[Tensor] = ()) -> ReadWeight:
        """A stand-in.

        Args:
            parameter: What was read.
            fold: Makes it with the adapters in it.
            learning: What a gradient goes to that is given to the stand-in itself, by a function of autograd that is
                called with it: torch shows us no such call.
        """
        if learning:
            return _Folded.apply(parameter, fold, *learning)  # pyright: ignore[reportReturnType]
        made: ReadWeight = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            ReadWeight, parameter.shape, dtype=parameter.dtype, device=parameter.device
        )
        made._parameter, made._fold = parameter, functools.cache(fold)
        return made

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():  # what is looked up on the stand-ins themselves
            if function in _OF_THE_PARAMETER:
                return function(args[0]._parameter, *args[1:], **(kwargs or {}))
            if function is Tensor.to and _goes_away(*args[1:], **(kwargs or {})):
                return args[0]._parameter.to(*args[1:], **(kwargs or {}))
            made = _tensors(args)
            named = {key: _tensors(value) for key, value in (kwargs or {}).items()}
            if function is Tensor.__deepcopy__:  # a copy has no graph, as the parameter's has none
                made = (made[0].detach(), *made[1:])
        return function(*made, **named)

    @classmethod
    def __torch_dispatch__(cls, function: Callable[..., Any], *_: Any, **__: Any) -> Any:
        """Below autograd there is nothing to compute with."""
        raise AttachError(f"{function} was given a weight with adapters in it by a way that torch does not show")


class _Folded(torch.autograd.Function):
    """A stand-in in a graph: the gradient that it is given is the folded one's."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, fold: Callable[[], Tensor], *learning: Tensor) -> ReadWeight:
        ctx.fold = fold
        ctx.save_for_backward(*learning)
        return ReadWeight.of(parameter, fold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        with torch.enable_grad():
            folded = ctx.fold()
        return None, None, *torch.autograd.grad(folded, ctx.saved_tensors, grad, allow_unused=True)


def _goes_away(*args: Any, **kwargs: Any) -> bool:
    """Whether `to` has these arguments from an offload hook, which puts the parameter on the meta device."""
    device = kwargs.get("device", args[0] if args else None)
    return device == "meta" or (isinstance(device, torch.device) and device.type == "meta")


def _tensors(value: Any) -> Any:
    if isinstance(value, ReadWeight):
        return value._fold()
    return type(value)(map(_tensors, value)) if type(value) in (list, tuple) else value


def _layout(point: InjectionPoint) -> WeightLayout:
    if not isinstance(point, ParameterPoint):
        raise TypeError(f"{point.id} is no weight point")
    return point.layout
