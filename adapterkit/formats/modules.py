"""The points of a model by module, and where the tensors of a foreign module act."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from adapterkit.contract.codec import Place, Rows
from adapterkit.contract.layouts import Span, WeightLayout
from adapterkit.contract.naming import Piece
from adapterkit.contract.view import ModelView
from adapterkit.points import ParameterPoint, Points, WeightPoint


@dataclass(frozen=True)
class Module:
    """A module that has a weight, with the points of that weight: several of a fused projection.

    Attributes:
        component, path: Where it is.
        parameter: The weight's name in it: `weight`, but for attentions and experts that keep several.
        points: In order of rows; the experts of a stack in order of the stack.
        fused: The point of the module itself, where `points` are its parts.
    """

    component: str
    path: str
    parameter: str
    points: tuple[ParameterPoint, ...]
    fused: ParameterPoint | None = None
    model: ModelView | None = field(default=None, compare=False, repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole weight as adapters see it, [out, in / groups, *kernel], or a norm's [features]."""
        first = self.points[0]
        rows = max(_end(point.span, point.out_features) for point in self.points)
        if len(first.shape) == 1:
            return (rows,)
        columns = max(_end(point.in_span, point.shape[1]) for point in self.points)
        return (rows, columns, *first.shape[2:])

    @property
    def stack(self) -> int:
        """See `Place`."""
        return max(-1 if point.layout.index is None else point.layout.index for point in self.points) + 1

    @property
    def places(self) -> list[Place]:
        """The module's points as tensors of the whole module see them."""
        return list(placed([(self, Piece(self.path))]))


def _end(span: Span | None, whole: int) -> int:
    return whole if span is None else span.start + span.size + (span.count - 1) * (span.step or 0)


class Modules:
    """The modules of a model by component and path.

    Args:
        points: The model's.
    """

    def __init__(self, points: Points) -> None:
        found: dict[tuple[str, str, str], list[ParameterPoint]] = {}
        for point in points:
            if isinstance(point, ParameterPoint):
                found.setdefault((point.model, point.path, point.layout.parameter), []).append(point)
        self.model = points.model
        self._all = {key: _module(key, own, points.model) for key, own in found.items()}
        self._by_path: dict[str, dict[str, list[Module]]] = {}
        for module in self._all.values():
            self._by_path.setdefault(module.component, {}).setdefault(module.path, []).append(module)

    def __iter__(self) -> Iterator[Module]:
        return iter(self._all.values())

    @property
    def components(self) -> Sequence[str]:
        """Those that have modules."""
        return list(self._by_path)

    def paths(self, component: str) -> Mapping[str, Sequence[Module]]:
        """Path -> the weights that the module there has: usually one."""
        return self._by_path.get(component, {})

    def of(self, point: ParameterPoint) -> Module:
        """The module of a point."""
        return self._all[point.model, point.path, point.layout.parameter]

    def placed(self, component: str, pieces: Sequence[Piece]) -> list[Place] | None:
        """Where the tensors of a foreign module act; None where the model lacks one of its pieces.

        Args:
            component: Which.
            pieces: See `Naming.modules`.
        """
        own = self.paths(component)
        found = [(own[piece.path][0], piece) for piece in pieces if len(own.get(piece.path, ())) == 1]
        return list(placed(found)) if found and len(found) == len(pieces) else None


def _module(key: tuple[str, str, str], points: Sequence[ParameterPoint], model: ModelView | None) -> Module:
    parts = tuple(point for point in points if point.span is not None)
    whole = [point for point in points if point.span is None and point.in_span is None]
    return Module(*key, parts, whole[0], model) if parts and whole else Module(*key, tuple(points), None, model)


def placed(pieces: Sequence[tuple[Module, Piece]]) -> Iterator[Place]:
    """The points of modules that are rows of one foreign module."""
    if len(pieces) == 1 and (plain := _plain(*pieces[0])) is not None:
        yield plain
        return
    shapes = [module.shape for module, _ in pieces]
    starts = list(_starts([piece for _, piece in pieces], [shape[0] for shape in shapes]))
    total = max(start + shape[0] for start, shape in zip(starts, shapes, strict=True))
    whole = (total, *shapes[0][1:])
    for (module, piece), start, shape in zip(pieces, starts, shapes, strict=True):
        for point in module.points:
            rows = _rows(point, piece, start, shape[0])
            if _covers(rows, total):
                rows = None
            columns = None if point.in_span is None else _of(point.in_span)
            fused = module.fused if len(pieces) == 1 else None
            yield Place(point, whole, rows, columns, module.model, module.stack, fused=fused)


def _plain(module: Module, piece: Piece) -> Place | None:
    """The place of a module that is one point, as most are."""
    point = module.points[0]
    parted = len(module.points) > 1 or point.span is not None or point.in_span is not None
    if parted or piece.rows is not None or piece.halves_swapped or len(point.shape) == 1:
        return None
    return Place(point, point.shape, None, None, module.model, module.stack, fused=module.fused)


def _starts(pieces: Sequence[Piece], sizes: Sequence[int]) -> Iterator[int]:
    at = 0
    for piece, size in zip(pieces, sizes, strict=True):
        at = at if piece.rows is None else piece.rows[0]
        yield at
        at += size


def _rows(point: ParameterPoint, piece: Piece, start: int, size: int) -> Rows:
    rows = slice(0, size) if point.span is None else _of(point.span)
    if piece.halves_swapped:
        chosen = range(size)[rows] if isinstance(rows, slice) else rows
        return [start + (row + size // 2) % size for row in chosen]
    if isinstance(rows, slice):
        return slice(start + rows.start, start + rows.stop)
    return [start + row for row in rows]


def _covers(rows: Rows, total: int) -> bool:
    return isinstance(rows, slice) and (rows.start, rows.stop) == (0, total)


def _of(span: Span) -> Rows:
    if span.count == 1:
        return slice(span.start, span.start + span.size)
    step = span.step or 0
    return [span.start + group * step + row for group in range(span.count) for row in range(span.size)]


def made_up(component: str, name: str, shape: Sequence[int]) -> Place:
    """A place for a module of a file, where no model is at hand.

    Args:
        component, name: What the file calls them; they are the point's component, path and site.
        shape: [out, in / groups, *kernel].
    """
    out, width, *kernel = (*shape, 1) if len(shape) == 1 else shape
    ones = (1,) * len(kernel)
    layout = WeightLayout("conv", True, tuple(kernel), ones, (0,) * len(kernel), ones) if kernel else _LINEAR
    role = MADE_UP[bool(kernel)]
    return Place(WeightPoint(role, name, name, width, out, layout, tags={"component": component}), tuple(shape))


MADE_UP = ("linear", "conv")
"""The roles of points that are made up."""
_LINEAR = WeightLayout("linear", bias=True)
