"""A model's modules by every name that files have for them: its library's own, and those of the namings."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence

from adapterkit.naming import Naming, Piece
from adapterkit.plugins.manager import get_plugin_manager, instance_of
from adapterkit.view import ComponentView


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

    def find(self, name: str, *, flat: bool = False) -> Sequence[Piece] | None:
        """The modules of ours that a file calls by a name; None where it means none.

        Args:
            name: The dotted path, or, where it is `flat`, the path with `_` in the place of dots.
            flat: See `name`.
        """
        return (self._flat if flat else self._dotted).get(name)

    @functools.cached_property
    def _dotted(self) -> Mapping[str, Sequence[Piece]]:
        found: dict[str, Sequence[Piece]] = {path: (Piece(path),) for path in self._component.paths if path}
        for naming in self._namings:
            found = {**naming.modules(self._component), **found}
        return found

    @functools.cached_property
    def _flat(self) -> Mapping[str, Sequence[Piece]]:
        found: dict[str, Sequence[Piece]] = {}
        for name, pieces in self._dotted.items():
            found.setdefault(flattened(name), pieces)
        return found

    def written(self, *, scripts: bool = False) -> Iterator[tuple[str, Sequence[Piece]]]:
        """Every module of ours once, by the name that files have for it; ours where there is no other.

        Args:
            scripts: Whether kohya's scripts are to read it, which keep the library's names for some models.
        """
        taken: set[str] = set()
        for naming in self._namings:
            if not scripts or naming.in_scripts(self._component):
                for name, pieces in naming.modules(self._component).items():
                    if not any(piece.path in taken for piece in pieces):
                        taken.update(piece.path for piece in pieces)
                        yield name, pieces
        for path in self._component.paths:
            if path and path not in taken:
                yield path, (Piece(path),)


def flattened(path: str) -> str:
    """A path as one word."""
    return path.replace(".", "_")
