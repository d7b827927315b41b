"""From an adapter to a file that diffusers' own loaders read."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapterkit.checkpoint import Checkpoint, WriteOptions, WriteReport
from adapterkit.contract.codec import Context
from adapterkit.errors import CheckpointError, ConfigError, shown
from adapterkit.formats import container, diffusers_config
from adapterkit.formats.diffusers_modules import Module, ModuleWriting, loses_nothing, scaled
from adapterkit.points import Points

_TOP = "text_model."
_A, _B, _BIAS = "lora_A.weight", "lora_B.weight", "lora_B.bias"
_PROJECTIONS = (".q_proj", ".k_proj", ".v_proj", ".out_proj")
_FOR_TEXTS = {
    _A: "lora_linear_layer.down.weight",
    _B: "lora_linear_layer.up.weight",
    _BIAS: "lora_linear_layer.up.bias",
}
"""The older names, which diffusers' loader of text encoders wants where no projection of attention is adapted."""
_MAGNITUDE = {"lora_magnitude_vector": "lora_magnitude_vector.weight"}
"""PEFT's own name, which transformers wants; what diffusers writes itself is lost on the way into a text encoder."""


@dataclass(frozen=True)
class DiffusersWriteOptions(WriteOptions):
    """How to write.

    Attributes:
        fold: Whether alpha becomes a part of the factors where that costs no bit, so that programs that do not know
            the metadata (diffusers before 0.35, ComfyUI) compute the same.
        rank: Of what is approximated; 64 by default.
    """

    fold: bool = True
    rank: int | None = None

    def __post_init__(self) -> None:
        rank: Any = self.rank
        if rank is not None and not (type(rank) is int and rank > 0):
            raise ConfigError([f"rank must be a positive integer, not {shown(rank)}"], "options of save()")


def write_file(checkpoint: Checkpoint, points: Points, options: DiffusersWriteOptions, file: Path) -> WriteReport:
    """Writes one adapter.

    Args:
        checkpoint: It.
        points: The model's.
        options: How.
        file: Into what.

    Raises:
        CheckpointError: Something of it cannot be said; the message tells what can.
    """
    context = Context(file, options=options)
    writing = ModuleWriting(checkpoint, points, context, options.rank)
    parts: dict[str, list[Module]] = {}
    for module in writing.all():
        parts.setdefault(module.prefix, []).append(module)
    for modules in parts.values():
        _check_alike(modules, file)
    if options.fold:
        _fold([module for modules in parts.values() for module in modules])
    if any(module.scale != 1.0 for modules in parts.values() for module in modules):
        told = (
            "has alpha in its metadata, which diffusers before 0.35 and ComfyUI do not know: they take it for the rank"
        )
        context.note(told)
    tensors: dict[str, Tensor] = {}
    fields: dict[str, Any] = {}
    for prefix, modules in parts.items():
        tensors |= _tensors(modules)
        fields |= _fields(prefix, modules, writing.names.get(prefix))
    metadata = {**checkpoint.metadata, "format": "pt", diffusers_config.KEY: json.dumps(fields, indent=2)}
    container.write(file, {key: options.cast(tensor) for key, tensor in tensors.items()}, metadata)
    if writing.error:
        context.note(f"is an approximation: of the effect, at most {writing.error:.2g} is left out at a module")
    return WriteReport(list(context.notes), writing.error)


def _check_alike(modules: Sequence[Module], where: object) -> None:
    """Raises where what is one for all modules of a component is not."""
    with_dora = [module for module in modules if module.config.get("use_dora")]
    if with_dora and len(with_dora) < len(modules):
        told = (
            f"LoRA and DoRA in {modules[0].prefix.removesuffix('.') or 'one model'} are one or the other in its files"
        )
        raise CheckpointError(f"{told}; native holds both", where, modules[0].name)
    with_bias = [module for module in modules if module.shift is not None]
    if with_bias and with_dora:
        raise CheckpointError("DoRA has no bias of B in its files; native holds it", where, with_bias[0].name)
    if with_bias and (odd := [module for module in modules if _B not in module.tensors]):
        raise CheckpointError("LoRA of an embedding has no bias in its files; native holds it", where, odd[0].name)
    if still := [module for module in with_bias if module.scale == 0.0]:
        raise CheckpointError("with an alpha of 0 a bias has no effect; native holds it", where, still[0].name)


def _fold(modules: Sequence[Module]) -> None:
    """Makes the factors say what alpha does, if that costs no bit anywhere."""
    ups = [(module, name) for module in modules for name in module.tensors if name.endswith(("_B.weight", "_B"))]
    if not all(loses_nothing(module.tensors[name], module.scale) for module, name in ups):
        return
    for module, name in ups:
        module.tensors[name] = scaled(module.tensors[name], module.scale)
    for module in modules:
        module.config["lora_alpha"] = module.config["r"]


def _tensors(modules: Sequence[Module]) -> dict[str, Tensor]:
    """Key -> tensor of one component."""
    biased = any(module.shift is not None for module in modules)
    names = _names(modules)
    found: dict[str, Tensor] = {}
    for module in modules:
        own = dict(module.tensors)
        if biased:
            module.config["lora_bias"] = True
            zeros = own[_B].new_zeros(len(own[_B]))
            own[_BIAS] = zeros if module.shift is None else scaled(module.shift, 1.0 / module.scale)
        for name, tensor in own.items():
            found[f"{module.prefix}{module.name}.{names.get(name, name)}"] = tensor
    return _alike(found) if any(module.config.get("use_dora") for module in modules) else found


def _alike(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same in one dtype that loses nothing: a file begins with the widest, and diffusers must find a factor first.

    Where it finds a magnitude, it takes the file for an older one, and renames that of `to_out`.
    """
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))
    return {key: tensor.to(dtype) for key, tensor in tensors.items()}


def _names(modules: Sequence[Module]) -> Mapping[str, str]:
    """The names of tensors that a component's loader wants otherwise than PEFT."""
    if not modules[0].is_text:
        return {}
    return _MAGNITUDE | ({} if any(module.name.endswith(_PROJECTIONS) for module in modules) else _FOR_TEXTS)


def _fields(prefix: str, modules: Sequence[Module], names: Sequence[str] | None) -> Mapping[str, Any]:
    """The metadata of one component."""
    configs = {_bare(module): module.config for module in modules}
    if names is None:
        return _prefixed(prefix, {**diffusers_config.written(configs, ()), "target_modules": sorted(configs)})
    others = [own for name in names if (own := name.removeprefix(_TOP)) not in configs]
    return _prefixed(prefix, diffusers_config.written(configs, others))


def _bare(module: Module) -> str:
    """The module's name in every release of transformers."""
    return module.name.removeprefix(_TOP) if module.is_text else module.name


def _prefixed(prefix: str, fields: Mapping[str, Any]) -> Mapping[str, Any]:
    return {f"{prefix}{name}": value for name, value in fields.items()}
