"""From a config to adapter modules: every check is made here, before the model is touched."""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.adapter import AdapterConfig, AdapterModule
from adapterkit.engine.skeletons import Skeletons
from adapterkit.errors import ConfigError, IncompatibleTargetError, InvalidNameError, shown
from adapterkit.handle.starting import start_from_base
from adapterkit.kernels.weights import wide_dtype
from adapterkit.mapping.model import MappedModel
from adapterkit.points import AttentionPoint, InjectionPoint

SHARED = "shared"
"""What stands in the place of a point's id for the tensors that all points share. No id is so: they hold an `@`."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(1, 10))}


@dataclass(frozen=True)
class Built:
    """The modules of one type, which are ready to be attached: all of an adapter, or a part of one of several types.

    Attributes:
        seed, dtype: Of values that `build_new` gave; a file's have no seed.
    """

    config: AdapterConfig
    points: Sequence[InjectionPoint]
    modules: Mapping[str, AdapterModule]
    seed: int | None = None
    dtype: torch.dtype | None = None


def check_name(name: object, taken: Iterable[str] = ()) -> str:
    """`name`, if it can name a new adapter: also in file names and state-dict keys.

    Raises:
        InvalidNameError: It cannot.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name.lower() in _RESERVED:
        raise InvalidNameError(
            f"invalid adapter name {shown(name, 77)}: use 1 to 64 letters, digits, '_' or '-', beginning with a letter "
            "or digit, and no name that Windows reserves"
        )
    if name in taken:
        raise InvalidNameError(
            f"an adapter named {name!r} exists already; remove({name!r}) first or choose another name"
        )
    return name


def option_problems(seed: object, dtype: object, **flags: object) -> list[str]:
    """What is wrong with the options of `Adapters.add`."""
    fits = isinstance(seed, int) and not isinstance(seed, bool) and -(1 << 64) < seed < 1 << 64
    found = [] if fits else [f"seed must be an int of 64 bits, not {shown(seed)}"]
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        found.append(f"dtype must be a floating-point torch.dtype, not {shown(dtype)}")
    found += [
        f"{name} must be True or False, not {shown(it)}" for name, it in flags.items() if not isinstance(it, bool)
    ]
    return found


def build_new(config: AdapterConfig, mapped: MappedModel, seed: int, dtype: torch.dtype | None) -> Built:
    """Fresh modules, initialised from `seed` and each point's id, so that neither order nor selection matters.

    No global random number is consumed: modules are built on the CPU under a forked generator and then moved.
    """
    points = config.choose(mapped.points(), mapped.label)
    modules: dict[str, AdapterModule] = {}
    with torch.random.fork_rng(devices=[]):
        _seed(seed, SHARED)
        sharing = Sharing(build_shared(config, points, mapped, dtype))
        for point in points:
            _seed(seed, point.id)
            module = modules[point.id] = build_one(config, point, mapped, dtype)
            sharing.bind(module, point)
            start_from_base(module, point, mapped)
    return Built(config, points, modules, seed, dtype)


def _seed(seed: int, key: str) -> None:
    # Not torch.manual_seed: that would seed the accelerators too.
    torch.default_generator.manual_seed(zlib.crc32(f"{seed}/{key}".encode()))


def build_shared(
    config: AdapterConfig, points: Sequence[InjectionPoint], mapped: MappedModel, dtype: torch.dtype | None
) -> nn.Module | None:
    """What all points share, beside the first of them; None where the type shares nothing."""
    device, base_dtype = mapped.placement(points[0])
    with _building_for(device):
        shared = checked_shared(config, points)
    return None if shared is None else shared.to(device=device, dtype=dtype or master_dtype(base_dtype))


def checked_shared(config: AdapterConfig, points: Sequence[InjectionPoint]) -> nn.Module | None:
    """What the config builds for all points, on the current default device."""
    shared: Any = config.shared(points)
    if shared is not None and not isinstance(shared, nn.Module):
        raise ConfigError(
            [f"shared(points) returned {type(shared).__name__}, neither a module nor None"], type(config).__name__
        )
    if shared is not None:
        _check_real(shared, config)
    return shared


def _building_for(device: torch.device) -> AbstractContextManager[object]:
    """Inside, what is made for a device is made on the CPU, or on the meta device."""
    kind = "meta" if device.type == "meta" else "cpu"
    # Every call of torch in such a block takes longer: there is none where all is made there anyway.
    return contextlib.nullcontext() if torch.empty(0).device.type == kind else torch.device(kind)


def _check_real(module: nn.Module, config: AdapterConfig) -> None:
    """Raises ConfigError for complex tensors: a cast to the model's dtype would drop their imaginary parts."""
    if not any(tensor.is_complex() for tensor in _tensors_of(module)):  # as almost always
        return
    tensors = itertools.chain(module.named_parameters(), module.named_buffers())
    name = next(name for name, tensor in tensors if tensor.is_complex())
    raise ConfigError(
        [f"{type(module).__name__}.{name} is complex, and adapters hold real tensors: use torch.view_as_real"],
        type(config).__name__,
    )


