"""What one adapted module does under one selection: everything that depends on these two alone, computed once.

A plan holds no tensor: it is right whatever the model's and the adapters' parameters become.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adapterkit.adapter import AdditiveModule
from adapterkit.backend import Lengthening
from adapterkit.engine.bases import Computed, PartBase, SpanBase, SublayerBase, WholeBase
from adapterkit.engine.blocks import BlockBase, argument_names, documents_told
from adapterkit.engine.context import Side
from adapterkit.engine.expressions import flattened
from adapterkit.engine.first_call import place
from adapterkit.engine.folding import Part
from adapterkit.engine.lengthening import gathered, with_behind
from adapterkit.engine.nesting import Args, Around, Forward, Kwargs, first_argument, nested
from adapterkit.engine.recomputing import remembered
from adapterkit.engine.selection import Selection
from adapterkit.engine.slots import Found, Slot
from adapterkit.engine.switch import Switch
from adapterkit.errors import StateError
from adapterkit.kernels.spans import read_span, write_spans
from adapterkit.kernels.sums import Active, Combine, adding_alone, combine, effects, fitted, merge_weights, together
from adapterkit.kernels.weights import base_weight
from adapterkit.points import InjectionPoint, Span

if TYPE_CHECKING:
    from adapterkit.engine.site import Site

ReadRows = Callable[[nn.Module, InjectionPoint], tuple[Tensor | None, Tensor | None]]
_ORDER = ("weight", "tokens", "output")  # the first is innermost


class Plan:
    """What acts at a site under a selection, and how a call of its module goes around it.

    Attributes:
        active: Point id -> what acts there; nothing else is in it.
        read: Name of a parameter that the model reads -> the points in it at which something acts.
        attention: What extends keys and values, in order, with the side inputs of its point, and with the input of the
            module where one reads it.
        attending: What attends beside the softmax, in order, with the side inputs of its point.
        reads_own: Whether the model reads its own parameters.
        beneath: What the module was before weights were merged, where that is to be called.
        lengthening: Point id -> what makes a sequence longer there.
        arounds: What goes around the module's forward, the innermost first.
        instead: What runs in the place of that forward, or None.
        call: Both together; None where it is the module's own forward and nothing else.
    """

    def __init__(self, site: Site, selection: Selection) -> None:
        if selection.lost is not None:
            raise StateError(
                f"{selection.lost!r} was removed, and acts in what a block has started that is left by now"
            )
        every = [(slot, slot.active(selection)) for slot in site.slots]
        found: Found = [(slot, active) for slot, active in every if active]
        self.active = {slot.point.id: active for slot, active in found}
        self.read = _read([one for one in found if "read" in one[0].ways])
        attention = [one for one in found if "attention" in one[0].ways]
        flat = [(slot, [one for one in flattened(active) if one[0].abilities.extend]) for slot, active in attention]
        reading = {slot.point.id for slot, active in flat if any(_reads_input(one) for one, _ in active)}
        self.attention = [
            (_side(site.switch, slot), _kept(site.switch, slot) if slot.point.id in reading else None, active)
            for slot, active in flat
            if active
        ]
        beside = [(slot, slot.attending(selection)) for slot, _ in attention]
        self.attending = [(_side(site.switch, slot), active) for slot, active in beside if active]
        self.lengthening = {
            slot.point.id: functools.partial(gathered, flattened(active), _side(site.switch, slot))
            for slot, active in found
            if slot.point.lengthens
        }
        arounds = [
            around for way in _ORDER for around in _AROUND[way](site, [one for one in found if way in one[0].ways])
        ]
        arounds += [functools.partial(_keeping, site.switch, key) for key in reading]
        self.arounds, self.instead = arounds, _instead(site, self)
        self.call: Around | None = nested(arounds, self.instead)
        self.beneath = site.beneath if selection.beneath else None
        self.reads_own = not self.read and self.beneath is None
        if self.beneath is not None:
            self.call = functools.partial(_around_unmerged, self.beneath, self.call)
        if site.switch.recalls(selection) and not torch.compiler.is_dynamo_compiling():
            self.call = functools.partial(remembered, site.switch, self.call)
        if not (torch.compiler.is_dynamo_compiling() or site.placed):  # a trace would guard what it reads
            self.call = functools.partial(_first, site, self, self.call)


def _first(
    site: Site, plan: Plan, call: Around | None, module: nn.Module, forward: Forward, args: Any, kwargs: Any
) -> Any:
    """The first call."""
    place(site, module)
    plan.call = call
    return forward(*args, **kwargs) if call is None else call(module, forward, args, kwargs)


def _read(found: Found) -> dict[str, list[Part]]:
    parts: dict[str, list[Part]] = {}
    for slot, active in found:
        for name in slot.parameters_read:
            parts.setdefault(name, []).append((slot.point, active))
    return parts


def _instead(site: Site, plan: Plan) -> Callable[..., Any] | None:
    """What runs in the place of the module's own forward."""
    if plan.read and site.plain is not None:
        return site.plain
    return site.seam.forward if (plan.attention or plan.attending) and site.seam is not None else None


def _around_unmerged(
    beneath: Callable[[nn.Module], nn.Module],
    call: Around | None,
    module: nn.Module,
    forward: Forward,
    args: Args,
    kwargs: Kwargs,
) -> Any:
    unmerged = beneath(module)
    base: Any = super(type(unmerged), unmerged)  # its class is that of an adapted module
    plain = base.forward
    return plain(*args, **kwargs) if call is None else call(unmerged, plain, args, kwargs)


