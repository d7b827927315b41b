"""Models inside a model: what their own backends say of them, as it is seen from the model around."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from adapterkit.backend import Reach
from adapterkit.errors import PluginError
from adapterkit.mapping.layouts import first_path, joined
from adapterkit.mapping.structure import named_base_modules
from adapterkit.points import InjectionPoint, OutputPoint, Tag, TokensPoint

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_TOWERS = {"text_encoder": "text"}


def tower_of(name: str) -> str:
    """What the tag `tower` says of a part, where its component has another name."""
    return _TOWERS.get(name, name)


@dataclass(frozen=True)
class Inside:
    """Where a part is, and what its points have that those of the same model alone have not.

    Attributes:
        path: Of the part in the model.
        tags: Further tags.
        site: The first word of its points' sites; empty for sites as they are in the model alone.
    """

    path: str = ""
    tags: Mapping[str, Tag] = field(default_factory=dict[str, Tag])
    site: str = ""

    def seen(self, point: InjectionPoint) -> InjectionPoint:
        """A point of the part, as a point of the model around."""
        if not self.path:
            return point
        layout = _moved(point, functools.partial(joined, self.path))
        # What tells its tower itself is beside others inside the part.
        first = "" if "tower" in point.tags else self.site
        site = ".".join(word for word in (first, point.site) if word)
        tags = {**self.tags, **point.tags}
        return replace(point, path=joined(self.path, point.path), site=site, layout=layout, tags=tags)

    def alone(self, point: InjectionPoint) -> InjectionPoint:
        """A point of the model around, with the paths that it has in the part."""
        if not self.path:
            return point
        layout = _moved(point, self.inner)
        return replace(point, path=self.inner(point.path), layout=layout)

    def inner(self, path: str) -> str:
        """A path of the model around, from the part."""
        return path[len(self.path) + 1 :] if self.path else path

    def reach(self, reach: Reach) -> Reach:
        """How adapters act at a point of the part, with paths from the model around."""
        if not self.path:
            return reach
        attending, counting, reading = (
            {joined(self.path, path): how for path, how in told.items()}
            for told in (reach.attending, reach.counting, reach.reading)
        )
        return replace(reach, attending=attending, counting=counting, reading=reading)  # type: ignore[arg-type]


ITSELF = Inside()
"""Where a model is that is no part."""


def _moved(point: InjectionPoint, move: Any) -> Any:
    """A point's layout with its paths moved."""
    layout: Any = point.layout
    if isinstance(point, OutputPoint):
        norms = {name: move(path) for name in ("norm_in", "norm_out") if (path := getattr(layout, name)) is not None}
        return replace(layout, residual=move(layout.residual), **norms)
    if isinstance(point, TokensPoint):
        paths = {name: move(path) for name in ("until", "whole") if (path := getattr(layout, name)) is not None}
        return replace(layout, **paths) if paths else layout
    return layout


def is_inside(path: str, parts: Iterable[str]) -> bool:
    """Whether a path is that of one of these modules, or below it."""
    return any(path == part or path.startswith(f"{part}.") for part in parts)


def in_order(points: Sequence[InjectionPoint], model: nn.Module) -> list[InjectionPoint]:
    """The same points in the order of the model's modules."""
    order = {path: number for number, (path, _) in enumerate(named_base_modules(model, repeated=True))}
    return sorted(points, key=lambda point: order[point.path])


def checked_parts(found: object, model: nn.Module) -> Mapping[str, str]:
    """What `Backend.parts` has returned, if it is what it must be.

    Raises:
        PluginError: It is no mapping, or something in it is no name, no module, or inside another part.
    """
    if not isinstance(found, Mapping):
        raise PluginError(f"returned {found!r:.80}; expected a mapping, name -> path")
    for name, path in found.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise PluginError(f"returned the name {name!r:.80}; expected a word of a-z, 0-9 and _, such as vision")
        if not isinstance(path, str) or not path or first_path(model, path) is None:
            raise PluginError(f"returned {path!r:.80} for {name!r}, where the model has no module")
        if is_inside(path, (other for key, other in found.items() if key != name)):
            raise PluginError(f"returned {path!r:.80} for {name!r}, which is inside another part")
    return found
