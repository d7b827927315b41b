"""Specimens of transformers' models that see or hear, with or without a text beside it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from adapterkit.testing.specimens.attempts import depends_on_row, first_that_runs, names_of, tensors
from adapterkit.testing.specimens.configs import shrunk
from adapterkit.testing.specimens.exact import InFloat64
from adapterkit.testing.specimens.images import Inputs, image_inputs
from adapterkit.testing.specimens.picture_configs import tower_config, with_small_pictures
from adapterkit.testing.specimens.placeholders import text_alone, text_as_long, text_with
from adapterkit.testing.specimens.sounds import sound_inputs
from adapterkit.testing.specimens.specimen import NoSpecimen, Specimen, normalise, strengthened

_SENSES: Final = {
    "image": (frozenset({"pixel_values", "flattened_patches"}), image_inputs),
    "audio": (frozenset({"input_features", "input_values"}), sound_inputs),
    "protein": (frozenset({"protein_input_ids"}), lambda config, names: iter([{}])),
}
"""Sense -> inputs of which a model that has it takes one, and the ways to give them."""

MOST_PARAMETERS: Final = 150_000_000

_Call = tuple[Callable[..., Any], Inputs]


def specimen_of(model: nn.Module) -> Specimen:
    """A small random copy of a model of transformers that sees or hears, and calls that run its parts.

    Raises:
        NoSpecimen: It does neither, or its config cannot be made small, or no way to call it is known.
    """
    taken = names_of(type(model).forward)
    senses = [sense for sense, (inputs, _) in _SENSES.items() if taken & inputs]
    if not senses:
        raise NoSpecimen(f"{type(model).__name__} takes neither pictures nor sound")
    reasons: list[str] = []
    for shrink in (shrunk, copy.deepcopy):  # widths of convolutions may have to be what they are
        try:
            small = _copy(model, shrink)
            calls = _with_text(small, senses, taken) if "input_ids" in taken else _without_text(small, senses, taken)
            runs = {label: partial(_run, *call) for label, call in calls}
            normalise(small, lambda runs=runs: [run() for run in runs.values()])
            return Specimen(small, runs)
        except NoSpecimen as error:
            reasons.append(error.reason)
    raise NoSpecimen(reasons[0])


def _copy(model: nn.Module, shrink: Callable[[Any], Any]) -> nn.Module:
    cls: Any = type(model)
    try:
        config: Any = with_small_pictures(shrink(model.config), model.config)  # type: ignore[arg-type]
        config._experts_implementation = "eager"
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in cls(config).parameters())
        if size > MOST_PARAMETERS:
            raise NoSpecimen(f"{cls.__name__} still has {size:,} parameters when its config is shrunk")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            return strengthened(cls(config))
    except NoSpecimen:
        raise
    except Exception as error:  # whatever the library says of sizes that nobody tried
        raise NoSpecimen(f"a small {cls.__name__} cannot be built: {type(error).__name__}: {error}") from error


def _run(function: Callable[..., Any], inputs: Inputs) -> Tensor:
    with InFloat64():
        return torch.cat([part.flatten().double() for part in tensors(function(**inputs))])


def _ways(model: nn.Module, sense: str, taken: frozenset[str]) -> Iterator[Inputs]:
    """The ways to give a model what one of its senses takes."""
    config: Any = model.config
    function = _encoder(model, sense)
    names = taken if function is None else taken | names_of(function)
    for way in _SENSES[sense][1](tower_config(config, sense), names):
        yield {name: value for name, value in way.items() if name in names}


def _without_text(model: nn.Module, senses: list[str], taken: frozenset[str]) -> Iterator[tuple[str, _Call]]:
    for sense in senses:
        ways = (way | text_alone(model, taken) for way in _ways(model, sense, taken))
        yield sense, (model, first_that_runs(model, ways))


def _with_text(model: nn.Module, senses: list[str], taken: frozenset[str]) -> Iterator[tuple[str, _Call]]:
    """The first sense together with a text, and the towers of the others; where that is not known, each alone."""
    first, *others = senses
    try:
        yield f"{first} and text", (model, first_that_runs(model, _together(model, first, taken)))
    except NoSpecimen:
        others = senses
        yield "text", (model, first_that_runs(model, iter([text_alone(model, taken)])))
    config: Any = model.config
    for sense in others:
        if tower_config(config, sense) is not config:  # else its default has no such tower
            yield sense, _tower(model, sense, taken)


def _together(model: nn.Module, sense: str, taken: frozenset[str]) -> Iterator[Inputs]:
    """The ways to call a model with a text in which there is a place for what it senses, or none."""
    for way in _ways(model, sense, taken):
        sensed = {name: value for name, value in way.items() if name in taken}
        count = _features(model, sense, way, taken)
        if count:
            yield text_with(model, sense, count, taken) | sensed
            yield text_as_long(model, count, taken) | sensed
        yield text_alone(model, taken) | sensed


def _tower(model: nn.Module, sense: str, taken: frozenset[str]) -> _Call:
    """What a model makes of a sense before any text sees it."""
    function = _encoder(model, sense)
    if function is None:
        raise NoSpecimen(f"{type(model).__name__} has no get_{sense}_features")
    ways = [_named(function, way) for way in _ways(model, sense, taken)]
    seen = (way for way in ways if depends_on_row(function, way))
    return function, first_that_runs(function, seen)


def _named(function: Callable[..., Any], way: Inputs) -> Inputs:
    """Of some inputs those that a function names; all where it passes on whatever it is given."""
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return way
    return {name: value for name, value in way.items() if name in parameters}


def _features(model: nn.Module, sense: str, way: Inputs, taken: frozenset[str]) -> int:
    """How many numbers a model makes of what it senses, 0 where it does not tell."""
    function = _encoder(model, sense)
    if function is None:
        return 0
    inputs = _named(function, way)
    try:
        first_that_runs(function, iter([inputs]))
    except NoSpecimen:
        return 0
    with torch.no_grad(), InFloat64():
        output = function(**inputs)
    pooled = getattr(output, "pooler_output", None)
    return sum(part.numel() for part in tensors(output if pooled is None else pooled))


def _encoder(model: nn.Module, sense: str) -> Callable[..., Any] | None:
    """What makes features of what is sensed: a method of the model, or of the one within it that has no head."""
    inner: Any = getattr(model, "base_model", None)
    found = (getattr(owner, f"get_{sense}_features", None) for owner in (model, inner))
    return next((function for function in found if function is not None), None)
