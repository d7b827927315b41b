"""An adapter as what PEFT keeps in a folder: its tensors and its config."""

from __future__ import annotations

import collections
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from adapterkit.checkpoint import Checkpoint, WriteOptions
from adapterkit.codec import Context, Place, Said
from adapterkit.errors import CheckpointError
from adapterkit.formats.dialect import Dialect, written_modules
from adapterkit.formats.modules import Modules
from adapterkit.formats.parts import said_of, shared_of
from adapterkit.formats.peft_keys import BASE_LAYER
from adapterkit.points import InjectionPoint, ParameterPoint, Points

_MODEL, _WRAPPER = "base_model.model.", "base_model."
_BASE = ("weight", "bias")
_BY_PATTERN = {
    "r": "rank_pattern",
    "lora_alpha": "alpha_pattern",
    "alpha": "alpha_pattern",
    "block_size": "block_size_pattern",
    "n_frequency": "n_frequency_pattern",
}


@dataclass
class _Unit:
    """What is written for one module.

    Attributes:
        path: Its path, or a parameter's.
        module: The module's.
        tensors: By the names behind it.
        config: What its codecs tell the config.
    """

    path: str
    module: str
    tensors: dict[str, Tensor]
    config: dict[str, Any]

    @property
    def adapted(self) -> bool:
        """Whether it gets a wrapper."""
        return "peft_type" in self.config


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
        self._where = where
        self._dialect = Dialect("peft")
        self._context = Context(where, shared=shared_of(checkpoint), options=options)
        self._modules = Modules(points)
        said = said_of(checkpoint)
        self._check_component(said, points)
        self._whole: dict[str, Tensor] = {}
        self._paths = self._model_paths(said, points)
        self._units = [*self._parameters(said), *self._others(said, points)]

    @property
    def notes(self) -> Sequence[str]:
        """For the report."""
        return list(self._context.notes)

    def tensors(self) -> dict[str, Tensor]:
        """Key -> tensor."""
        found = {f"{_WRAPPER}{name}": tensor for name, tensor in self._context.tensors.items()}
        prefix = _MODEL if all(unit.path for unit in self._units) else _WRAPPER  # prompts have no wrapper of modules
        for unit in self._units:
            for name, tensor in unit.tensors.items():
                inner = f"{BASE_LAYER}." if unit.adapted and name in _BASE else ""
                found[f"{prefix}{self._named(unit)}.{inner}{name}" if unit.path else name] = tensor
        return found

    def config(self, known: Mapping[str, Any]) -> dict[str, Any]:
        """The config's fields.

        Args:
            known: Those that the adapter brings along, such as the base's name.
        """
        found = {"inference_mode": True, **known, **self._merged()}
        types = [unit.config["peft_type"] for unit in self._units if unit.adapted]
        found["peft_type"] = types[0] if types else "LORA"
        targets = {unit.module for unit in self._units if unit.adapted and unit.module and not _is_parameter(unit)}
        if targets:
            found["target_modules"] = self._targets(targets)
        return {name: sorted(value) if isinstance(value, set) else value for name, value in found.items()}

    # -- modules ------------------------------------------------------------------------------------------------------

    def _check_component(self, said: Mapping[str, Sequence[Said]], points: Points) -> None:
        components = dict.fromkeys(point.component for point in points if point.id in said)
        if len(components) > 1:
            told = f"an adapter of PEFT is one model's, and this one acts in {', '.join(components)}"
            raise CheckpointError(f"{told}; native and diffusers hold it", self._where)

    def _model_paths(self, said: Mapping[str, Sequence[Said]], points: Points) -> Sequence[str]:
        component = next((point.component for point in points if point.id in said), "")
        view = None if points.model is None else points.model.components.get(component)
        return view.paths if view is not None else [module.path for module in self._modules]

    def _parameters(self, said: Mapping[str, Sequence[Said]]) -> list[_Unit]:
        places = {id(module): module for module in self._modules}
        named = ((str(key), module.places) for key, module in places.items())
        return [
            self._unit(places[int(key)].path, touched, places[int(key)].parameter)
            for key, touched in written_modules(said, named)
        ]

    def _unit(self, module: str, touched: Sequence[tuple[Place, Sequence[Said]]], parameter: str = "") -> _Unit:
        context = self._own_context()
        made = self._dialect.write(module, touched, context)
        path = f"{module}.{parameter}" if "target_parameters" in context.config else module
        return _Unit(path, module, made, context.config)

    def _own_context(self) -> Context:
        shared = self._context
        return Context(self._where, {}, shared.tensors, shared.shared, shared.notes, shared.used, shared.options)

    def _others(self, said: Mapping[str, Sequence[Said]], points: Points) -> list[_Unit]:
        """What acts at attentions and at the embedded sequence."""
        groups: dict[str, list[tuple[Place, Sequence[Said]]]] = {}
        for point in points:
            if point.id in said and not isinstance(point, ParameterPoint):
                place = Place(point, point.shape, model=points.model)
                groups.setdefault(self._module_of(point, said[point.id]), []).append((place, said[point.id]))
        return [self._unit(path, touched) for path, touched in groups.items()]

    def _module_of(self, point: InjectionPoint, said: Sequence[Said]) -> str:
        found = self._dialect.types.get(said[0].type)
        return "" if found is not None and found[1].whole else point.path

    def _named(self, unit: _Unit) -> str:
        """A module's path with the wrappers that are inside of others: of parameters of one module, the later ones'."""
        if not _is_parameter(unit):
            return unit.module
        beside = [one.path for one in self._units if one.module == unit.module and _is_parameter(one)]
        return unit.module + f".{BASE_LAYER}" * (len(beside) - 1 - beside.index(unit.path))

    # -- the config ---------------------------------------------------------------------------------------------------

    def _merged(self) -> dict[str, Any]:
        """The fields of all modules: sets of all together, the rest the same for all or by pattern."""
        names = dict.fromkeys(name for unit in self._units for name in unit.config)
        found: dict[str, Any] = {}
        for name in names:
            values = [(unit, unit.config[name]) for unit in self._units if name in unit.config]
            if isinstance(values[0][1], set):
                found[name] = set[str]().union(*(value for _, value in values))
            elif isinstance(values[0][1], dict):
                for _, value in values:
                    found.setdefault(name, {}).update(value)
            else:
                found[name] = self._common(name, values, found)
        return {name: value for name, value in found.items() if value != {}}

    def _common(self, name: str, values: Sequence[tuple[_Unit, Any]], found: dict[str, Any]) -> Any:
        """The value that most modules have; what others have goes into a pattern."""
        usual = collections.Counter(map(repr, (value for _, value in values))).most_common(1)[0][0]
        value = next(value for _, value in values if repr(value) == usual)
        different = [(unit, own) for unit, own in values if own != value]
        pattern = _BY_PATTERN.get(name, "")
        for unit, own in different:
            if pattern not in unit.config:
                told = f"{name} is {value!r} and at {unit.path} {own!r}, and in PEFT's files it is one for all"
                raise CheckpointError(f"{told}; native holds any", self._where, unit.path)
            found.setdefault(pattern, {})[self._pattern(unit.path)] = own
        return value

    def _pattern(self, path: str) -> str:
        """A pattern for one module: its path, from the beginning where it is another's end too."""
        return f"^{re.escape(path)}" if self._is_end(path) else path

    def _is_end(self, path: str) -> bool:
        return any(other.endswith(f".{path}") for other in self._paths)

    def _targets(self, paths: set[str]) -> list[str] | str:
        if any(self._is_end(path) for path in paths):
            return "|".join(re.escape(path) for path in sorted(paths))
        return sorted(paths)


def _is_parameter(unit: _Unit) -> bool:
    return "target_parameters" in unit.config
