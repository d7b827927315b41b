"""What is written for the modules of an adapter of PEFT, and what must be said beside it so that PEFT reads it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapterkit.errors import CheckpointError
from adapterkit.formats.codecs.peft_base import whole_base
from adapterkit.formats.modules import Module
from adapterkit.kernels.weights import canonical

BASE_LAYER, PACKED, OUTER = "base_layer", "in_proj_weight", "out_proj"
A, B, BIAS = "lora_A.weight", "lora_B.weight", "lora_B.bias"
_BASE = ("weight", "bias")


@dataclass
class Unit:
    """What is written for one module.

    Attributes:
        path: Its path; "" for what belongs to no module.
        tensors: By the names behind it.
        config: What its codecs tell the config.
        module: The module, where it has a weight.
        inner: Path from a module around it that has the wrapper, below which it stands.
    """

    path: str
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    module: Module | None = None
    inner: str = ""

    @property
    def adapted(self) -> bool:
        """Whether it gets a wrapper."""
        return "peft_type" in self.config

    @property
    def is_parameter(self) -> bool:
        """Whether a parameter is adapted, and not its module."""
        return "target_parameters" in self.config

    @property
    def pattern(self) -> str:
        """What a pattern of the config means it by."""
        return f"{self.path}.{self.module.parameter}" if self.is_parameter and self.module is not None else self.path

    def keys(self, depth: int) -> Iterator[tuple[str, Tensor]]:
        """Its tensors by key, without the prefix.

        Args:
            depth: How many wrappers lie around its own.
        """
        path = ".".join(part for part in (self.path, *[BASE_LAYER] * depth, self.inner) if part)
        for name, tensor in self.tensors.items():
            inner = f"{BASE_LAYER}." if self.adapted and name in _BASE else ""
            yield f"{path}.{inner}{self._parameter(name)}" if path else name, tensor

    def _parameter(self, name: str) -> str:
        """The name of the module's own parameter, where a weight or bias has another."""
        if self.module is None or name not in _BASE:
            return name
        layout = self.module.points[0].layout
        return layout.parameter if name == "weight" else layout.bias_parameter


def with_projections(units: Sequence[Unit], modules: Sequence[Module], where: object) -> list[Unit]:
    """With torch's attentions as PEFT has them: both projections in one wrapper, and of one rank and alpha.

    PEFT adds the update of the output projection twice, so that half of it is written.
    """
    packed = {module.path: module for module in modules if module.parameter == PACKED}
    own = {unit.path: unit for unit in units if unit.adapted}
    found: list[Unit] = []
    for unit in units:
        around = unit.path.rpartition(".")[0]
        if unit.adapted and unit.path in packed:
            found += _projections(unit, own.get(f"{unit.path}.{OUTER}"), packed[unit.path], where)
        elif unit.adapted and unit.path == f"{around}.{OUTER}" and around in packed:
            if around not in own:
                found += _projections(None, unit, packed[around], where)
        else:
            found.append(unit)
    return found


def _projections(first: Unit | None, second: Unit | None, packed: Module, where: object) -> list[Unit]:
    path, made = packed.path, [unit for unit in (first, second) if unit is not None]
    if any(unit.config["peft_type"] != "LORA" or not {*unit.tensors} >= {A, B} for unit in made):
        told = "of torch's attentions PEFT adapts both projections, as LoRA alone; native holds it"
        raise CheckpointError(told, where, path)
    if any("use_dora" in unit.config for unit in made):
        raise CheckpointError("PEFT has no DoRA of torch's attentions; native holds it", where, path)
    rank = max(unit.config["r"] for unit in made)
    alpha = made[0].config["lora_alpha"] * rank / made[0].config["r"]
    config = {**made[0].config, "r": rank, "lora_alpha": alpha}
    width = packed.shape[1]
    found: list[Unit] = []
    for unit, out, twice, inner in ((first, packed.shape[0], 1, ""), (second, width, 2, OUTER)):
        a, b = torch.zeros(rank, width), torch.zeros(out, rank)
        rest: dict[str, Tensor] = {}
        if unit is not None:
            factor = unit.config["lora_alpha"] / unit.config["r"] * rank / alpha / twice
            a[: unit.config["r"]], b[:, : unit.config["r"]] = unit.tensors[A], unit.tensors[B] * factor
            rest = {name: tensor for name, tensor in unit.tensors.items() if name not in (A, B)}
        own = config if not inner else {name: config[name] for name in ("peft_type",)}
        module = packed if unit is None else unit.module
        found.append(Unit(path, {A: a, B: b, **rest}, dict(own), module, inner))
    return found


