"""An adapter as what PEFT keeps in a folder: its tensors and its config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from adapterkit.checkpoint import Checkpoint, WriteOptions
from adapterkit.contract.codec import Context, Place, Said
from adapterkit.contract.view import ComponentView
from adapterkit.errors import CheckpointError
from adapterkit.formats.dialect import Dialect, written_modules
from adapterkit.formats.modules import Module, Modules
from adapterkit.formats.parts import said_of, shared_of
from adapterkit.formats.peft_units import Unit, as_norms, check_rows, with_biases, with_projections, with_whole_modules
from adapterkit.formats.peft_written_config import written_config
from adapterkit.points import InjectionPoint, ParameterPoint, Points

_MODEL, _WRAPPER = "base_model.model.", "base_model."


class PeftWriter:
    """Writes one adapter.

    Args:
        checkpoint: The adapter.
        points: The model's.
        options: How.
        where: What errors name.

    Raises:
        CheckpointError: PEFT cannot say it.
    """

    def __init__(self, checkpoint: Checkpoint, points: Points, options: WriteOptions, where: object) -> None:
        self._where, self._points = where, points
        self._dialect = Dialect("peft")
        self._context = Context(where, shared=shared_of(checkpoint), options=options)
        said = said_of(checkpoint)
        self._component = self._only_component(said)
        modules = [module for module in Modules(points) if module.component == self._component]
        units = [*self._parameters(said, modules), *self._others(said)]
        units = with_biases(as_norms(with_projections(units, modules, where)), where)
        self._units = with_whole_modules(units, modules, where)
        if self._tied():
            check_rows(self._units, where)
        self._paths = self._model_paths(modules)

    @property
    def notes(self) -> Sequence[str]:
        """For the report."""
        return list(self._context.notes)

    def tensors(self) -> dict[str, Tensor]:
        """Key -> tensor."""
        found = {f"{_WRAPPER}{name}": tensor for name, tensor in self._context.tensors.items()}
        prefix = _MODEL if all(unit.path for unit in self._units) else _WRAPPER  # prompts have no wrapper of modules
        for unit in self._units:
            for key, tensor in unit.keys(self._depth(unit)):
                found[f"{prefix}{key}" if unit.path else key] = tensor
        return found

    def config(self, known: Mapping[str, Any]) -> dict[str, Any]:
        """The config's fields.

        Args:
            known: Those that the adapter brings along, such as the base's name.
        """
        view = self._view()
        return written_config(self._units, self._paths, known, () if view is None else view.classes, self._where)

    def _only_component(self, said: Mapping[str, Sequence[Said]]) -> str:
        components = [*dict.fromkeys(point.model for point in self._points if point.id in said)]
        if len(components) > 1:
            told = f"an adapter of PEFT is one model's, and this one acts in {', '.join(components)}"
            raise CheckpointError(f"{told}; native and diffusers hold it", self._where)
        return components[0] if components else ""

    def _view(self) -> ComponentView | None:
        return None if self._points.model is None else self._points.model.components.get(self._component)

    def _tied(self) -> bool:
        view = self._view()
        return view is not None and bool(view.config.get("tie_word_embeddings"))

    def _model_paths(self, modules: Sequence[Module]) -> Sequence[str]:
        view = self._view()
        return view.paths if view is not None else [module.path for module in modules]

    def _parameters(self, said: Mapping[str, Sequence[Said]], modules: Sequence[Module]) -> list[Unit]:
        places = {str(number): module for number, module in enumerate(modules)}
        named = ((number, module.places) for number, module in places.items())
        touched = written_modules(said, named)
        return [self._unit(places[number].path, own, places[number]) for number, own in touched]

    def _unit(self, path: str, touched: Sequence[tuple[Place, Sequence[Said]]], module: Module | None = None) -> Unit:
        shared = self._context
        own = Context(self._where, {}, shared.tensors, shared.shared, shared.notes, shared.used, shared.options)
        return Unit(path, self._dialect.write(path, touched, own), own.config, module)

    def _others(self, said: Mapping[str, Sequence[Said]]) -> list[Unit]:
        """What acts at attentions and at the embedded sequence."""
        groups: dict[str, list[tuple[Place, Sequence[Said]]]] = {}
        for point in self._points:
            if point.id in said and not isinstance(point, ParameterPoint):
                place = Place(point, point.shape, model=self._points.model)
                groups.setdefault(self._module_of(point, said[point.id]), []).append((place, said[point.id]))
        return [self._unit(path, touched) for path, touched in groups.items()]

    def _module_of(self, point: InjectionPoint, said: Sequence[Said]) -> str:
        found = self._dialect.types.get(said[0].type)
        return "" if found is not None and found[1].whole else point.path

    def _depth(self, unit: Unit) -> int:
        """How many wrappers lie around a unit's own: of parameters of one module, those of the later ones."""
        if not unit.is_parameter:
            return 1 if unit.inner else 0
        beside = [one.pattern for one in self._units if one.path == unit.path and one.is_parameter]
        return len(beside) - 1 - beside.index(unit.pattern)
