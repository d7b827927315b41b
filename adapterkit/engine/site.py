"""What is kept at one adapted module, and how the module asks it in a forward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from adapterkit.backend import AttentionSeam, Lengthening, PlainForward
from adapterkit.contract.layer import LayerHandler
from adapterkit.engine.attending import Attended, Projections
from adapterkit.engine.attention import extend_all
from adapterkit.engine.folding import Part, check_bias, fold
from adapterkit.engine.plan import Plan
from adapterkit.engine.read_weights import ReadWeight, StackedWeight
from adapterkit.engine.selection import Selection
from adapterkit.engine.slots import Slots
from adapterkit.engine.switch import Switch
from adapterkit.kernels.sums import Active, combine
from adapterkit.kernels.weights import canonical, stored_weight
from adapterkit.points import AttentionPoint, ParameterPoint, WeightLayout

_NOTHING = frozenset[str]()
_KEPT = 8  # plans: threads, and requests in turn, have selections of their own


class Removable(Protocol):
    """What was put at a module, and can be taken off it: a hook."""

    def remove(self) -> None:
        """Takes it off."""
        ...


@dataclass
class Site:
    """What acts at one adapted module. Kept in the module's `__dict__`, so it is copied and pickled along."""

    switch: Switch
    base: type[nn.Module] = nn.Module
    slots: Slots = field(init=False)
    norms: dict[str, tuple[nn.Module | None, nn.Module | None]] = field(default_factory=dict)
    hooks: dict[str, list[Removable]] = field(default_factory=dict)
    seam: AttentionSeam | None = None
    seam_saved: object = None
    plain: PlainForward | None = None
    lengthening: Lengthening | None = None
    entries: dict[str, int] = field(default_factory=dict)
    projections: Projections | None = None
    handler: LayerHandler | None = None
    own_forward: Any = None
    placed: bool = False
    seen: bool = False
    beneath: Callable[[nn.Module], nn.Module] | None = None
    plans: dict[Selection, Plan] = field(default_factory=dict, repr=False, compare=False)
    training: InitVar[bool] = True

    def __post_init__(self, training: bool) -> None:
        self.slots = Slots(self, training=training)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "plans": {}}

    @property
    def plan(self) -> Plan | None:
        """What is done here now; None where nothing acts anywhere."""
        selection = self.switch.current
        if selection.idle:
            return None
        plan = None if is_dynamo_compiling() else self.plans.get(selection)  # without another call, where it is kept
        return self._planned(selection) if plan is None else plan

    def _planned(self, selection: Selection) -> Plan:
        # A trace must not look at what was kept: it would guard it. What was computed is not kept: it has a graph.
        if is_dynamo_compiling() or selection.computed:
            return Plan(self, selection)
        plans = self.plans
        plan = plans.get(selection)
        if plan is None:
            plan = Plan(self, selection)
            for old in list(plans)[: max(0, len(plans) - _KEPT + 1)]:
                plans.pop(old, None)
            plans[selection] = plan
        return plan

    def changed(self) -> None:
        """Drops the plans: what they were made of is another now. One that is being made goes with them."""
        self.plans, self.placed = {}, False

    def active(self, key: str) -> Active:
        """What acts now at one of the points."""
        plan = self.plan
        return () if plan is None else plan.active.get(key, ())

    @property
    def read(self) -> frozenset[str]:
        """Names of the parameters that the model reads and that adapters act in."""
        found = [slot.parameters_read for slot in self.slots if slot.parameters_read]
        return frozenset(name for names in found for name in names) if found else _NOTHING

    def call(
        self, module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The adapted module's forward. With nothing active it is the module's own forward and nothing else."""
        # `Switch.current` and `plan` without other calls: every module of a forward asks.
        switch, traced = self.switch, is_dynamo_compiling()
        usual = not traced and switch.plain and not switch.scopes.views
        selection = switch.default if usual else switch.current
        if selection.idle:
            return forward(*args, **kwargs)
        plan = None if traced else self.plans.get(selection)
        planned = (self._planned(selection) if plan is None else plan).call
        return forward(*args, **kwargs) if planned is None else planned(module, forward, args, kwargs)

    def extend(
        self, keys: Tensor, values: Tensor, mask: Tensor | None, *, queries: int, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        plan = self.plan
        for side, given, active in () if plan is None else plan.attention:
            # Once there is a mask it is kept, so that `causal` is told to the first alone.
            keys, values, mask = extend_all(keys, values, mask, active, side, given, queries=queries, causal=causal)
        return keys, values, mask

    @property
    def kv_heads(self) -> int:
        return next((slot.point.layout.kv_heads for slot in self.slots if isinstance(slot.point, AttentionPoint)), 0)

    @property
    def counted(self) -> bool:
        plan = self.plan
        return plan is not None and any(getattr(one, "counted", False) for *_, act in plan.attention for one, _ in act)

    @property
    def padded(self) -> bool:
        plan = self.plan
        return plan is not None and plan.counts is not None and plan.counts[1]

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, output: Tensor, *, scale: float | None = None
    ) -> Tensor:
        plan = self.plan
        for side, active in () if plan is None else plan.attending:
            base = Attended(query, keys, values, output, scale, self.switch, side, self.projections)
            output = combine(query, base, active)
        return output

    def parameter(self, module: nn.Module, name: str) -> Any:
        """What the model gets when it reads a parameter: the parameter, or what the active adapters make of it."""
        plan = self.plan
        if plan is None or plan.reads_own:
            own = module.__dict__["_parameters"].get(name)
            if own is not None:
                return own  # the usual case, and quick
        parts = () if plan is None else plan.read.get(name, ())
        if plan is not None and plan.beneath is not None and name in module._parameters:
            module = plan.beneath(module)
        inside = self.switch.inside
        if parts and not inside and torch.is_grad_enabled() and not is_dynamo_compiling():
            self.seen = True
        return read_parameter(module, name, parts, inside=inside)

    def parts(self, name: str) -> Sequence[Part]:
        """What acts now in a parameter that the model reads."""
        plan = self.plan
        return () if plan is None else plan.read.get(name, ())


def read_parameter(module: nn.Module, name: str, parts: Sequence[Part], *, inside: bool) -> Any:
    """What the model gets when it reads a parameter in which adapters act.

    Args:
        module: The module that has it.
        name: Its name.
        parts: What acts in it.
        inside: Whether this thread is inside the forward of a module that may read weights.
    """
    if name not in module._parameters:  # weight_norm was applied after the adapter
        return module.__dict__[name] if name in module.__dict__ else module.__getattr__(name)
    own = module._parameters[name]
    if not parts or own is None:
        return own
    point = parts[0][0]
    if not isinstance(point, ParameterPoint):
        return own
    if not inside and hasattr(own, "device_mesh"):  # fully_shard looks at what it has put away
        return own
    layout = point.layout
    away = own.is_meta or layout.access == "any"
    if away and _is_apart(own, parts):  # an offload hook looks at a weight that is not here, or puts it away
        return own
    weight, bias = stored_weight(module, layout)
    if layout.index is not None:
        return _stacked(own, weight, bias, parts, is_bias=name != layout.parameter)
    folded = functools.partial(_folded, weight, bias, parts, layout, is_bias=name != layout.parameter)
    if layout.access == "any":
        if not inside:  # the user looks at the base's weight
            return own
        if not is_dynamo_compiling():  # a trace forgets what is unused, and knows no such stand-in
            return ReadWeight.of(own, folded, _learning(own, parts) if torch.is_grad_enabled() else ())
    return folded()


def _stacked(
    own: Tensor, weight: Tensor | None, bias: Tensor | None, parts: Sequence[Part], *, is_bias: bool
) -> StackedWeight:
    by_index: dict[int, list[Part]] = {}
    for point, active in parts:
        if isinstance(point, ParameterPoint) and point.layout.index is not None:
            by_index.setdefault(point.layout.index, []).append((point, active))
    return StackedWeight(own, by_index, weight if is_bias else bias, is_bias=is_bias)


def _is_apart(own: Tensor, parts: Sequence[Part]) -> bool:
    """Whether either a weight or the adapters in it have no values now."""
    adapters = (adapter for _, active in parts for adapter, _ in active)
    theirs = [parameter.is_meta for adapter in adapters for parameter in adapter.parameters()]
    return (not own.is_meta) in theirs or (own.is_meta and not theirs)


def _learning(own: Tensor, parts: Sequence[Part]) -> list[Tensor]:
    adapters = {id(p): p for _, active in parts for adapter, _ in active for p in adapter.parameters()}
    return [parameter for parameter in (own, *adapters.values()) if parameter.requires_grad]


def _folded(
    weight: Tensor | None,
    bias: Tensor | None,
    parts: Sequence[Part],
    layout: WeightLayout,
    *,
    is_bias: bool,
) -> Any:
    folded, folded_bias = fold(canonical(weight, layout), bias, parts)  # type: ignore[arg-type]
    check_bias(bias, folded_bias, parts)
    return folded_bias if is_bias else canonical(folded, layout).contiguous()
