"""One adapter for a weight that several layers have: a token embedding, and the head that is tied to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from adapterkit.adapter import AdapterConfig, AdapterModule, AdditiveModule, Base
from adapterkit.adapters.nested import config_of, described
from adapterkit.contract.config import BaseValues
from adapterkit.contract.factors import Factors
from adapterkit.errors import ConfigError, IncompatibleTargetError, shown
from adapterkit.kernels import low_rank
from adapterkit.kernels.weights import apply_weight, is_transposed
from adapterkit.points import InjectionPoint, Kind, WeightLayout

_LAYOUT = "tied_layout"
"""What the part's module knows of the layer that it was built for."""


class TiedModule(AdditiveModule):
    """What the part does to the weight, in one of the layers that have it.

    The part was built for one of them, and has `W' = merged(W)`. Where another reads the same tensor the other way
    round, as a head does what an embedding looks up, its weight is `merged(W^T)^T`.

    Args:
        point: Where.
    """

    shared: Any

    def __init__(self, point: InjectionPoint) -> None:
        super().__init__()
        self.layout: WeightLayout = point.layout
        self.tied, self.first = point.tied, point.tied == point.id

    def bind(self, shared: nn.Module) -> None:
        """See `AdapterModule.bind`: it can what the part can."""
        super().bind(shared.train(self.training))
        part = cast("AdapterModule", shared)
        can = {name: getattr(part.abilities, name) for name in ("delta", "adds", "low_rank", "merge")}
        self.abilities = dataclasses.replace(self.abilities, forward=not part.abilities.adds, **can)
        self.from_base = self.first and part.from_base and part.abilities.initialise
        self.scalable = part.scalable

    @property
    def turned(self) -> bool:
        """Whether this layer has the weight the other way round than the part's."""
        return is_transposed(self.layout) != is_transposed(self.shared.__dict__[_LAYOUT])

    def factors(self) -> Factors | None:
        found = self.shared.factors() if self.abilities.low_rank else None
        if found is None:
            return None
        a, b = (found.B.mT, found.A.mT) if self.turned else (found.A, found.B)
        return Factors(a, b, self.layout, found.scale)

    def delta(self, x: Tensor) -> Tensor:
        factors = self.factors()
        if factors is not None:
            return low_rank.update(x, factors)
        if self.layout == self.shared.__dict__[_LAYOUT]:
            return self.shared.delta(x)
        delta = self.delta_weight()
        return apply_weight(x, delta.to(x.dtype) if x.is_floating_point() else delta, self.layout)

    def delta_weight(self) -> Tensor:
        delta = self.shared.delta_weight()
        return delta.mT if self.turned else delta

    def forward(self, x: Tensor, base: Base) -> Tensor:
        if self.abilities.adds:
            y = base(x)
            return y + self.added(x, y)
        if self.layout == self.shared.__dict__[_LAYOUT]:
            return self.shared(x, base)
        return AdapterModule.forward(self, x, base)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if not self.turned:
            return self.shared.merged(weight, bias)
        return self.shared.merged(weight.mT, None)[0].mT, bias

    def initialise(self, weight: Tensor, bias: Tensor | None) -> None:
        self.shared.initialise(weight, bias)

    def penalty(self) -> Tensor | None:
        return self.shared.penalty() if self.first else None


@dataclass(frozen=True)
class Tied(AdapterConfig):
    """An adapter of one weight, in every layer that has it: where a base ties its head to its token embedding, in both.

        Tied(LoRA(rank=8))                  one pair of factors: W + B A is looked up, and its rows are the head's
        Tied(Trainable(rows=(5, 9)))        two tokens' vectors, as they are read and as they are written

    It merges into the one weight, which stays tied, and goes on in both where `resize_token_embeddings` adds rows. The
    same config at `embed.tokens head` without it has parameters of its own in each, and a merge unties them.

    Attributes:
        part: What it does: a type that acts at weights and merges. Its own `targets` say nothing here.
        targets: All layers that have the weight.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"weight"})
    part: AdapterConfig = field(default_factory=lambda: _default())
    targets: str = field(default="embed.tokens head", kw_only=True)

    @property
    def neutral(self) -> bool:  # type: ignore[override]
        """Whether the part is."""
        return self.part.neutral

    @property
    def exact_gradients(self) -> bool:  # type: ignore[override]
        """Whether the part has them."""
        return self.part.exact_gradients

    def problems(self) -> list[str]:
        part: Any = self.part
        if not isinstance(part, AdapterConfig):
            return [f"part must be an adapter config, not {shown(part)}"]
        told = "settings are of single points, and all of these have the same"
        found = [told] if any(self.settings.values()) or part.settings else []
        if "weight" not in part.kinds:
            found.append(f"{type(part).__name__} does not act at weights")
        if part.observations:
            found.append(f"{type(part).__name__} starts from the inputs of one layer, and here it is in several")
        return found

    def accepts(self, point: InjectionPoint) -> str | None:
        if not point.tied:
            name = type(self.part).__name__
            return f"its weight is no other layer's too: there {name} does the same alone"
        return super().accepts(point) or (self.part.accepts(point) if point.tied == point.id else None)

    def selection_problems(self, points: Sequence[InjectionPoint]) -> list[str]:
        names = dict.fromkeys(point.tied for point in points)
        if len(names) > 1:
            return [f"targets are of one tied weight, and {' and '.join(names)} are several: narrow them"]
        if len(points) < 2 or all(point.tied != point.id for point in points):
            return [f"targets must name all layers that have the weight of {next(iter(names))}"]
        return []

    def shared(self, points: Sequence[InjectionPoint]) -> nn.Module | None:
        """The part's own module, for the first of the layers."""
        first = next(point for point in points if point.tied == point.id)
        module = self.part.build(first)
        name = type(self.part).__name__
        if not module.abilities.merge or module.parts:
            raise IncompatibleTargetError(f"{name} has no equivalent weight, which several layers could have")
        if self.part.shared([first]) is not None:
            raise IncompatibleTargetError(
                f"{name} shares a part of its own among points, and cannot be one for them all"
            )
        module.__dict__.update({"at": first.id, _LAYOUT: first.layout})
        return module

    def build(self, point: InjectionPoint) -> TiedModule:
        return TiedModule(point)

    def rate(self, parameter: str, point: InjectionPoint) -> float:
        """The part's own."""
        return self.part.rate(parameter.removeprefix("shared."), point)

    def observed(self, modules: Mapping[str, AdapterModule], base: BaseValues) -> None:
        self.part.observed(_inner(modules), base)

    @property
    def adapts(self) -> bool:
        return self.part.adapts

    def after_step(self, modules: Mapping[str, AdapterModule], step: int, steps: int | None) -> None:
        self.part.after_step(_inner(modules), step, steps)

    def to_dict(self) -> dict[str, Any]:
        """See `AdapterConfig.to_dict`. The part as its type's name and its config.

        Raises:
            PluginError: The part's type is not registered.
        """
        return {"part": described(self.part), "targets": self.targets}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Tied:
        if "part" not in values:
            raise ConfigError(["part must be a type with its config"], "Tied")
        return super().from_dict({**values, "part": config_of(values["part"], "Tied")})


def _default() -> AdapterConfig:
    from adapterkit.adapters.lora import LoRA

    return LoRA()


def _inner(modules: Mapping[str, AdapterModule]) -> dict[str, AdapterModule]:
    """The part's module, at the layer that it was built for."""
    return {key: one.shared for key, one in modules.items() if isinstance(one, TiedModule) and one.first}
