"""What acts at one adapted module: its slots, and how a call of the module goes around them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from adapterkit.adapter import AdapterModule
from adapterkit.backend import AttentionSeam, Lengthening, PlainForward
from adapterkit.engine.attending import Attended, Attending, Projections
from adapterkit.engine.attention import extend_all
from adapterkit.engine.bases import Computed, PartBase, ReadBase, SpanBase, SublayerBase, WholeBase
from adapterkit.engine.context import Side
from adapterkit.engine.expressions import acting_at, flattened, outermost_last
from adapterkit.engine.folding import check_bias, fold
from adapterkit.engine.lengthening import gathered, with_behind
from adapterkit.engine.read_weights import ReadWeight, StackedWeight
from adapterkit.engine.selection import Selection, Strength, strength_at
from adapterkit.engine.sums import Acting, Active, combine, effects
from adapterkit.engine.switch import Switch
from adapterkit.kernels.spans import read_span, write_spans
from adapterkit.kernels.weights import base_weight, canonical, stored_weight
from adapterkit.layer import LayerHandler
from adapterkit.points import InjectionPoint, ParameterPoint, WeightLayout

Found = list[tuple["Slot", Active]]


class Slot(nn.Module):
    """The adapters of one point, by name. Registered below the adapted module.

    Names are written into `_modules` directly: `add_module` refuses those that are attributes of nn.Module ("train").
    """

    def __init__(self, point: InjectionPoint) -> None:
        super().__init__()
        self.point = point
        access = point.layout.access if isinstance(point, ParameterPoint) else "call"
        self.ways = {"call": (point.kind,), "read": ("read",), "any": (point.kind, "read")}[access]

    def active(self, selection: Selection) -> Active:
        """What acts at this point, with its weights."""
        return self._acting(selection, self._modules)  # type: ignore[arg-type]

    def attending(self, selection: Selection) -> Active:
        """Of that, what has an attention of its own."""
        modules: dict[str, AdapterModule] = self._modules  # type: ignore[assignment]
        return self._acting(selection, {name: Attending(one) for name, one in modules.items() if one.attends})

    def _acting(self, selection: Selection, mine: Mapping[str, Any]) -> Active:
        compiling = torch.compiler.is_compiling()
        found: list[tuple[Acting, Strength]] = []
        for expression, weight in selection.tensors if compiling else selection.acting:
            acting = acting_at(expression, mine)
            if acting is None:
                continue
            strength = strength_at(weight, self.point)
            if compiling and not acting.scalable and not (isinstance(strength, Tensor) and strength.ndim):
                strength = 1.0
            if isinstance(strength, Tensor) or strength != 0:
                found.append((acting, strength))
        return outermost_last(found)

    def extra_repr(self) -> str:
        """The point's id, for `repr(model)`."""
        return self.point.id


class Slots(nn.Module):
    """The slots of one adapted module, by role."""

    def __iter__(self) -> Iterator[Slot]:
        return iter(list(self._modules.values()))  # type: ignore[arg-type]