def with_biases(units: Sequence[Unit], where: object) -> list[Unit]:
    """With biases where the base has none as those of LoRA's B, and the others as PEFT's `bias` says."""
    if not any("bias" in unit.tensors and _lacks_bias(unit) for unit in units):
        return [*units]
    if odd := [unit for unit in units if unit.adapted and A not in unit.tensors and unit.inner != OUTER]:
        told = "has a bias where the base has none, which in PEFT's files are LoRA's of linear layers and convolutions"
        raise CheckpointError(f"{told}, all with one; native holds it", where, odd[0].path)
    return [_with_bias(unit, where) if unit.adapted else _checked_bias(unit, where) for unit in units]


def _lacks_bias(unit: Unit) -> bool:
    return unit.module is not None and not unit.module.points[0].layout.bias


def _checked_bias(unit: Unit, where: object) -> Unit:
    if "bias" in unit.tensors and _lacks_bias(unit):
        told = "has a bias where the base has none, and nothing else; PEFT has no such thing, and native holds it"
        raise CheckpointError(told, where, unit.path)
    return unit


def _with_bias(unit: Unit, where: object) -> Unit:
    if "use_dora" in unit.config or unit.is_parameter:
        told = "has a bias where the base has none, beside DoRA or experts; PEFT has no such thing, and native holds it"
        raise CheckpointError(told, where, unit.path)
    tensors, b = dict(unit.tensors), unit.tensors[B]
    own = torch.zeros(len(b), dtype=b.dtype)
    if "bias" in tensors and _lacks_bias(unit):
        scale = unit.config["lora_alpha"] / unit.config["r"]
        if not scale:
            raise CheckpointError("with an alpha of 0 a bias has no effect; native holds it", where, unit.path)
        own = tensors.pop("bias") / scale
    config = {name: value for name, value in unit.config.items() if name != "bias" or "bias" in tensors}
    return dataclasses.replace(unit, tensors={**tensors, BIAS: own}, config={**config, "lora_bias": True})


def check_rows(units: Sequence[Unit], where: object) -> None:
    """Raises where rows of several embeddings are trained that share one weight: PEFT looks past such on load."""
    rows = [unit for unit in units if "trainable_token_indices" in unit.config]
    embeddings = [one.path for one in rows if one.module is not None and one.module.points[0].role == "embed.tokens"]
    if len(embeddings) > 1:
        told = "PEFT loads rows of one embedding, and none of others that share its weight; native holds them"
        raise CheckpointError(f"{' and '.join(embeddings)}: {told}", where)


def as_norms(units: Sequence[Unit]) -> list[Unit]:
    """What trains nothing but norms, as PEFT has a type for."""
    kinds = {"norm" if unit.module is not None and unit.module.points[0].form == "norm" else "" for unit in units}
    if kinds != {"norm"} or any(unit.adapted or "modules_to_save" not in unit.config for unit in units):
        return [*units]
    named = [{f"ln_tuning_layers.{name}": tensor for name, tensor in unit.tensors.items()} for unit in units]
    return [
        dataclasses.replace(unit, tensors=tensors, config={"peft_type": "LN_TUNING"})
        for unit, tensors in zip(units, named, strict=True)
    ]


def with_whole_modules(units: Sequence[Unit], modules: Sequence[Module], where: object) -> list[Unit]:
    """With the base's own values wherever PEFT expects more of a saved module than the adapter has."""
    saved = {path for unit in units if not unit.adapted for path in unit.config.get("modules_to_save", ())}
    if not saved:
        return [*units]
    here = {(unit.path, "" if unit.module is None else unit.module.parameter) for unit in units if not unit.adapted}
    found = [*units]
    for module in modules:
        if (module.path, module.parameter) not in here and any(_is_in(module.path, path) for path in saved):
            found.append(_as_it_is(module, where))
    return found


def _is_in(path: str, saved: str) -> bool:
    """Whether a module is saved along: PEFT compares ends of paths, without a dot, and saves all that is below."""
    words = path.split(".")
    return any(".".join(words[: i + 1]).endswith(saved) for i in range(len(words)))


def _as_it_is(module: Module, where: object) -> Unit:
    place = module.places[0]
    layout = module.points[0].layout
    if layout.index is not None:
        told = "PEFT would save the experts of this module too; native holds the adapter"
        raise CheckpointError(told, where, module.path)
    weight, bias = whole_base(place, where)
    found = {"weight": canonical(weight, layout).contiguous()}
    return Unit(module.path, found if bias is None else {**found, "bias": bias}, {}, module)
