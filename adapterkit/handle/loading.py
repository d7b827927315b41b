"""From a checkpoint to adapter modules: every check is made here, before the model is touched."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.adapter import AdapterConfig, AdapterModule
from adapterkit.checkpoint import Checkpoint, Part
from adapterkit.engine.skeletons import Skeleton, Skeletons
from adapterkit.errors import (
    AdapterKitError,
    BaseMismatchError,
    IncompatibleTargetError,
    InvalidHeaderError,
    MissingKeysError,
    PluginError,
    ShapeMismatchError,
    UnexpectedKeysError,
    UnknownAdapterTypeError,
    did_you_mean,
    printable,
    shown,
)
from adapterkit.handle.building import SHARED, Built, Sharing, build_one, build_shared, checked_shared, skeletons_of
from adapterkit.handle.fitting import Target, fitting
from adapterkit.handle.former_ids import as_now
from adapterkit.mapping.model import MappedModel, digest
from adapterkit.mapping.targets import some
from adapterkit.plugins.manager import class_of, get_plugin_manager
from adapterkit.points import InjectionPoint, Points

_PACKAGE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,98}[A-Za-z0-9])?")
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+!-]{0,39}")


def build_loaded(
    checkpoint: Checkpoint,
    mapped: MappedModel,
    here: Points,
    strict: bool,
    source: object,
    *,
    finite: bool = False,
    fresh: bool = False,
) -> tuple[list[Built], list[str]]:
    """Modules that hold a checkpoint's tensors. Sizes are compared on the meta device before anything is allocated.

    Args:
        checkpoint: What a format has read.
        mapped: The model it is for.
        here: The model's points.
        strict: Whether everything must match. Otherwise what does not is left out.
        source: Named in errors.
        finite: Whether who has read the tensors has refused NaN and infinity already.
        fresh: Whether nobody else has them, so that they need not be copied.

    Returns:
        The modules of each type, and a sentence for everything that was left out or looked past.

    Raises:
        CheckpointError: Anything does not fit.
    """
    notes: list[str] = []
    checkpoint = as_now(checkpoint, here, mapped.components, pinned=True)
    configs = [(part, config_of(part, source)) for part in checkpoint.parts]
    check_base(checkpoint, mapped, here, strict, source, notes)
    chosen = [_choose(config, part, here, mapped.label, strict, source) for part, config in configs]
    configs = [(part, config) for part, (config, _) in zip(checkpoint.parts, chosen, strict=True)]
    wanted = [_wanted(part, checkpoint.base, own) for part, (_, own) in zip(checkpoint.parts, chosen, strict=True)]
    points = [points_of(part, own, strict, source, notes) for (part, _), own in zip(configs, wanted, strict=True)]
    _check_shapes(checkpoint.base, [*itertools.chain.from_iterable(points)], strict, source, notes)
    target = Target(mapped, source, notes, finite, fresh)
    built = [
        _build_part(part, config, [*asked.values()], own, target, strict)
        for (part, config), asked, own in zip(configs, wanted, points, strict=True)
    ]
    _check_apart(built, source)
    for note in notes:
        warnings.warn(printable(f"{source}: {note}"), stacklevel=4)
    return built, notes


def _build_part(
    part: Part,
    config: AdapterConfig,
    wanted: list[InjectionPoint],
    points: list[InjectionPoint],
    target: Target,
    strict: bool,
) -> Built:
    shared = _load_shared(config, wanted, part.tensors.get(SHARED, {}), target)
    modules: dict[str, AdapterModule] = {}
    sharing = Sharing(shared)
    skeletons = skeletons_of(config)
    misfits: list[ShapeMismatchError] = []
    for point in points:
        try:
            module = modules[point.id] = _load_one(skeletons, point, part.tensors[point.id], target)
        except ShapeMismatchError as error:
            misfits.append(error)
            if strict:
                raise
            continue
        if shared is not None:
            sharing.bind(module, point)
            module.train(module.training)
    if not misfits:
        return Built(config, points, modules)
    if not modules:
        raise misfits[0]
    target.notes.append(f"left out: {len(misfits)} of its points have other shapes here, as {misfits[0].key}")
    fewer = dataclasses.replace(config, settings={key: config.settings.get(key, {}) for key in modules})
    return Built(fewer, [point for point in points if point.id in modules], modules)


def _check_apart(built: Sequence[Built], source: object) -> None:
    """Raises InvalidHeaderError where two types of one adapter act at one point: together they are a `Union`."""
    first: dict[str, str] = {}
    for part in built:
        kind = type(part.config).__name__
        for key in part.modules:
            if key in first:
                raise InvalidHeaderError(
                    f"has {first[key]} and {kind}; several types at a point are a Union", source, key
                )
            first[key] = kind


def config_of(checkpoint: Part, source: object) -> AdapterConfig:
    """The config of a part of a checkpoint.

    Raises:
        UnknownAdapterTypeError: The type is not installed, or broken.
        InvalidHeaderError: The config is none of the type's.
    """
    manager = get_plugin_manager()
    spec = manager.adapters().get(checkpoint.type)
    if spec is None:
        near = did_you_mean(checkpoint.type, manager.adapters())
        told = f"adapter type {shown(checkpoint.type)} is unknown here. {_whence(checkpoint)}{near} {manager.hint()}"
        raise UnknownAdapterTypeError(told.rstrip(), source, "type")
    try:
        cls = class_of(spec, AdapterConfig)
    except PluginError as error:
        raise UnknownAdapterTypeError(f"adapter type {checkpoint.type!r} is broken: {error}", source, "type") from error
    try:
        settings = {"settings": checkpoint.settings} if checkpoint.settings else {}
        return cls.from_dict({**checkpoint.config, **settings})
    except AdapterKitError as error:
        raise InvalidHeaderError(str(error), source, "config") from error


def _whence(checkpoint: Part) -> str:
    """How to get the type of a checkpoint. Without a distribution on record no install line is made up."""
    if not checkpoint.distribution:
        return "It was registered by the program that wrote the file; register it here in the same way."
    if not _PACKAGE.fullmatch(checkpoint.distribution):  # a line to be copied into a shell is not the file's to write
        return f"The file says that {shown(checkpoint.distribution)} provides it, which is no name of a package."
    version = f" {checkpoint.version}" if _VERSION.fullmatch(checkpoint.version) else ""
    return (
        f"The file was written with {checkpoint.distribution}{version}; "
        f"if you trust that package: pip install {checkpoint.distribution}."
    )


def check_base(
    checkpoint: Checkpoint, mapped: MappedModel, here: Points, strict: bool, source: object, notes: list[str]
) -> None:
    """Whether what the adapter touches is here as it was there: the models' classes, and how often each role is."""
    for name, made_for in checkpoint.base.items():
        if name not in mapped.components:
            told = f"made for a component {name!r} ({shown(made_for.get('family'))}), and {mapped.label} has only "
            told += ", ".join(mapped.components)
            if strict or mapped.components.keys().isdisjoint(checkpoint.base):
                raise BaseMismatchError(told, source, "base")
            notes.append(told)
            continue
        differing = {"family": (made_for.get("family"), mapped.components[name].family)}
        roles = _roles(made_for)
        found = collections.Counter(p.role for p in here if p.component == name and p.role in roles)
        differing |= {role: (count, found[role]) for role, count in roles.items()}
        _mismatch({key: both for key, both in differing.items() if both[0] != both[1]}, name, strict, source, notes)