@dataclass
class Site:
    """What acts at one adapted module. Kept in the module's `__dict__`, so it is copied and pickled along."""

    switch: Switch
    base: type[nn.Module] = nn.Module
    slots: Slots = field(default_factory=Slots)
    norms: dict[str, tuple[nn.Module | None, nn.Module | None]] = field(default_factory=dict)
    hooks: dict[str, list[RemovableHandle]] = field(default_factory=dict)
    seam: AttentionSeam | None = None
    seam_saved: object = None
    plain: PlainForward | None = None
    lengthening: Lengthening | None = None
    projections: Projections | None = None
    handler: LayerHandler | None = None

    def active(self, way: str) -> Found:
        """The slots at which something acts now, of one way of acting: a kind, or "read" for weights that are read."""
        selection = self.switch.current
        if selection.idle:
            return []
        found = [(slot, slot.active(selection)) for slot in self.slots if way in slot.ways]
        return [(slot, active) for slot, active in found if active]

    @property
    def read(self) -> frozenset[str]:
        """Names of the parameters that the model reads and that adapters act in."""
        return frozenset(name for slot in self.slots if "read" in slot.ways for name in _names(slot))

    def call(
        self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The adapted module's forward. With nothing active it is the module's own forward and nothing else."""
        if self.switch.current.idle:
            return forward(*args, **kwargs)
        if self.seam is not None and self.seam.forward is not None and self.active("attention"):
            forward = functools.partial(self.seam.forward, module)
        if self.plain is not None and self.active("read"):
            forward = functools.partial(self.plain, module)
        for around in (self._weights, self._tokens, self._output):
            forward = around(module, forward)
        return forward(*args, **kwargs)

    def extend(
        self, keys: Tensor, values: Tensor, mask: Tensor | None, *, queries: int, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        for _, active in self.active("attention"):
            flat = [(one, weight) for one, weight in flattened(active) if one.extends]
            keys, values, mask = extend_all(keys, values, mask, flat, queries=queries, causal=causal)
            causal = False
        return keys, values, mask

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, output: Tensor, *, scale: float | None = None
    ) -> Tensor:
        selection = self.switch.current
        if selection.idle:
            return output
        for slot in self.slots:
            active = slot.attending(selection) if "attention" in slot.ways else None
            if active:
                side = self._side(slot.point)
                base = Attended(query, keys, values, output, scale, self.switch, side, self.projections)
                output = combine(query, base, active)
        return output

    def _side(self, point: InjectionPoint) -> Side:
        return lambda x: self.switch.side(x, point.id)

    def parameter(self, module: nn.Module, name: str) -> Any:
        """What the model gets when it reads a parameter: the parameter, or what the active adapters make of it."""
        if name not in module._parameters:  # weight_norm was applied after the adapter
            return module.__dict__[name] if name in module.__dict__ else module.__getattr__(name)
        own = module._parameters[name]
        found = [(slot, active) for slot, active in self.active("read") if name in _names(slot)]
        if not found or own is None:
            return own
        point = found[0][0].point
        if not isinstance(point, ParameterPoint):
            return own
        layout = point.layout
        weight, bias = stored_weight(module, layout)
        parts = [(slot.point, active) for slot, active in found]
        if layout.index is not None:
            return self._stacked(own, weight, bias, parts, is_bias=name != layout.parameter)
        if layout.access == "any":
            offloaded = any(p.is_meta for _, active in parts for adapter, _ in active for p in adapter.parameters())
            if not self.switch.inside or offloaded:  # the user, or an offload hook, looks at the base's weight
                return own
            if torch.compiler.is_compiling():  # a trace forgets what is not used, and knows no such stand-in
                return _folded(weight, bias, parts, layout, is_bias=name != layout.parameter)
            return ReadWeight(own, lambda: _folded(weight, bias, parts, layout, is_bias=name != layout.parameter))
        return _folded(weight, bias, parts, layout, is_bias=name != layout.parameter)

    @staticmethod
    def _stacked(
        own: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        parts: list[tuple[InjectionPoint, Active]],
        *,
        is_bias: bool,
    ) -> StackedWeight:
        by_index: dict[int, list[tuple[InjectionPoint, Active]]] = {}
        for point, active in parts:
            if isinstance(point, ParameterPoint) and point.layout.index is not None:
                by_index.setdefault(point.layout.index, []).append((point, active))
        return StackedWeight(own, by_index, weight if is_bias else bias, is_bias=is_bias)

    def _weights(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        found = self.active("weight")
        if not found:
            return forward

        def adapted(*args: Any, **kwargs: Any) -> Any:
            x, run = _first_argument(forward, args, kwargs)
            return _around_weight(module, x, Computed(run, x, self._side(found[0][0].point)), found)

        return adapted

    def _tokens(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        for slot, active in sorted(self.active("tokens"), key=lambda one: one[0].point.lengthens):
            longer = slot.point.lengthens
            forward = (
                self._longer(module, forward, slot, flattened(active))
                if longer
                else _changed(forward, active, self._side(slot.point))
            )
        return forward

    def _longer(self, module: nn.Module, forward: Callable[..., Any], slot: Slot, active: Active) -> Callable[..., Any]:
        lengthening = self.lengthening

        def positions(tokens: Tensor) -> tuple[Tensor, Tensor | None]:
            added, visible = gathered(active, tokens)
            count = added.shape[1]
            self.switch.lengthened(slot.point.id, tokens.shape[1] + count, count)
            return added, visible

        if lengthening is None:
            return lambda *args, **kwargs: with_behind(forward, positions, args, kwargs)
        return lambda *args, **kwargs: lengthening(module, forward, positions, args, kwargs)

    def _output(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        found = self.active("output")
        if not found:
            return forward

        def adapted(*args: Any, **kwargs: Any) -> Any:
            result = forward(*args, **kwargs)
            # Attention modules return (output, weights, ...): the sublayer's output is the first.
            output = result[0] if isinstance(result, tuple) else result
            for slot, active in found:
                # A block takes its stream itself: checkpointing runs its forward again, but no hook of it.
                x = (
                    _first_argument(forward, args, kwargs)[0]
                    if slot.point.is_block
                    else self.switch.take(slot.point.id)
                )
                # A mixture of experts may give its tokens in one row, [batch * length, features].
                shaped = output if slot.point.is_block or output.shape == x.shape else output.view(x.shape)
                base = SublayerBase(x, shaped, *self.norms[slot.point.id], self._side(slot.point))
                combined = combine(x, base, active)
                output = combined.view(output.shape)
            return (output, *result[1:]) if isinstance(result, tuple) else output

        return adapted


def _changed(forward: Callable[..., Any], active: Active, side: Side) -> Callable[..., Any]:
    """A module that makes a sequence, with the adapters that change it."""

    def adapted(*args: Any, **kwargs: Any) -> Any:
        x, run = _first_argument(forward, args, kwargs)
        return combine(x, Computed(run, x, side), active)

    return adapted


def _around_weight(module: nn.Module, x: Tensor, whole: Computed, found: Found) -> Tensor:
    """A module's output with the adapters of its one point, or of the points that share it."""
    point = found[0][0].point
    if point.in_span is not None:
        out = whole(x)
        for slot, active in found:
            if slot.point.in_span is not None:
                part = read_span(x, slot.point.in_span, -1)
                base = PartBase(whole, x, part, slot.point.in_span, slot.point, _reader(module, slot.point))
                out = out + effects(part, base, active)
        return out
    if point.span is None:
        return combine(x, WholeBase(whole, point, _reader(module, point)), found[0][1])
    spans = [(slot.point, slot.point.span, active) for slot, active in found if slot.point.span is not None]
    dim = point.feature_axis
    parts = [
        (span, combine(x, SpanBase(whole, span, dim, at, _reader(module, at)), active)) for at, span, active in spans
    ]
    return write_spans(whole(x), parts, dim)


def _reader(module: nn.Module, point: InjectionPoint) -> ReadBase:
    return lambda: base_weight(module, point)


def _folded(
    weight: Tensor | None,
    bias: Tensor | None,
    parts: list[tuple[InjectionPoint, Active]],
    layout: WeightLayout,
    *,
    is_bias: bool,
) -> Any:
    folded, folded_bias = fold(canonical(weight, layout), bias, parts)  # type: ignore[arg-type]
    check_bias(bias, folded_bias, parts)
    return folded_bias if is_bias else canonical(folded, layout).contiguous()


def _names(slot: Slot) -> tuple[str, ...]:
    return slot.point.parameters if isinstance(slot.point, ParameterPoint) else ()


def _first_argument(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Callable[[Any], Any]]:
    """The module's input, and the forward as a function of it alone."""
    if args:
        return args[0], lambda x: forward(x, *args[1:], **kwargs)
    name = next(iter(kwargs))
    return kwargs[name], lambda x: forward(**{**kwargs, name: x})
