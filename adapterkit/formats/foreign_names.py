"""A model's modules by every name that files have for them: its library's own, and those of the namings."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence

from adapterkit.contract.naming import KnownBase, Naming, Piece
from adapterkit.contract.view import ComponentView
from adapterkit.plugins.manager import get_plugin_manager, instance_of
from adapterkit.points import Points

_Table = Mapping[str, Sequence[Piece]]


class ForeignNames:
    """The names of one component's modules.

    Args:
        component: The model.

    Raises:
        PluginError: A naming for it is broken; the message names it.
    """

    def __init__(self, component: ComponentView) -> None:
        specs = get_plugin_manager().namings().values()
        self._component = component
        self._namings = [instance_of(spec, Naming) for spec in specs if {*spec.models} & {*component.classes}]

    def find(self, name: str, *, flat: bool = False, original: bool = True) -> Sequence[Piece] | None:
        """The modules of ours that a file calls by a name; None where it means none.

        Args:
            name: The dotted path, or, where it is `flat`, the path with `_` in the place of dots.
            flat: See `name`.
            original: Whether a name that several have is that of the original checkpoint, and not the library's.
        """
        wrapped = "model_" if flat else "model."  # language models are files' with their head, or without
        for table in (self._foreign, self._own) if original else (self._own, self._foreign):
            for known in (name, f"{wrapped}{name}", name.removeprefix(wrapped)):
                if (pieces := table[flat].get(known)) is not None:
                    return pieces
        return None

    @functools.cached_property
    def _own(self) -> tuple[_Table, _Table]:
        return _both({path: (Piece(path),) for path in self._component.paths if path})

    @functools.cached_property
    def _foreign(self) -> tuple[_Table, _Table]:
        found: dict[str, Sequence[Piece]] = {}
        for naming in self._namings:
            found = {**naming.modules(self._component), **found}
        return _both(found)

    @property
    def base(self) -> KnownBase | None:
        """What files call the base of such a model."""
        return next((known for naming in self._namings if (known := naming.base(self._component))), None)

    def written(self, style: str) -> Iterator[tuple[str, Sequence[Piece]]]:
        """Every module of ours once, by the name that files have for it; ours where there is no other.

        Args:
            style: See `Naming.in_files`.
        """
        taken: set[str] = set()
        for naming in self._namings:
            if naming.in_files(self._component, style):
                for name, pieces in naming.modules(self._component).items():
                    if not any(piece.path in taken for piece in pieces):
                        taken.update(piece.path for piece in pieces)
                        yield name, pieces
        for path in self._component.paths:
            if path and path not in taken:
                yield path, (Piece(path),)


def _both(dotted: _Table) -> tuple[_Table, _Table]:
    """The names as they are, and flat; of two that are one when they are flat, the first."""
    flat: dict[str, Sequence[Piece]] = {}
    for name, pieces in dotted.items():
        flat.setdefault(flattened(name), pieces)
    return dotted, flat


def flattened(path: str) -> str:
    """A path as one word."""
    return path.replace(".", "_")


def known_base(points: Points) -> KnownBase | None:
    """What files call the base of the model that points are of."""
    components = {} if points.model is None else points.model.components
    return next((base for one in components.values() if (base := ForeignNames(one).base) is not None), None)