class Sharing:
    """Gives the modules of an adapter what all of them share.

    In each model it is registered below one of them alone, so that the model's state dict has it once: safetensors, and
    what saves with it, refuses tensors under several names.
    """

    def __init__(self, shared: nn.Module | None) -> None:
        self._shared = shared
        self._parts = frozenset() if shared is None else frozenset(map(id, shared.modules()))
        self._registered: dict[str, set[int]] = {}

    def bind(self, module: AdapterModule, point: InjectionPoint) -> None:
        """Gives it to the module of one point."""
        if self._shared is not None:
            module.bind(self._shared)
            self._register(module, self._registered.setdefault(point.model, set()))

    def _register(self, parent: nn.Module, registered: set[int]) -> None:
        for name, child in [(name, child) for name, child in parent._modules.items() if child is not None]:
            inside = {id(one) for one in child.modules()} if id(child) in self._parts else None
            if inside is None:
                self._register(child, registered)
            elif inside & registered:
                parent.__dict__[name] = parent._modules.pop(name)
            else:
                registered |= inside


def build_one(
    config: AdapterConfig, point: InjectionPoint, mapped: MappedModel, dtype: torch.dtype | None
) -> AdapterModule:
    """The module for one point, in place and in mode."""
    around = mapped.module(point)
    device, base_dtype = mapped.placement(point, around)
    dtype = dtype or master_dtype(base_dtype)
    with _building_for(device):
        module = checked_module(config, point)
    if any(t.device != device or (t.dtype != dtype and t.is_floating_point()) for t in _tensors_of(module)):
        module = module.to(device=device, dtype=dtype)
    return module.train(around.training)


def checked_module(config: AdapterConfig, point: InjectionPoint) -> AdapterModule:
    """What the config builds for one point, on the current default device.

    Raises:
        ConfigError: It builds no adapter module.
        IncompatibleTargetError: The module has no equivalent weight, and the model reads the weight.
    """
    module: Any = config.at(point).build(point)
    if not isinstance(module, AdapterModule):
        raise ConfigError(
            [f"build({point.id}) returned {type(module).__name__}, not an AdapterModule"], type(config).__name__
        )
    module.__dict__["at"] = point.id  # an attribute like any other; torch's way to set one takes 2 us
    _check_real(module, config)
    if reason := _unfit(type(module), point):
        raise IncompatibleTargetError(f"{type(config).__name__} cannot act at {point.id}: {reason}; narrow its targets")
    return module


def skeletons_of(config: AdapterConfig) -> Skeletons:
    """The modules of a config that wait for the tensors of a file; errors are those of `checked_module`."""
    return Skeletons(config, functools.partial(checked_module, config))


def _unfit(cls: type[AdapterModule], point: InjectionPoint) -> str | None:
    """What a point asks for that a type of module does not have."""
    if point.lengthens and not cls.abilities.lengthen:
        return f"it is asked for positions there, and {cls.__name__} defines no lengthen"
    if isinstance(point, AttentionPoint) and not (cls.abilities.extend or cls.abilities.attend):
        return f"{cls.__name__} defines neither extend nor attend"
    if point.cuts_groups and not (cls.abilities.forward or cls.abilities.delta):
        return f"{cls.__name__} computes with a whole weight, and the point has a part of a grouped convolution"
    if point.is_read and not cls.abilities.merge:
        return (
            f"the model reads the weight there instead of calling a module, and {cls.__name__} has no equivalent "
            "weight (it defines neither merged nor delta_weight)"
        )
    return None


def master_dtype(base: torch.dtype) -> torch.dtype:
    """The dtype of trainable parameters on a base of this dtype: half precision would lose small updates."""
    return wide_dtype(base)


def count_parameters(config: AdapterConfig, points: Sequence[InjectionPoint]) -> dict[str, int]:
    """Point id -> number of parameters that the config would add there; `shared` for all. Allocates nothing."""
    with torch.device("meta"):
        counts = {p.id: sum(w.numel() for w in checked_module(config, p).parameters()) for p in points}
        shared = checked_shared(config, points) if points else None
    if shared is not None:
        counts[SHARED] = sum(w.numel() for w in shared.parameters())
    return counts


def parameters_of(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Every parameter of these modules, one that several share once."""
    held = [p for module in _all_of(modules) for p in module._parameters.values() if p is not None]
    return [*{id(parameter): parameter for parameter in held}.values()]


def _tensors_of(module: nn.Module) -> list[Tensor]:
    """Every parameter and buffer of a module, one that is shared as often as it is there."""
    held = [t for one in _all_of([module]) for t in (*one._parameters.values(), *one._buffers.values())]
    return [tensor for tensor in held if tensor is not None]


def _all_of(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """These modules and what is in them, in the order of `Module.modules()`, in a fraction of its time."""
    # No generator: hooks ask, and Dynamo refuses any that runs beside a model that it compiles.
    found: list[nn.Module] = []
    stack = [*modules][::-1]
    while stack:
        found.append(module := stack.pop())
        stack += [child for child in reversed(module._modules.values()) if child is not None]
    return found


def own_state(module: AdapterModule) -> dict[str, Any]:
    """A module's state dict without what it shares."""
    shared = _shared_by(module)
    theirs = {id(t) for t in shared.state_dict(keep_vars=True).values()} if shared is not None else set()
    return {name: t.detach() for name, t in module.state_dict(keep_vars=True).items() if id(t) not in theirs}


def shared_of(modules: Mapping[str, AdapterModule]) -> nn.Module | None:
    """What the modules of one adapter share."""
    first = next(iter(modules.values()), None)
    return None if first is None else _shared_by(first)


def _shared_by(module: AdapterModule) -> nn.Module | None:
    return getattr(module, SHARED, None)
