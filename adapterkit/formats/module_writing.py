"""What is written for each module of an adapter, by the names that a format has for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor

from adapterkit.checkpoint import Checkpoint
from adapterkit.codec import Context, Place, Said
from adapterkit.errors import CheckpointError
from adapterkit.formats.dialect import Dialect, written_modules
from adapterkit.formats.foreign_names import ForeignNames
from adapterkit.formats.modules import Modules
from adapterkit.formats.parts import said_of
from adapterkit.formats.pipeline_parts import part_of
from adapterkit.points import Points
from adapterkit.view import ComponentView

Naming = Callable[[ComponentView, str], Callable[[str], str]]
"""From a component and the part that it is to how the file calls a module of it, which has a foreign name."""


def written(
    checkpoint: Checkpoint, points: Points, dialect: Dialect, context: Context, naming: Naming, *, scripts: bool = False
) -> dict[str, dict[str, Tensor]]:
    """Module as the file calls it -> tensor name -> tensor.

    Args:
        checkpoint: The adapter.
        points: The model's, with the model.
        dialect, context: How it is written.
        naming: What modules are called.
        scripts: See `ForeignNames.written`.

    Raises:
        CheckpointError: Something of it cannot be said; the message tells what can.
    """
    said = said_of(checkpoint)
    places = list(_places(said, points, naming, scripts, context))
    covered = {place.point.id for _, own in places for place in own}
    if left := [point for point in said if point not in covered]:
        told = f"{len(left)} points belong to no module that this format has a name for: {', '.join(left[:3])}"
        raise CheckpointError(f"{told}; native holds any", context.where, left[0])
    return {name: dialect.write(name, touched, context) for name, touched in written_modules(said, places)}


def _places(
    said: Mapping[str, Sequence[Said]], points: Points, naming: Naming, scripts: bool, context: Context
) -> Iterator[tuple[str, Sequence[Place]]]:
    modules = Modules(points)
    components = {} if points.model is None else points.model.components
    for name in modules.components:
        touched = {module.path for module in modules if module.component == name and _any(module.points, said)}
        if not touched:
            continue
        called = naming(components[name], part_of(components[name], components))
        for foreign, pieces in ForeignNames(components[name]).written(scripts=scripts):
            if any(piece.path in touched for piece in pieces):
                yield called(foreign), modules.placed(name, pieces) or ()


def _any(points: Sequence[object], said: Mapping[str, object]) -> bool:
    return any(getattr(point, "id", None) in said for point in points)
