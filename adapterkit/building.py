"""From a config or a checkpoint to adapter modules: every check is made here, before the model is touched."""

from __future__ import annotations

import re
import warnings
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapterkit.adapter import AdapterConfig, AdapterModule, AdditiveModule
from adapterkit.checkpoint import Checkpoint
from adapterkit.errors import (
    AdapterKitError,
    BaseMismatchError,
    ConfigError,
    DtypeMismatchError,
    IncompatibleTargetError,
    InvalidHeaderError,
    InvalidNameError,
    MissingKeysError,
    NonFiniteError,
    PluginLoadError,
    ShapeMismatchError,
    TargetNotFoundError,
    UnexpectedKeysError,
    UnknownAdapterTypeError,
    did_you_mean,
)
from adapterkit.mapping import MappedModel
from adapterkit.plugins import get_plugin_manager
from adapterkit.points import InjectionPoint, WeightLayout
from adapterkit.selectors import Selector

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(1, 10))}
_SHOWN = 5


@dataclass(frozen=True)
class Built:
    """Adapter modules that are ready to be attached."""

    config: AdapterConfig
    points: Sequence[InjectionPoint]
    modules: Mapping[str, AdapterModule]


def check_name(name: object, taken: Iterable[str] = ()) -> str:
    """`name`, if it can name a new adapter: also in file names and state-dict keys.

    Raises:
        InvalidNameError: It cannot.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name.lower() in _RESERVED:
        shown = repr(name)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        raise InvalidNameError(
            f"invalid adapter name {shown}: use 1 to 64 letters, digits, '_' or '-', beginning with a letter or digit, "
            "and no name that Windows reserves"
        )
    if name in taken:
        raise InvalidNameError(
            f"an adapter named {name!r} exists already; remove({name!r}) first or choose another name"
        )
    return name


def choose_points(config: AdapterConfig, mapped: MappedModel) -> list[InjectionPoint]:
    """The points that a config's selector names and that its type can act at.

    Raises:
        TargetNotFoundError: A part of the selector matches nothing.
        IncompatibleTargetError: It matches, but the type cannot act there.
    """
    every = mapped.points()
    usable = [point for point in every if point.kind in config.kinds]
    selector = Selector(config.targets)
    if not usable:
        offered = ", ".join(sorted({point.kind for point in every})) or "none"
        raise IncompatibleTargetError(
            f"{type(config).__name__} acts at {_kinds(config)} points, and {mapped.label} offers none "
            f"(it offers: {offered})"
        )
    try:
        chosen = selector.select(usable, mapped.label)
    except TargetNotFoundError:
        others = [point for point in every if selector.matches(point) and point.kind not in config.kinds]
        if not others:
            raise
        raise IncompatibleTargetError(
            f"{type(config).__name__} acts at {_kinds(config)} points, but {config.targets!r} names "
            f"{others[0].kind} points such as {others[0].id}; "
            f"its roles here: {', '.join(sorted({p.role for p in usable}))}"
        ) from None
    refused = [f"{point.id}: {reason}" for point in chosen if (reason := config.accepts(point)) is not None]
    if refused:
        raise IncompatibleTargetError(f"{type(config).__name__} cannot act at {_some(refused)}; narrow its targets")
    if problems := config.selection_problems(chosen):
        raise ConfigError(problems, type(config).__name__)
    return chosen


def option_problems(seed: object, dtype: object) -> list[str]:
    """What is wrong with the options of `Adapters.add`."""
    found = [] if isinstance(seed, int) else [f"seed must be an int, not {seed!r}"]
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        found.append(f"dtype must be a floating-point torch.dtype, not {dtype!r}")
    return found


def build_new(config: AdapterConfig, mapped: MappedModel, seed: int, dtype: torch.dtype | None) -> Built:
    """Fresh modules, initialised from `seed` and each point's id, so that neither order nor selection matters.

    No global random number is consumed: modules are built on the CPU under a forked generator and then moved.
    """
    points = choose_points(config, mapped)
    modules: dict[str, AdapterModule] = {}
    with torch.random.fork_rng(devices=[]):
        for point in points:
            # Not torch.manual_seed: that would seed the accelerators too.
            torch.default_generator.manual_seed(zlib.crc32(f"{seed}/{point.id}".encode()))
            modules[point.id] = _build_one(config, point, mapped, dtype)
    return Built(config, points, modules)


def _build_one(
    config: AdapterConfig, point: InjectionPoint, mapped: MappedModel, dtype: torch.dtype | None
) -> AdapterModule:
    device, base_dtype = mapped.placement(point)
    with torch.device("meta" if device.type == "meta" else "cpu"):
        module = _checked_module(config, point)
    return module.to(device=device, dtype=dtype or master_dtype(base_dtype)).train(mapped.module(point).training)


def _checked_module(config: AdapterConfig, point: InjectionPoint) -> AdapterModule:
    module: Any = config.build(point)
    if not isinstance(module, AdapterModule):
        raise ConfigError(
            [f"build({point.id}) returned {type(module).__name__}, not an AdapterModule"], type(config).__name__
        )
    reads = isinstance(point.layout, WeightLayout) and point.layout.access == "read"
    if reads and not _has_weight(type(module)):
        raise IncompatibleTargetError(
            f"{type(config).__name__} cannot act at {point.id}: the model reads the weight there instead of calling a "
            f"module, and {type(module).__name__} has no equivalent weight (it defines neither merged nor "
            "delta_weight); narrow its targets"
        )
    return module


def _has_weight(cls: type[AdapterModule]) -> bool:
    """Whether a type says what weight equals it."""
    if cls.merged is AdditiveModule.merged:
        return cls.delta_weight is not AdditiveModule.delta_weight  # type: ignore[attr-defined]
    return cls.merged is not AdapterModule.merged


def master_dtype(base: torch.dtype) -> torch.dtype:
    """The dtype of trainable parameters on a base of this dtype: half precision would lose small updates."""
    return torch.promote_types(base, torch.float32)


def count_parameters(config: AdapterConfig, points: Iterable[InjectionPoint]) -> dict[str, int]:
    """Point id -> number of parameters that the config would add there. Allocates nothing."""
    with torch.device("meta"):
        return {p.id: sum(w.numel() for w in _checked_module(config, p).parameters()) for p in points}


def build_loaded(
    checkpoint: Checkpoint, mapped: MappedModel, *, strict: bool, source: object
) -> tuple[Built, list[str]]:
    """Modules that hold a checkpoint's tensors. Sizes are compared on the meta device before anything is allocated.

    Args:
        checkpoint: What a format has read.
        mapped: The model it is for.
        strict: Whether everything must match. Otherwise what does not is left out.
        source: Named in errors.

    Returns:
        The modules, and a sentence for everything that was left out or looked past.

    Raises:
        CheckpointError: Anything does not fit.
    """
    notes: list[str] = []
    config = _config_of(checkpoint, source)
    _check_base(checkpoint, mapped, strict, source, notes)
    points = _points_of(checkpoint, config, mapped, strict, source, notes)
    modules: dict[str, AdapterModule] = {}
    for point in points:
        modules[point.id] = _load_one(config, point, checkpoint.tensors[point.id], mapped, source, notes)
    for note in notes:
        warnings.warn(f"{source}: {note}", stacklevel=4)
    return Built(config, points, modules), notes


def _config_of(checkpoint: Checkpoint, source: object) -> AdapterConfig:
    manager = get_plugin_manager()
    spec = manager.adapters().get(checkpoint.type)
    if spec is None:
        near = did_you_mean(checkpoint.type, manager.adapters())
        told = f"adapter type {checkpoint.type!r} is unknown here. {_whence(checkpoint)}{near} {manager.hint()}"
        raise UnknownAdapterTypeError(told.rstrip(), source, "type")
    try:
        cls = spec.load()
    except PluginLoadError as error:
        raise UnknownAdapterTypeError(f"adapter type {checkpoint.type!r} is broken: {error}", source, "type") from error
    try:
        return cls.from_dict(checkpoint.config)
    except AdapterKitError as error:
        raise InvalidHeaderError(str(error), source, "config") from error


def _whence(checkpoint: Checkpoint) -> str:
    """How to get the type of a checkpoint. Without a distribution on record no install line is made up."""
    if not checkpoint.distribution:
        return "It was registered by the program that wrote the file; register it here in the same way."
    version = f" {checkpoint.version}" if checkpoint.version else ""
    return (
        f"The file was written with {checkpoint.distribution}{version}; "
        f"if you trust that package: pip install {checkpoint.distribution}."
    )


def _check_base(checkpoint: Checkpoint, mapped: MappedModel, strict: bool, source: object, notes: list[str]) -> None:
    here = mapped.fingerprint(mapped.points())
    for name, made_for in checkpoint.base.items():
        if name not in here:
            raise BaseMismatchError(
                f"made for a component {name!r} ({made_for.get('family')}), "
                f"and {mapped.label} has only {', '.join(here)}",
                source,
                "base",
            )
        differing = {k: (made_for.get(k), v) for k, v in here[name].items() if made_for.get(k) != v}
        if not differing:
            continue
        told = "; ".join(f"{key} {was!r} there, {now!r} here" for key, (was, now) in differing.items())
        message = f"made for another base ({name}: {told})"
        if strict:
            raise BaseMismatchError(f"{message}; strict=False loads what fits all the same", source, "base")
        notes.append(message)


def _points_of(
    checkpoint: Checkpoint, config: AdapterConfig, mapped: MappedModel, strict: bool, source: object, notes: list[str]
) -> list[InjectionPoint]:
    try:
        chosen = choose_points(config, mapped)
    except AdapterKitError as error:
        raise BaseMismatchError(str(error), source, "config.targets") from error
    components = set(checkpoint.base) or {point.component for point in chosen}
    wanted = {point.id: point for point in chosen if point.component in components}
    missing = [key for key in wanted if key not in checkpoint.tensors]
    extra = [key for key in checkpoint.tensors if key not in wanted]
    if extra:
        hint = did_you_mean(extra[0], wanted)
        message = f"{len(extra)} of its points are not among those that the config selects: {_some(extra)}.{hint}"
        if strict:
            raise UnexpectedKeysError(message, source, extra[0])
        notes.append(f"left out: {message}")
    if missing:
        message = f"no tensors for {len(missing)} of {len(wanted)} points: {_some(missing)}"
        if strict or len(missing) == len(wanted):
            raise MissingKeysError(message, source, missing[0])
        notes.append(f"left out: {message}")
    return [point for key, point in wanted.items() if key in checkpoint.tensors]


def _load_one(
    config: AdapterConfig,
    point: InjectionPoint,
    tensors: Mapping[str, Tensor],
    mapped: MappedModel,
    source: object,
    notes: list[str],
) -> AdapterModule:
    try:
        with torch.device("meta"):
            module = _checked_module(config, point)
    except IncompatibleTargetError as error:
        raise BaseMismatchError(str(error), source, point.id) from error
    expected = module.state_dict()
    if lacking := [name for name in expected if name not in tensors]:
        raise MissingKeysError(
            f"missing; the config asks for {', '.join(expected)}", source, f"{point.id}/{lacking[0]}"
        )
    if left := [name for name in tensors if name not in expected]:
        raise UnexpectedKeysError(
            f"nothing receives it; the config asks for {', '.join(expected)}", source, f"{point.id}/{left[0]}"
        )
    device, base_dtype = mapped.placement(point)
    loaded: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        key = f"{point.id}/{name}"
        _check_tensor(tensor, expected[name], source, key)
        loaded[name] = _placed(tensor, device, base_dtype, key, notes)
    module.load_state_dict(loaded, strict=True, assign=True)
    if any(tensor.is_meta for tensor in module.buffers()):
        # Buffers that are not saved must be computed: build for real and copy.
        module = _build_one(config, point, mapped, None)
        module.load_state_dict(loaded, strict=True, assign=True)
    module.requires_grad_(False)
    return module.train(mapped.module(point).training)


def _check_tensor(tensor: Tensor, expected: Tensor, source: object, key: str) -> None:
    if tensor.shape != expected.shape:
        hint = " (transposed?)" if tensor.shape == expected.mT.shape and tensor.ndim == 2 else ""
        raise ShapeMismatchError(
            f"shape {tuple(tensor.shape)}, but config and base require {tuple(expected.shape)}{hint}", source, key
        )
    if tensor.is_floating_point() != expected.is_floating_point():
        raise DtypeMismatchError(f"dtype {tensor.dtype} cannot hold what should be {expected.dtype}", source, key)
    if tensor.is_floating_point() and not tensor.is_meta and not torch.isfinite(tensor).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise NonFiniteError(f"{bad} of {tensor.numel()} values are NaN or infinite", source, key)


def _placed(tensor: Tensor, device: torch.device, base_dtype: torch.dtype, key: str, notes: list[str]) -> Tensor:
    """A copy on the base's device; the caller's tensor is never aliased."""
    dtype = tensor.dtype
    if dtype == torch.float64 and base_dtype != torch.float64:
        dtype = torch.float32
        note = "float64 tensors were cast to float32"
        if note not in notes:
            notes.append(note)
    return torch.empty_like(tensor, device=device, dtype=dtype).copy_(tensor)


def _kinds(config: AdapterConfig) -> str:
    return "/".join(sorted(config.kinds))


def _some(items: Sequence[str]) -> str:
    return ", ".join(items[:_SHOWN]) + (f", and {len(items) - _SHOWN} more" if len(items) > _SHOWN else "")