def _check_shapes(
    base: Mapping[str, Mapping[str, Any]],
    points: Sequence[InjectionPoint],
    strict: bool,
    source: object,
    notes: list[str],
) -> None:
    """Whether the points have the shapes that they had there, where all of them are here."""
    for name, made_for in base.items():
        own = [point for point in points if point.component == name]
        if _roles(made_for) and len(own) == made_for.get("points"):
            shapes = (made_for.get("shapes"), digest(own))
            _mismatch({"shapes": shapes} if shapes[0] != shapes[1] else {}, name, strict, source, notes)


def _roles(made_for: Mapping[str, Any]) -> Mapping[str, Any]:
    """The roles that an adapter touches. Files of earlier releases do not tell; of them, its tensors do."""
    roles = made_for.get("roles")
    return roles if isinstance(roles, Mapping) else {}


def _mismatch(
    differing: Mapping[str, tuple[object, object]], name: str, strict: bool, source: object, notes: list[str]
) -> None:
    if not differing:
        return
    told = "; ".join(f"{key} {was!r} there, {now!r} here" for key, (was, now) in differing.items())
    message = f"made for another base ({name}: {told})"
    if strict:
        raise BaseMismatchError(f"{message}; strict=False loads what fits all the same", source, "base")
    notes.append(message)


