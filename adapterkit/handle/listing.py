"""The injection points of a model, before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping

from adapterkit.adapter import AdapterConfig
from adapterkit.errors import ConfigError, IncompatibleTargetError, shown
from adapterkit.handle import building
from adapterkit.mapping.model import map_model
from adapterkit.points import Points
from adapterkit.selectors import Selector


def points(
    model: object,
    selector: str | None = None,
    *,
    adapter: AdapterConfig | None = None,
    backend: str | None = None,
    roles: Mapping[str, str] | None = None,
) -> Points:
    """The injection points of a model or pipeline. Changes nothing.

    Args:
        model: A torch module or a diffusers pipeline.
        selector: Which points; all of them by default.
        adapter: Only points where this config can act (by default where it would), with the parameters it would add.
        backend: A backend's name, to override the match by class.
        roles: What layers are, by globs of their paths: `{"attn.q": "layers.*.query"}`. It adds to what the backend
            says, and overrides it.

    Raises:
        UnsupportedModelError: No backend knows the model.
        TargetNotFoundError: The selector, or a glob in `roles`, matches nothing.
        AttachError: Another library has replaced modules in the model.
    """
    if adapter is not None and not isinstance(adapter, AdapterConfig):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError([f"adapter must be a config such as LoRA(rank=8), not {shown(adapter)}"], "points()")
    mapped = map_model(model, backend, roles)
    found = mapped.points()
    if adapter is not None and selector is None:
        found = Points(adapter.choose(found, mapped.label))
    elif selector is not None:
        found = Points(Selector(selector).select(found, mapped.label))
    if adapter is None:
        return found
    usable = [point for point in found if point.kind in adapter.kinds and adapter.at(point).accepts(point) is None]
    if not usable:
        raise IncompatibleTargetError(
            f"{type(adapter).__name__} can act at none of the {len(found)} points that {selector!r} selects; "
            f"it acts at {'/'.join(sorted(adapter.kinds))} points"
        )
    return Points(usable, building.count_parameters(adapter, usable))


def remarks(model: object, *, backend: str | None = None) -> Mapping[str, str]:
    """Why modules have no more points: their attention is linear, two structures fit them, ... Changes nothing.

    Args:
        model, backend: As in `points`.

    Returns:
        `component.path` of a module -> the reason.
    """
    return map_model(model, backend).remarks()
