"""What is written for each module of an adapter, by the names that a format has for them."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from adapterkit.checkpoint import Checkpoint
from adapterkit.contract.codec import Context, Place, Said
from adapterkit.contract.view import ComponentView
from adapterkit.errors import CheckpointError
from adapterkit.formats.approximate import AsLoRA
from adapterkit.formats.dialect import Dialect, written_modules
from adapterkit.formats.foreign_names import ForeignNames
from adapterkit.formats.modules import MADE_UP, Modules
from adapterkit.formats.parts import said_of, shared_of
from adapterkit.formats.pipeline_parts import part_of
from adapterkit.formats.prefixes import prefix_of
from adapterkit.points import Points, WeightPoint

Tensors = Mapping[str, Mapping[str, Tensor]]
"""Module as a file calls it -> tensor name -> tensor."""
ModuleNames = Callable[[ComponentView, str], Callable[[str], str]]
"""From a component and the part that it is to how the file calls a module of it, which has a foreign name."""
LORA_UP, _ALPHA = "lora_up.weight", "alpha"


class Writing:
    """An adapter on its way into a file.

    Args:
        checkpoint: The adapter.
        points: The model's, with the model.
        dialect, context: How it is written.
        rank: Of what is approximated.
    """

    def __init__(
        self, checkpoint: Checkpoint, points: Points, dialect: Dialect, context: Context, rank: int | None = None
    ) -> None:
        self._said, self._points = said_of(checkpoint), points
        self._dialect, self._context = dialect, context
        context.shared.update(shared_of(checkpoint))
        self._as_lora = AsLoRA(checkpoint, points, context.where, rank)

    @property
    def error(self) -> float:
        """That of what was approximated so far; see `WriteReport`."""
        return self._as_lora.error

    def modules(self, naming: ModuleNames, style: str) -> Tensors:
        """What is written.

        Args:
            naming: What modules are called.
            style: See `Naming.in_files`.

        Raises:
            CheckpointError: Something of it cannot be said; the message tells what can.
        """
        places = list(self._places(naming, style))
        self._check_covered(places)
        return {name: self._written(name, touched) for name, touched in written_modules(self._said, places)}

    def made_up(self, separator: str) -> Tensors:
        """What is written where no model is at hand: modules have the names of the file that the adapter is from.

        Args:
            separator: What stands between a point's component, which is the file's prefix, and the module.

        Raises:
            CheckpointError: The points are a model's, which alone could name its modules; or as for `modules`.
        """
        said = [point for point in self._points if point.id in self._said and point.role in MADE_UP]
        prefixes = {point.model: prefix_of(f"{point.model}{separator}") for point in said}
        flat = separator == "_"
        own = [point for point in said if (prefix := prefixes[point.model]) is not None and prefix.flat == flat]
        places = [(f"{point.model}{separator}{point.path}", [Place(point, point.shape)]) for point in own]  # type: ignore[arg-type]
        if len(places) < len(self._said):
            raise CheckpointError("the model is needed to name its modules, and is not at hand", self._context.where)
        return {name: self._written(name, touched) for name, touched in written_modules(self._said, places)}

    def _places(self, naming: ModuleNames, style: str) -> Iterator[tuple[str, Sequence[Place]]]:
        modules = Modules(self._points)
        components = {} if self._points.model is None else self._points.model.components
        touched: dict[str, set[str]] = {}
        for point in self._points:
            if point.id in self._said:
                touched.setdefault(point.model, set()).add(point.path)
        for component, paths in touched.items():
            if component not in components:
                raise CheckpointError(
                    "the model is needed to name its modules, and is not at hand", self._context.where
                )
            called = naming(components[component], part_of(components[component], components))
            for foreign, pieces in ForeignNames(components[component]).written(style):
                if any(piece.path in paths for piece in pieces):
                    yield called(foreign), modules.placed(component, pieces) or ()

    def _check_covered(self, places: Sequence[tuple[str, Sequence[Place]]]) -> None:
        wholes = [whole for _, own in places if own and (whole := own[0].of_all()) is not None]
        covered = {place.point.id for place in [*wholes, *(place for _, own in places for place in own)]}
        if left := [point for point in self._said if point not in covered]:
            told = f"{len(left)} points belong to no module that files of this kind name: {', '.join(left[:3])}"
            raise CheckpointError(f"{told}; native holds any", self._context.where, left[0])

    def _written(self, name: str, touched: Sequence[tuple[Place, Sequence[Said]]]) -> Mapping[str, Tensor]:
        if any(_embeds(place) for place, _ in touched):
            told = "no reader of files of this kind takes a change of an embedding; native has any"
            raise CheckpointError(told, self._context.where, name)
        own = [(place, self._sayable(place, said)) for place, said in touched]
        try:
            return self._dialect.write(name, own, self._context)
        except CheckpointError as error:
            options = self._context.options
            if options is None or not options.approximate:
                hint = "approximate=True writes the nearest LoRA, and tells how near"
                raise CheckpointError(f"{error}; {hint}") from error
        nearest = [(place, [self._as_lora.exact(place, s) or self._as_lora.nearest(place, s)]) for place, s in touched]
        return self._dialect.write(name, nearest, self._context)

    def _sayable(self, place: Place, said: Sequence[Said]) -> Sequence[Said]:
        """The same in types that have codecs, where that is exact."""
        if all(one.type in self._dialect.types for one in said):
            return said
        lora = self._as_lora.exact(place, said)
        return said if lora is None else [lora]


def _embeds(place: Place) -> bool:
    return isinstance(place.point, WeightPoint) and place.point.layout.form == "embedding"


def with_one_alpha(
    modules: Tensors, alpha: float | None = None, dtype: torch.dtype | None = None
) -> dict[str, dict[str, Tensor]]:
    """The same with one alpha in every module of LoRA: diffusers takes the most common one for all attentions.

    Args:
        modules: What is written.
        alpha: Which; by default that of most modules.
        dtype: Of the file: alpha is the nearest that it has.
    """
    alphas = {name: float(own[_ALPHA]) for name, own in modules.items() if LORA_UP in own and _ALPHA in own}
    if not alphas:
        return {name: dict(own) for name, own in modules.items()}
    one = collections.Counter(alphas.values()).most_common(1)[0][0] if alpha is None else alpha
    if dtype is not None:
        one = float(torch.tensor(one).to(dtype))
    one = one if one and math.isfinite(one) else 1.0  # a scale of zero may be anywhere but here
    found: dict[str, dict[str, Tensor]] = {}
    for name, own in modules.items():
        found[name] = dict(own)
        if name in alphas and alphas[name] != one:
            up = own[LORA_UP]
            found[name] |= {LORA_UP: (up.double() * (alphas[name] / one)).to(up.dtype), _ALPHA: torch.tensor(one)}
    return found