def _choose(
    config: AdapterConfig, part: Part, here: Points, label: str, strict: bool, source: object
) -> tuple[AdapterConfig, list[InjectionPoint]]:
    """The points that a config asks for. Of points that are not here it need not, where not all must match."""
    try:
        try:
            return config, config.choose(here, label)
        except AdapterKitError:
            known = set(here.ids)
            ids = [] if strict else [key for key in part.tensors if key in known]
            if not ids:
                raise
            fewer = dataclasses.replace(config, settings={key: config.settings.get(key, {}) for key in ids})
            return fewer, fewer.choose(here, label)
    except AdapterKitError as error:
        raise BaseMismatchError(str(error), source, "settings" if config.settings else "config.targets") from error


def _wanted(
    part: Part, base: Mapping[str, Mapping[str, Any]], chosen: Sequence[InjectionPoint]
) -> dict[str, InjectionPoint]:
    """Id -> those of the chosen points that the adapter must have tensors for.

    What a selector names besides, in other components or of roles that the adapter did not touch where it was made, the
    families' tables have learnt since.
    """
    if not base:
        return {point.id: point for point in chosen}
    known = {(name, role) for name, made_for in base.items() for role in _roles(made_for)}
    places = (key.partition("@")[::2] for key in part.tensors if key != SHARED)
    known |= {(place.partition(".")[0], role) for role, place in places}
    return {point.id: point for point in chosen if (point.component, point.role) in known or not known}


def points_of(
    checkpoint: Part, wanted: Mapping[str, InjectionPoint], strict: bool, source: object, notes: list[str]
) -> list[InjectionPoint]:
    """Those of the wanted points that a checkpoint has tensors for.

    Raises:
        UnexpectedKeysError, MissingKeysError: It has more than those, or (all) fewer.
    """
    missing = [key for key in wanted if key not in checkpoint.tensors]
    extra = [key for key in checkpoint.tensors if key not in wanted and key != SHARED]
    if extra:
        hint = did_you_mean(extra[0], wanted)
        message = f"{len(extra)} of its points are not among those of the adapter: {some(extra)}.{hint}"
        if strict:
            raise UnexpectedKeysError(message, source, extra[0])
        notes.append(f"left out: {message}")
    if missing:
        message = f"no tensors for {len(missing)} of {len(wanted)} points: {some(missing)}"
        if strict or len(missing) == len(wanted):
            raise MissingKeysError(message, source, missing[0])
        notes.append(f"left out: {message}")
    return [point for key, point in wanted.items() if key in checkpoint.tensors]


def _load_one(
    skeletons: Skeletons, point: InjectionPoint, tensors: Mapping[str, Tensor], target: Target
) -> AdapterModule:
    around = target.mapped.module(point)
    try:
        module, skeleton = skeletons.at(point, around.training)
    except IncompatibleTargetError as error:
        raise BaseMismatchError(str(error), target.source, point.id) from error
    loaded = fitting(skeleton.expected, point.id, tensors, target.mapped.placement(point, around), target)
    if skeleton.lacks:
        # Buffers that are not saved must be computed: build for real and copy.
        with torch.random.fork_rng(devices=[]):
            module = build_one(skeletons.config, point, target.mapped, None)
        module.load_state_dict(loaded, strict=True, assign=True)
    else:
        skeleton.fill(module, loaded)
    return module


def _load_shared(
    config: AdapterConfig,
    points: list[InjectionPoint],
    tensors: Mapping[str, Tensor],
    target: Target,
) -> nn.Module | None:
    with torch.device("meta"):
        shared = checked_shared(config, points)
    skeleton = None if shared is None else Skeleton(shared)
    if shared is None or skeleton is None:
        if tensors:
            raise UnexpectedKeysError("nothing receives it", target.source, f"{SHARED}/{next(iter(tensors))}")
        return None
    loaded = fitting(skeleton.expected, SHARED, tensors, target.mapped.placement(points[0]), target)
    shared.load_state_dict(loaded, strict=True, assign=True)
    if skeleton.lacks:
        with torch.random.fork_rng(devices=[]):
            built = build_shared(config, points, target.mapped, None)
        if built is None:
            return None
        shared = built
        shared.load_state_dict(loaded, strict=True, assign=True)
    return shared
