"""What one adapted module does under one selection: everything that depends on these two alone, computed once.

A plan holds no tensor: it is right whatever the model's and the adapters' parameters become.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adapterkit.backend import Lengthening, Positions
from adapterkit.engine.around_weights import around_weights
from adapterkit.engine.bases import Computed, SublayerBase
from adapterkit.engine.blocks import BlockBase, argument_names, documents_told
from adapterkit.engine.context import Side
from adapterkit.engine.expressions import flattened
from adapterkit.engine.first_call import place
from adapterkit.engine.folding import Part
from adapterkit.engine.lengthening import Gathered, counts_of, with_behind
from adapterkit.engine.nesting import Args, Around, Forward, Kwargs, first_argument, nested
from adapterkit.engine.recomputing import remembered
from adapterkit.engine.selection import Selection
from adapterkit.engine.slots import Found, Slot, side_of
from adapterkit.engine.switch import Switch
from adapterkit.errors import StateError
from adapterkit.kernels.sums import Active, combine

if TYPE_CHECKING:
    from adapterkit.engine.site import Site

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
        counts: Of what is put in front: `AdapterModule.front`, and whether any is `padded`; None for nothing.
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
            (side_of(site.switch, slot), _kept(site.switch, slot) if slot.point.id in reading else None, active)
            for slot, active in flat
            if active
        ]
        beside = [(slot, slot.attending(selection)) for slot, _ in attention]
        self.attending = [(side_of(site.switch, slot), active) for slot, active in beside if active]
        longer = [one for slot, active in found if slot.point.lengthens for one, _ in flattened(active)]
        acting = [one for *_, active in [*self.attention, *self.attending] for one, _ in active]
        self.counts = counts_of([*acting, *longer])
        self.lengthening = {
            slot.point.id: Gathered(flattened(active), side_of(site.switch, slot))
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


# -- sequences --------------------------------------------------------------------------------------------------------


def _around_tokens(site: Site, found: Found) -> list[Around]:
    arounds: list[Around] = []
    for slot, active in sorted(found, key=lambda one: one[0].point.lengthens):
        if slot.point.lengthens:
            told = functools.partial(_told, site.switch, slot.point.id)
            longer = Gathered(flattened(active), side_of(site.switch, slot), told)
            arounds.append(functools.partial(_longer, site.lengthening, longer))
        else:
            arounds.append(functools.partial(_changed, active, side_of(site.switch, slot)))
    return arounds


def _changed(active: Active, side: Side, module: nn.Module, forward: Forward, args: Args, kwargs: Kwargs) -> Any:
    """A module that makes a sequence, with the adapters that change it."""
    x, run = first_argument(forward, args, kwargs)
    return combine(x, Computed(run, x, side), active)


def _longer(
    lengthening: Lengthening | None,
    positions: Positions,
    module: nn.Module,
    forward: Forward,
    args: Args,
    kwargs: Kwargs,
) -> Any:
    if lengthening is None:
        return with_behind(forward, positions, args, kwargs)
    return lengthening(module, forward, positions, args, kwargs)


def _told(switch: Switch, key: str, length: int, count: int) -> None:
    switch.lengthened(key, length + count, count)


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
    base = BlockBase(x, run, *site.norms[key], side_of(site.switch, slot), told=told)
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
        if first := slot.point.channels_first:
            x, shaped = x.movedim(1, -1), shaped.movedim(1, -1)
        base = SublayerBase(x, shaped, *norms[slot.point.id], side_of(switch, slot), channels_first=first)
        combined = combine(x, base, active)
        output = combined.movedim(-1, 1) if first else combined.view(output.shape)
    return (output, *result[1:]) if isinstance(result, tuple) else output


_AROUND = {"weight": around_weights, "tokens": _around_tokens, "output": _around_outputs}
