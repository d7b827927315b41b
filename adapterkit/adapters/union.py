"""Several adapter types under one name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.adapter import AdapterConfig, AdapterModule, Attention, Base
from adapterkit.adapters.gates import SequenceGate, gate_at
from adapterkit.adapters.nested import config_of, described
from adapterkit.contract.abilities import Abilities
from adapterkit.contract.config import BaseValues
from adapterkit.errors import ConfigError, IncompatibleTargetError, shown
from adapterkit.kernels.sums import Active, combine, effect, merge_weights
from adapterkit.points import InjectionPoint, Kind

_MAX_PARTS = 32


class UnionModule(AdapterModule):
    """The modules of all parts that act at one point; their effects are summed.

    Args:
        members: Place in the union -> module.
        gates: Place in the union -> its gate; empty for none.
    """

    def __init__(self, members: Mapping[str, AdapterModule], gates: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.members, self.gates = nn.ModuleDict(members), nn.ModuleDict(gates)
        self.from_base = any(_initialises(member) for member in members.values())
        self.outermost = any(member.outermost for member in members.values())
        self.scalable = all(member.scalable for member in members.values())
        self.positional = any(member.positional for member in members.values())
        self.reads_input = any(member.reads_input for member in members.values())
        self.padded = any(member.padded for member in members.values())
        ties = {member.tied for member in members.values()}
        self.tied = next(iter(ties)) if len(ties) == 1 else None
        self.front = max((member.front for member in members.values()), default=0)
        self.counted = any(member.counted for member in members.values())
        self.abilities = dataclasses.replace(
            self.abilities,
            extend=any(member.abilities.extend for member in members.values()),
            attend=any(member.abilities.attend for member in members.values()),
        )

    def bind(self, shared: nn.Module) -> None:
        """See `AdapterModule.bind`: every member gets its own part's."""
        super().bind(shared)
        for key, member in self.members.items():
            if isinstance(member, AdapterModule) and key in shared._modules:
                member.bind(shared.get_submodule(key))

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if not self.gates:
            return combine(x, base, self._side_by_side())
        y = base(x)
        total = y
        for key, member in self.members.items():
            gate = self.gates[key](x if isinstance(self.gates[key], SequenceGate) else y)
            total = total + gate * effect(member, x, y, base)  # type: ignore[arg-type]
        return total

    def _side_by_side(self) -> Active:
        return [(member, 1.0) for member in self.members.values()]  # type: ignore[misc]

    def extend(self, keys: Tensor, values: Tensor, base: Any = None) -> tuple[Tensor, Tensor]:
        """See `AdapterModule.extend`. A gate scales what is put in front."""
        for key, member in self.members.items():
            if not _can(member).extend:
                continue
            before = keys.shape[-2]
            given = (base,) if "extend" in _can(member).beside else ()
            keys, values = member.extend(keys, values, *given)  # type: ignore[operator]
            if self.gates:
                keys, values = (self._gated(key, t, t.shape[-2] - before) for t in (keys, values))
        return keys, values

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, base: Attention) -> Tensor:
        """See `AdapterModule.attend`. A gate scales a part's effect."""
        y = base(query)
        total = y
        for key, member in self.members.items():
            if _can(member).attend:
                added = member.attend(query, keys, values, base) - y  # type: ignore[operator]
                total = total + (self.gates[key](y) * added if self.gates else added)
        return total

    def lengthen(self, tokens: Tensor, base: Any = None) -> Tensor:
        """See `AdapterModule.lengthen`. A gate scales a part's positions."""
        parts: dict[str, Tensor] = {}
        for key, member in self.members.items():
            given = (base,) if "lengthen" in _can(member).beside else ()
            parts[key] = member.lengthen(tokens, *given)  # type: ignore[operator]
        return torch.cat([self.gates[key](part) * part if self.gates else part for key, part in parts.items()], dim=-2)

    def _gated(self, key: str, tensor: Tensor, added: int) -> Tensor:
        front, rest = tensor[..., :added, :], tensor[..., added:, :]
        return torch.cat([self.gates[key](front) * front, rest], dim=-2)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `AdapterModule.merged`. Gates have no equivalent weight."""
        if self.gates:
            return super().merged(weight, bias)
        return merge_weights(weight, bias, self._side_by_side())

    def initialise(self, weight: Tensor, bias: Tensor | None) -> None:
        for member in self.members.values():
            if isinstance(member, AdapterModule) and _initialises(member):
                member.initialise(weight, bias)

    def observe(self, x: Tensor) -> None:
        for member in self.members.values():
            member.observe(x)  # type: ignore[operator]

    def observe_gradient(self, x: Tensor, grad: Tensor) -> None:
        for member in self.members.values():
            member.observe_gradient(x, grad)  # type: ignore[operator]

    def forget(self) -> None:
        for member in self.members.values():
            member.forget()  # type: ignore[operator]

    def penalty(self) -> Tensor | None:
        terms = [term for member in self.members.values() if (term := member.penalty()) is not None]  # type: ignore[operator]
        return torch.stack(terms).sum() if terms else None


@dataclass(frozen=True)
class Union(AdapterConfig):
    """Several types that are added, act, train and are saved as one adapter: at each point their effects are summed.

    `Union((Prefix(), Bottleneck(form="parallel")))` is MAM (He et al. 2021, arXiv:2110.04366). With `gating`, and LoRA
    beside them, it is UniPELT (Mao et al. 2022, arXiv:2110.07577), whose gates are here one a token, and one a layer
    for prefixes.

    Attributes:
        parts: The configs.
        targets: Must be "all", which means what the parts say; narrow theirs instead.
        gating: Whether each part's effect has a learnt gate in (0, 1). "sequence" for the paper's own, from the point's
            input and averaged over all positions, padding among them, at layers of features in sequences: a causal
            model then sees the future.
    """

    parts: tuple[AdapterConfig, ...] = ()
    targets: str = field(default="all", kw_only=True)
    gating: bool | str = False

    @property
    def kinds(self) -> frozenset[Kind]:  # type: ignore[override]
        """Those of the parts."""
        return frozenset(kind for part in self.parts for kind in part.kinds)

    @property
    def neutral(self) -> bool:  # type: ignore[override]
        """Whether all parts are."""
        return all(part.neutral for part in self.parts)

    @property
    def words(self) -> Sequence[str]:
        """Those of the parts."""
        return [word for part in self.parts for word in part.words]

    def written(self, text: str) -> str:
        for part in self.parts:
            text = part.written(text)
        return text

    def teach(self, modules: Mapping[str, AdapterModule], tokenizer: Any) -> Mapping[str, int]:
        ids: dict[str, int] = {}
        for number, part in enumerate(self.parts):
            key = str(number)
            own: dict[str, Any] = {
                point: module.members[key]
                for point, module in modules.items()
                if isinstance(module, UnionModule) and key in module.members
            }
            if own:
                ids |= part.teach(own, tokenizer)
        return ids

    @property
    def observations(self) -> int:  # type: ignore[override]
        """What the part that wants most wants."""
        return max((part.observations for part in self.parts), default=0)

    @property
    def observes_gradients(self) -> bool:  # type: ignore[override]
        """Whether any part does."""
        return any(part.observes_gradients for part in self.parts)

    @property
    def exact_gradients(self) -> bool:  # type: ignore[override]
        """Whether all parts have them."""
        return all(part.exact_gradients for part in self.parts)

    def problems(self) -> list[str]:
        found = []
        parts = self.parts if isinstance(self.parts, (tuple, list)) else ()
        if not 1 <= len(parts) <= _MAX_PARTS or not all(isinstance(part, AdapterConfig) for part in parts):
            told = f"at least one adapter config (and {_MAX_PARTS} at most)"
            found.append(f"parts must be a tuple of {told}, not {shown(self.parts)}")
        if self.settings:
            found.append("settings are those of the parts: give them there")
        if self.gating not in (False, True, "sequence"):
            found.append(f"gating must be true, false or 'sequence', not {shown(self.gating)}")
        if self.targets != "all":
            found.append(f"targets must be 'all', which means those of the parts, not {shown(self.targets)}")
        return found

    def choose(self, points: Sequence[InjectionPoint], label: str) -> list[InjectionPoint]:
        """What any part chooses, in model order."""
        chosen = {point.id for part in self.parts for point in part.choose(points, label)}
        return [point for point in points if point.id in chosen]

    def shared(self, points: Sequence[InjectionPoint]) -> nn.Module | None:
        """What each part shares, by its place."""
        each = {i: part.shared([p for p in points if _means(part, p)]) for i, part in enumerate(self.parts)}
        modules = {str(i): module for i, module in each.items() if module is not None}
        return nn.ModuleDict(modules) if modules else None

    def example_context(self, points: Sequence[InjectionPoint], rows: int) -> Mapping[str, Tensor]:
        """What any part reads, each at its own points."""
        found: dict[str, Tensor] = {}
        for part in self.parts:
            found |= part.example_context([point for point in points if _means(part, point)], rows)
        return found

    def accepts(self, point: InjectionPoint) -> str | None:
        """None where any part accepts the point."""
        reasons = [part.at(point).accepts(point) for part in self.parts]
        return None if None in reasons else "; ".join(reason for reason in reasons if reason)

    def build(self, point: InjectionPoint) -> UnionModule:
        members = {str(i): part.at(point).build(point) for i, part in enumerate(self.parts) if _means(part, point)}
        for member in members.values():
            member.at = point.id
        gates = {key: gate_at(point, self.gating) for key in members} if self.gating else {}
        _check_members(members, gates, point)
        return UnionModule(members, gates)

    def rate(self, parameter: str, point: InjectionPoint) -> float:
        """The part's own."""
        kind, place, name = parameter.split(".", 2)
        return self.parts[int(place)].rate(name, point) if kind == "members" else 1.0

    def observed(self, modules: Mapping[str, AdapterModule], base: BaseValues) -> None:
        for place, part in enumerate(self.parts):
            part.observed(_members(modules, place), base)

    @property
    def adapts(self) -> bool:
        return any(part.adapts for part in self.parts)

    def after_step(self, modules: Mapping[str, AdapterModule], step: int, steps: int | None) -> None:
        for place, part in enumerate(self.parts):
            part.after_step(_members(modules, place), step, steps)

    def to_dict(self) -> dict[str, Any]:
        """See `AdapterConfig.to_dict`. Each part as its type's name and its config.

        Raises:
            PluginError: A part's type is not registered.
        """
        parts = [described(part) for part in self.parts]
        return {"parts": parts, "targets": self.targets, "gating": self.gating}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Union:
        listed = values.get("parts")
        if not isinstance(listed, (list, tuple)):
            raise ConfigError([f"parts must be a list of types with their configs, not {shown(listed)}"], "Union")
        return super().from_dict({**values, "parts": tuple(config_of(entry, "Union") for entry in listed)})


def _can(member: nn.Module) -> Abilities:
    return member.abilities  # type: ignore[return-value]


def _initialises(member: AdapterModule) -> bool:
    return member.from_base and member.abilities.initialise


def _means(part: AdapterConfig, point: InjectionPoint) -> bool:
    return part.means(point) and bool(part.at(point).narrow([point]))


def _check_members(members: Mapping[str, AdapterModule], gates: Mapping[str, nn.Module], point: InjectionPoint) -> None:
    """Raises IncompatibleTargetError for a member that cannot be one of several, or whose effect is no sum."""
    for member in members.values():
        if member.parts:
            raise IncompatibleTargetError(f"{type(member).__name__} combines adapters, and cannot be in a union")
        if not member.scalable and not point.lengthens and (len(members) > 1 or gates):
            raise IncompatibleTargetError(
                f"{type(member).__name__} acts or does not at {point.id}: there it cannot be beside others, nor gated"
            )


def _members(modules: Mapping[str, AdapterModule], place: int) -> dict[str, AdapterModule]:
    found = {key: module.members._modules.get(str(place)) for key, module in modules.items()}  # type: ignore[union-attr]
    return {key: member for key, member in found.items() if isinstance(member, AdapterModule)}
