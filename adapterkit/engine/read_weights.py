"""What a model gets in place of a parameter that it reads: stand-ins that fold adapters in only where they are used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adapterkit.engine.bases import Computed, ReadBase, SpanBase, WholeBase
from adapterkit.engine.context import no_side
from adapterkit.engine.folding import Part, check_bias, fold
from adapterkit.kernels.spans import write_spans
from adapterkit.kernels.sums import combine
from adapterkit.kernels.weights import canonical, point_weight
from adapterkit.points import InjectionPoint, ParameterPoint, WeightLayout


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

    @property
    def shape(self) -> torch.Size:
        """The parameter's."""
        return self._parameter.shape

    @property
    def dtype(self) -> torch.dtype:
        """The parameter's."""
        return self._parameter.dtype

    @property
    def device(self) -> torch.device:
        """The parameter's."""
        return self._parameter.device

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.whole(), name)

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


_UNCHANGED = frozenset(
    (
        "device",
        "dim",
        "dtype",
        "element_size",
        "is_floating_point",
        "is_meta",
        "ndim",
        "numel",
        "requires_grad",
        "shape",
        "size",
    )
)


def _operator(name: str) -> Callable[..., Any]:
    return lambda weight, *others: getattr(weight._fold(), name)(*others)


class ReadWeight:
    """A parameter that was read, perhaps only for its dtype: adapters are folded in when it is computed with.

    Args:
        parameter: What was read.
        fold: Makes it with the adapters in it.
    """

    def __init__(self, parameter: Tensor, fold: Callable[[], Tensor]) -> None:
        self._parameter, self._fold = parameter, fold

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._parameter if name in _UNCHANGED else self._fold(), name)

    # Python looks operators up in the class alone.
    __add__ = _operator("__add__")
    __radd__ = _operator("__radd__")
    __sub__ = _operator("__sub__")
    __rsub__ = _operator("__rsub__")
    __mul__ = _operator("__mul__")
    __rmul__ = _operator("__rmul__")
    __truediv__ = _operator("__truediv__")
    __matmul__ = _operator("__matmul__")
    __rmatmul__ = _operator("__rmatmul__")
    __neg__ = _operator("__neg__")
    __getitem__ = _operator("__getitem__")
    __len__ = _operator("__len__")
    __iter__ = _operator("__iter__")

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return function(*_tensors(args), **{key: _tensors(value) for key, value in (kwargs or {}).items()})


def _tensors(value: Any) -> Any:
    if isinstance(value, ReadWeight):
        return value._fold()
    return type(value)(map(_tensors, value)) if type(value) in (list, tuple) else value


def _layout(point: InjectionPoint) -> WeightLayout:
    if not isinstance(point, ParameterPoint):
        raise TypeError(f"{point.id} is no weight point")
    return point.layout
