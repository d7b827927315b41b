"""Tables of names: a foreign module, and the modules of ours that are its rows, for every block at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import ClassVar

from adapterkit.contract.naming import KnownBase, Naming, Piece
from adapterkit.contract.view import ComponentView

Row = tuple[str, str]
"""A foreign module, and ours, several with spaces between. `#` is a block's number, the same on both sides. In front of
a module of ours, `~` says that its halves are swapped, and `?` that it is only there where the row applies. Of several
rows with one foreign module the first that applies counts."""


class TableNaming(Naming):
    """A naming that is a table.

    Attributes:
        table: Its rows. What keeps its name needs none.
        known: See `Naming.base`.
    """

    table: ClassVar[tuple[Row, ...]]
    known: ClassVar[KnownBase | None] = None

    def modules(self, component: ComponentView) -> Mapping[str, Sequence[Piece]]:
        return expanded(self.table, component.paths)

    def base(self, component: ComponentView) -> KnownBase | None:
        return self.known


def under(foreign: str, own: str, rows: Iterable[Row]) -> tuple[Row, ...]:
    """Rows of a block with the block's own names in front.

    Args:
        foreign: What others call the block: `double_blocks.#.`.
        own: What we do: `transformer_blocks.#.`.
        rows: What is in it.
    """
    return tuple((f"{foreign}{theirs}", " ".join(_below(own, name) for name in ours.split())) for theirs, ours in rows)


def _below(own: str, name: str) -> str:
    mark = name[0] if name[0] in "~?" else ""
    return f"{mark}{own}{name[len(mark) :]}"


def expanded(rows: Iterable[Row], paths: Sequence[str]) -> dict[str, list[Piece]]:
    """The rows for a model: one for each block that has all of a row's modules.

    Args:
        rows: The table.
        paths: The model's modules.
    """
    present, numbers = frozenset(paths), _numbers(paths)
    found: dict[str, list[Piece]] = {}
    for foreign, own in rows:
        names = own.split()
        start, block, _ = names[0].lstrip("~?").partition("#")
        for number in numbers.get(start, ()) if block else ("",):
            here = [name.replace("#", number) for name in names]
            if all(name.lstrip("~?") in present for name in here):
                pieces = [Piece(name.lstrip("~"), name[0] == "~") for name in here if name[0] != "?"]
                found.setdefault(foreign.replace("#", number), pieces)
    return found


def _numbers(paths: Iterable[str]) -> Mapping[str, Sequence[str]]:
    """The numbers that follow each beginning of a path."""
    found: dict[str, dict[str, None]] = {}
    for path in paths:
        for start, number in _numbered(path):
            found.setdefault(start, {})[number] = None
    return {start: list(numbers) for start, numbers in found.items()}


def _numbered(path: str) -> Iterator[tuple[str, str]]:
    start = ""
    for part in path.split("."):
        if part.isdigit():
            yield start, part
        start = f"{start}{part}."
