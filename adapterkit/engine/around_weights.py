"""What goes around the forward of a module that has a weight: its whole, rows or columns of it, indices into it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from adapterkit.adapter import AdditiveModule
from adapterkit.engine.bases import Computed, PartBase, SpanBase, WholeBase
from adapterkit.engine.context import Side
from adapterkit.engine.nesting import Args, Around, Forward, Kwargs, first_argument
from adapterkit.engine.slots import Found, side_of
from adapterkit.kernels.spans import read_span, write_spans
from adapterkit.kernels.sums import Combine, adding_alone, combine, effects, fitted, is_bare, merge_weights, together
from adapterkit.kernels.weights import base_weight
from adapterkit.points import InjectionPoint, Span

if TYPE_CHECKING:
    from adapterkit.engine.site import Site

_LINEAR = nn.Linear.forward

ReadRows = Callable[[nn.Module, InjectionPoint], tuple[Tensor | None, Tensor | None]]


def around_weights(site: Site, found: Found) -> list[Around]:
    """What acts on the whole layer, and around it what acts on its parts."""
    whole = [one for one in found if one[0].point.span is None and one[0].point.in_span is None]
    parts = [one for one in found if one not in whole] if whole else found  # act on what the whole layer gives
    return [*_around_layer(site, whole, []), *_around_layer(site, parts, whole)]


def _around_layer(site: Site, found: Found, beneath: Found) -> list[Around]:
    if not found:
        return []
    point = found[0][0].point
    side = side_of(site.switch, found[0][0])
    if point.in_span is not None and point.form == "embedding":
        return [functools.partial(_around_indices, point, side, together(found[0][1]))]
    if point.in_span is not None:
        return [functools.partial(_around_columns, found, side)]
    if point.span is not None:
        return [functools.partial(_around_rows, found, side, functools.partial(_read_rows, beneath))]
    whole = functools.partial(_around_whole, point, side, together(found[0][1]))
    adding = adding_alone(found[0][1])
    if adding is None or type(adding).added is not AdditiveModule.added:
        return [whole]
    around = _around_linear if site.base is nn.Linear and not is_dynamo_compiling() else _around_added
    return [functools.partial(around, adding, whole)]


def _around_added(
    adapter: Any, whole: Around, module: nn.Module, forward: Forward, args: Args, kwargs: Kwargs
) -> Tensor:
    """One adapter that only adds: of its base it needs the output alone. The usual case, and quick."""
    if kwargs or len(args) != 1 or not is_bare(adapter):
        return whole(module, forward, args, kwargs)
    x = args[0]
    y = forward(x)
    delta = adapter.delta(x)
    if delta.shape == y.shape and delta.dtype == y.dtype:
        return y + delta
    return y + fitted(adapter, delta, y)


def _around_linear(adapter: Any, whole: Around, module: nn.Module, forward: Any, args: Args, kwargs: Kwargs) -> Tensor:
    """The same at torch's own linear layer, which takes longer to look for its weight than to ask for the product."""
    own = adapter.__dict__  # `is_bare` without another call
    if (
        kwargs
        or len(args) != 1
        or own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    ):
        return whole(module, forward, args, kwargs)
    x: Tensor = args[0]
    held: Any = module.__dict__["_parameters"]
    weight = held.get("weight")
    # It has none where it is no parameter now: one part of a flat one, or a replica's.
    if weight is not None and "bias" in held and type(forward) is MethodType and forward.__func__ is _LINEAR:
        y = F.linear(x, weight, held["bias"])
    else:
        y = forward(x)
    delta = adapter.delta(x)
    if delta.shape == y.shape and delta.dtype == y.dtype:
        return y + delta
    return y + fitted(adapter, delta, y)


def _around_whole(
    point: InjectionPoint,
    side: Side,
    act: Combine,
    module: nn.Module,
    forward: Forward,
    args: Args,
    kwargs: Kwargs,
) -> Tensor:
    x, run = (args[0], forward) if len(args) == 1 and not kwargs else first_argument(forward, args, kwargs)
    read = functools.partial(base_weight, module, point)
    return act(x, WholeBase(run, x, side, point, read, by_rows=run is forward))


def _read_rows(beneath: Found, module: nn.Module, point: InjectionPoint) -> tuple[Tensor | None, Tensor | None]:
    """The weight of some rows, with the effect of what acts on the whole layer before."""
    if not beneath or point.span is None:
        return base_weight(module, point)
    slot, active = beneath[0]
    weight, bias = base_weight(module, slot.point)
    if weight is None:
        return None, None
    weight, bias = merge_weights(weight, bias, active)
    return read_span(weight, point.span, 0), None if bias is None else read_span(bias, point.span, 0)


def _around_rows(
    found: Found, side: Side, read: ReadRows, module: nn.Module, forward: Forward, args: Args, kwargs: Kwargs
) -> Tensor:
    """Points that are rows of a fused projection."""
    x, run = first_argument(forward, args, kwargs)
    whole, dim = Computed(run, x, side), found[0][0].point.feature_axis
    parts: list[tuple[Span, Tensor]] = []
    for slot, active in found:
        point = slot.point
        if point.span is not None:
            base = SpanBase(whole, point.span, dim, point, functools.partial(read, module, point))
            parts.append((point.span, combine(x, base, active)))
    return write_spans(whole(x), parts, dim)


def _around_columns(
    found: Found, side: Side, module: nn.Module, forward: Forward, args: Args, kwargs: Kwargs
) -> Tensor:
    """Points that see a part of the input each."""
    x, run = first_argument(forward, args, kwargs)
    whole = Computed(run, x, side)
    out = whole(x)
    for slot, active in found:
        point = slot.point
        if point.in_span is not None:
            part = read_span(x, point.in_span, -1)
            base = PartBase(whole, x, part, point.in_span, point, functools.partial(base_weight, module, point))
            out = out + effects(part, base(part), base, active)
    return out


def _around_indices(
    point: InjectionPoint,
    side: Side,
    act: Combine,
    module: nn.Module,
    forward: Forward,
    args: Args,
    kwargs: Kwargs,
) -> Tensor:
    """An embedding that has got more rows than its adapters know."""
    x, run = first_argument(forward, args, kwargs)
    rows = 0 if point.in_span is None else point.in_span.size
    known = x.clamp(max=rows - 1)
    base = WholeBase(run, known, side, point, functools.partial(base_weight, module, point))
    return torch.where((x < rows).unsqueeze(-1), act(known, base), run(x))