def _reads_input(acting: object) -> bool:
    return getattr(acting, "reads_input", False)


def _kept(switch: Switch, slot: Slot) -> Callable[[], Tensor]:
    return lambda: switch.kept(slot.point.id)


def _keeping(switch: Switch, key: str, module: nn.Module, forward: Forward, args: Args, kwargs: Kwargs) -> Any:
    """An attention, with what it is called with kept while it runs."""
    switch.keep(key, first_argument(forward, args, kwargs)[0])
    try:
        return forward(*args, **kwargs)
    finally:
        switch.keep(key, None)


# -- weights ----------------------------------------------------------------------------------------------------------


def _side(switch: Switch, slot: Slot) -> Side:
    return lambda x: switch.side(x, slot.point.id, slot.repeats)


def _around_weights(site: Site, found: Found) -> list[Around]:
    whole = [one for one in found if one[0].point.span is None and one[0].point.in_span is None]
    parts = [one for one in found if one not in whole] if whole else found  # act on what the whole layer gives
    return [*_around_layer(site, whole, []), *_around_layer(site, parts, whole)]


def _around_layer(site: Site, found: Found, beneath: Found) -> list[Around]:
    if not found:
        return []
    point = found[0][0].point
    side = _side(site.switch, found[0][0])
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
    return [functools.partial(_around_added, adding, whole)]


def _around_added(
    adapter: Any, whole: Around, module: nn.Module, forward: Forward, args: Args, kwargs: Kwargs
) -> Tensor:
    """One adapter that only adds: of its base it needs the output alone. The usual case, and quick."""
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
    x = args[0]
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


# -- sequences --------------------------------------------------------------------------------------------------------


def _around_tokens(site: Site, found: Found) -> list[Around]:
    arounds: list[Around] = []
    for slot, active in sorted(found, key=lambda one: one[0].point.lengthens):
        if slot.point.lengthens:
            longer = functools.partial(_positions, site.switch, slot, flattened(active))
            arounds.append(functools.partial(_longer, site.lengthening, longer))
        else:
            arounds.append(functools.partial(_changed, active, _side(site.switch, slot)))
    return arounds


def _changed(active: Active, side: Side, module: nn.Module, forward: Forward, args: Args, kwargs: Kwargs) -> Any:
    """A module that makes a sequence, with the adapters that change it."""
    x, run = first_argument(forward, args, kwargs)
    return combine(x, Computed(run, x, side), active)


def _longer(
    lengthening: Lengthening | None,
    positions: Callable[[Tensor], tuple[Tensor, Tensor | None]],
    module: nn.Module,
    forward: Forward,
    args: Args,
    kwargs: Kwargs,
) -> Any:
    if lengthening is None:
        return with_behind(forward, positions, args, kwargs)
    return lengthening(module, forward, positions, args, kwargs)


def _positions(switch: Switch, slot: Slot, active: Active, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
    added, visible = gathered(active, _side(switch, slot), tokens)
    count = added.shape[1]
    switch.lengthened(slot.point.id, tokens.shape[1] + count, count)
    return added, visible


# -- outputs ----------------------------------------------------------------------------------------------------------


def _around_outputs(site: Site, found: Found) -> list[Around]:
    if not found:
        return []
    norms = {slot.point.id: site.norms[slot.point.id] for slot, _ in found}
    if found[0][0].point.is_block:
        return [functools.partial(_around_block, site, argument_names(site.base), *found[0])]
    return [functools.partial(_around_output, site.switch, norms, found)]


def _around_block(
    site: Site,
    names: Sequence[str],
    slot: Slot,
    active: Active,
    module: nn.Module,
    forward: Forward,
    args: Args,
    kwargs: Kwargs,
) -> Any:
    # A block takes its stream itself: checkpointing runs its forward again, but no hook of it.
    x = first_argument(forward, args, kwargs)[0]
    run = functools.partial(forward, *args, **kwargs)
    key = slot.point.id
    told = functools.partial(documents_told, module, names, args, kwargs, x, hides=slot.hides)
    base = BlockBase(x, run, *site.norms[key], _side(site.switch, slot), told=told)
    return base.returned(combine(x, base, active), site.entries, key)


def _around_output(
    switch: Switch,
    norms: Mapping[str, tuple[nn.Module | None, nn.Module | None]],
    found: Found,
    module: nn.Module,
    forward: Forward,
    args: Args,
    kwargs: Kwargs,
) -> Any:
    result = forward(*args, **kwargs)
    # Attention modules return (output, weights, ...): the sublayer's output is the first.
    output = result[0] if isinstance(result, tuple) else result
    for slot, active in found:
        x = switch.take(slot.point.id, output)
        # A mixture of experts may give its tokens in one row, [batch * length, features].
        shaped = output if output.shape == x.shape else output.view(x.shape)
        combined = combine(x, SublayerBase(x, shaped, *norms[slot.point.id], _side(switch, slot)), active)
        output = combined.view(output.shape)
    return (output, *result[1:]) if isinstance(result, tuple) else output


_AROUND = {"weight": _around_weights, "tokens": _around_tokens, "output": _around_outputs}
