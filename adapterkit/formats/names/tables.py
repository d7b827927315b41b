"""Tables of names: a foreign module, and the modules of ours that are its rows, for every block at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from adapterkit.naming import Piece

Row = tuple[str, str]
"""A foreign module, and ours, several with spaces between. `#` is a block's number, and the same on both sides; `~` in
front of a module says that its halves are swapped."""


def under(foreign: str, own: str, rows: Iterable[Row]) -> tuple[Row, ...]:
    """Rows of a block with the block's own names in front.

    Args:
        foreign: What others call the block: `double_blocks.#.`.
        own: What we do: `transformer_blocks.#.`.
        rows: What is in it.
    """
    return tuple((f"{foreign}{theirs}", " ".join(_below(own, name) for name in ours.split())) for theirs, ours in rows)


def _below(own: str, name: str) -> str:
    return f"~{own}{name[1:]}" if name.startswith("~") else f"{own}{name}"


def expanded(rows: Iterable[Row], paths: Sequence[str]) -> dict[str, list[Piece]]:
    """The rows for a model: one for each block that has all of a row's modules.

    Args:
        rows: The table.
        paths: The model's modules.
    """
    present = frozenset(paths)
    numbers = _numbers(paths)
    found: dict[str, list[Piece]] = {}
    for foreign, own in rows:
        pieces = [Piece(name.removeprefix("~"), name.startswith("~")) for name in own.split()]
        for number in numbers.get(pieces[0].path.partition("#")[0], ()) if "#" in own else ("",):
            here = [Piece(piece.path.replace("#", number), piece.halves_swapped) for piece in pieces]
            if all(piece.path in present for piece in here):
                found.setdefault(foreign.replace("#", number), here)
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
