"""Why an adapter cannot be attached at a point: asked for all points before anything is changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import nn

from adapterkit.adapter import AdapterModule
from adapterkit.backend import AttentionSeam, Reach
from adapterkit.engine import attach
from adapterkit.engine.attach import Spot
from adapterkit.engine.site import Site
from adapterkit.engine.switch import Switch
from adapterkit.mapping.layouts import module_at
from adapterkit.mapping.model import MappedModel
from adapterkit.points import AttentionPoint, InjectionPoint


def spot_of(mapped: MappedModel, point: InjectionPoint, adapter: AdapterModule) -> Spot:
    """Where an adapter is put, and how it acts there."""
    reach, root = mapped.reach(point), mapped.root(point)
    if isinstance(point, AttentionPoint) and adapter.abilities.attend:
        reach = dataclasses.replace(reach, projections=mapped.projections(point))
    return Spot(point, root, module_at(root, point.path), adapter, reach)


def refusal(spot: Spot, switch: Switch) -> str | None:
    """Why it cannot act there beside what is there, or None.

    Args:
        spot: Where, and what.
        switch: Of the state that would have it: other switches are other handles'.
    """
    point, reach = spot.point, spot.reach
    if point.lengthens and point.layout.until is None and reach.lengthening is None:
        return "its backend says that the sequence can be made longer, but gives no `lengthening`, nor `until`"
    sites = attach.sites_of(spot.module)
    others = [site for site in sites if site.switch is not switch]
    if others and (told := _unshared(others, point, reach)):
        return f"adapters of another handle, on a model that shares this part, are there, and {told}"
    for told in [attach.attached_with(site, point) for site in sites if site.switch is switch]:
        if told is not None and told is not point and _cut(told) != _cut(point):
            return "it was resized after adapters had been attached to it; remove those first"
    unreached = None if reach.seam is None else _unreached(reach.seam, spot.module, spot.adapter)
    return attach.refusal(spot.root, point.path, spot.module) or unreached


def _unshared(others: Sequence[Site], point: InjectionPoint, reach: Reach) -> str | None:
    """Why a module cannot have an adapter beside those of other handles."""
    if any(site.switch.folded for site in others):
        return "their weights are merged; unmerge() by that handle first"
    if point.lengthens and any(slot.point.lengthens for site in others for slot in site.slots):
        return "make its sequence longer too; use one handle for both"
    seams = {type(site.seam) for site in others if site.seam is not None}
    if reach.seam is not None and seams - {type(reach.seam)}:
        return "reach its attention in another way; use one handle for both"
    return None


def _unreached(seam: AttentionSeam, module: nn.Module, adapter: AdapterModule) -> str | None:
    """Why a seam cannot do at a module what the adapter does with an attention."""
    return (seam.refusal(module) if adapter.abilities.extend else None) or (
        seam.attend_refusal(module) if adapter.abilities.attend else None
    )


def _cut(point: InjectionPoint) -> tuple[object, ...]:
    return (point.span, point.in_span, point.shape)
