"""Low-rank adaptation: a weight's update as the product of two thin factors."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from adapterkit.adapter import AdapterConfig, AdapterModule, AdditiveModule
from adapterkit.adapters.low_rank import FROM_DATA, INITS, KEPT, LowRank
from adapterkit.contract.config import BaseValues
from adapterkit.contract.factors import Factors
from adapterkit.contract.fields import is_number
from adapterkit.errors import did_you_mean, shown
from adapterkit.kernels import low_rank
from adapterkit.points import InjectionPoint, Kind, WeightPoint
from adapterkit.selectors import Table

_MAX_RANK, _MAX_SCALE, _MAX_PLUS = 2**16, 1e4, 1e4
_OBSERVED_BATCHES = 8

SCALINGS = {"standard": lambda rank: rank, "rank_stabilized": math.sqrt}
"""What alpha is divided by."""


class LoRAModule(LowRank, AdditiveModule):
    """`base(x) + update(x)`; see `LowRank`."""

    def factors(self) -> Factors | None:
        return None if self.dropping else self.product()

    delta = LowRank.update  # type: ignore[assignment]

    def delta_weight(self) -> Tensor:
        return low_rank.dense(self.product())

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `AdapterModule.merged`: one pass over the weight."""
        return low_rank.added(weight, self.product()), bias


class UngroupedLoRA(LowRank, AdditiveModule):
    """The update of a convolution without groups, beside one that has some: no weight of that one would have it.

    Args:
        point: A grouped convolution.
        arguments: The others of `LowRank`.
    """

    def __init__(self, point: InjectionPoint, *arguments: Any) -> None:
        layout = dataclasses.replace(point.layout, groups=1)
        super().__init__(dataclasses.replace(point, layout=layout), *arguments)

    delta = LowRank.update  # type: ignore[assignment]


@dataclass(frozen=True)
class LoRA(AdapterConfig):
    """`W + alpha / rank * B A` (Hu et al. 2021, arXiv:2106.09685, eq. 3), with its convolution and embedding forms.

    How it starts, by `init`; the effect is zero in every case, and the base is never changed:

        default     A uniform as a layer's weight, B zero
        gaussian    A normal with standard deviation 1 / rank, B zero
        orthogonal  A with orthonormal rows, B zero
        pissa       the weight's principal part (Meng et al. 2024, arXiv:2404.02948)
        olora       the weight's first QR factors (Buyukakyuz 2024, arXiv:2406.01775)
        eva         A from the principal directions of inputs (Paischer et al. 2024, arXiv:2410.07170)
        corda, corda_knowledge
                    the part of the weight that matters most, or least, to inputs of their covariance (Yang et al. 2024,
                    arXiv:2406.05223)
        lora_ga     the gradient's first `2 * rank` directions (Wang et al. 2024, arXiv:2407.05000)

    The last four are shown data in `Adapters.observing`, or by training, and start as default until then; lora_ga needs
    backwards of the loss there.

    Attributes:
        rank: Rank of the update.
        alpha: None means the rank of the point, so that the update is scaled by 1.
        dropout: Probability of zeroing an element of the input in training.
        ranks: Selector -> rank of the points that it matches; the last match wins.
        alphas: Selector -> alpha, likewise.
        scaling: "standard" divides alpha by rank, "rank_stabilized" by its root (Kalajdzievski 2023, arXiv:2312.03732).
            Where alpha is None, the scale is 1 with either.
        rank_dropout: Probability of dropping a rank for a sample in training; the others are scaled up.
        module_dropout: Probability of dropping a point's whole update in training.
        init: See above.
        across_groups: Whether the update of a grouped convolution sees the inputs of all groups, as PEFT's does. Such
            an update does not merge.
        plus: Factor on the learning rate of B (LoRA+, Hayou et al. 2024, arXiv:2402.12354); see `parameter_groups`.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"weight"})
    targets: str = "attention"
    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    ranks: Mapping[str, int] = field(default_factory=dict, hash=False)
    alphas: Mapping[str, float] = field(default_factory=dict, hash=False)
    scaling: str = "standard"
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    init: str = "default"
    plus: float = 1.0
    across_groups: bool = False

    def __post_init__(self) -> None:
        for name in ("ranks", "alphas"):
            with contextlib.suppress(TypeError, ValueError):  # what makes no mapping is told by problems()
                object.__setattr__(self, name, dict(getattr(self, name)))
        super().__post_init__()

    def overridden(self, values: Mapping[str, Any]) -> LoRA:
        """See `AdapterConfig.overridden`: a point's own rank and alpha stand above those by selector."""
        many = {"ranks": "rank", "alphas": "alpha"}
        return super().overridden({**{name: {} for name, one in many.items() if one in values}, **values})

    def to_dict(self) -> dict[str, Any]:
        """See `AdapterConfig.to_dict`. Mappings as pairs: their order matters, and an object's keys have none."""
        pairs = {name: [list(pair) for pair in getattr(self, name).items()] for name in ("ranks", "alphas")}
        return {**super().to_dict(), **pairs}

    def problems(self) -> list[str]:
        for name in ("ranks", "alphas"):
            if not isinstance(getattr(self, name), Mapping):
                return [f"{name} must map selectors to numbers, not {shown(getattr(self, name))}"]
        _ = self._ranks, self._alphas  # a selector that cannot be parsed is an error now
        ranks = {"rank": self.rank, **{f"ranks[{shown(key)}]": rank for key, rank in self.ranks.items()}}
        wrong = {key: r for key, r in ranks.items() if type(r) is not int or not 1 <= r <= _MAX_RANK}
        found = [f"{key} must be an int from 1 to {_MAX_RANK}, not {shown(r)}" for key, r in wrong.items()]
        for name in ("dropout", "rank_dropout", "module_dropout"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                found.append(f"{name} must be at least 0 and less than 1, not {value!r}")
        found += [*_choice("scaling", self.scaling, SCALINGS), *_choice("init", self.init, INITS)]
        if not 0 < self.plus <= _MAX_PLUS:
            found.append(f"plus must be more than 0 and at most {_MAX_PLUS:g}, not {self.plus!r}")
        return found or self._alpha_problems(min(ranks.values()))

    def _alpha_problems(self, rank: int) -> list[str]:
        alphas: dict[str, Any] = {"alpha": self.alpha}
        alphas |= {f"alphas[{shown(key)}]": alpha for key, alpha in self.alphas.items()}
        found = []
        for key, alpha in alphas.items():
            if alpha is None and key == "alpha":
                continue
            if not is_number(alpha):
                found.append(f"{key} must be a number, not {shown(alpha)}")
            elif abs(alpha) > _MAX_SCALE * rank:
                found.append(f"{key} / rank must be within {_MAX_SCALE:g}, not {alpha!r} / {rank}")
            elif self.init == "pissa" and alpha <= 0:
                found.append(f"{key} must be positive with init='pissa', not {alpha!r}")
        return found

    def selection_problems(self, points: Sequence[InjectionPoint]) -> list[str]:
        """See `AdapterConfig.selection_problems`: a rank that no point receives is a typo."""
        roles, found = ", ".join(sorted({point.role for point in points})), []
        for name, table in (("ranks", self._ranks), ("alphas", self._alphas)):
            if idle := table.idle(points):
                shown = ", ".join(map(repr, idle[:5])) + (f" and {len(idle) - 5} more" if len(idle) > 5 else "")
                found.append(f"{name}: {shown} match none of the selected points (roles: {roles})")
        return found

    def accepts(self, point: InjectionPoint) -> str | None:
        if not isinstance(point, WeightPoint):
            return super().accepts(point)
        if point.cuts_groups:
            return f"{type(self).__name__} acts on whole grouped convolutions"
        if point.is_read and (self.dropout or self.rank_dropout or self.module_dropout):
            return "the model reads this weight, whose input dropout cannot reach: set every dropout to 0 here"
        if self._ungrouped(point) and (self.init in (*KEPT, *FROM_DATA) or point.is_read):
            return "across_groups adds beside a grouped convolution: the model must call it, and init be of no weight"
        if self.init in KEPT:
            rank, (out, *rest) = self.rank_at(point) * (1 + self.observes_gradients), point.shape
            if rank > (most := min(out, math.prod(rest))):
                return f"init={self.init!r} takes its rank from the weight, which has {most}, and {rank} is asked for"
        if self.init in FROM_DATA and (point.form == "embedding" or point.is_read):
            return f"init={self.init!r} needs an input with features, and there is none"
        return super().accepts(point)

    @functools.cached_property
    def _ranks(self) -> Table[int]:
        return Table(self.ranks)

    @functools.cached_property
    def _alphas(self) -> Table[float]:
        return Table(self.alphas)

    def rank_at(self, point: InjectionPoint) -> int:
        """The rank of a point."""
        own = self.at(point)
        return own._ranks.at(point, own.rank) if own.ranks else own.rank

    def scale_at(self, point: InjectionPoint) -> float:
        """The factor on the update of a point."""
        own = self.at(point)
        alpha = own._alphas.at(point, own.alpha) if own.alphas else own.alpha
        return 1.0 if alpha is None else alpha / SCALINGS[own.scaling](own.rank_at(point))

    def build(self, point: InjectionPoint) -> AdapterModule:
        made = UngroupedLoRA if self._ungrouped(point) else LoRAModule
        return made(*self.arguments(point))

    def _ungrouped(self, point: InjectionPoint) -> bool:
        return self.across_groups and point.layout.groups > 1

    def alike(self, point: InjectionPoint) -> tuple[Hashable, ...]:
        place = (type(point), point.shape, point.layout, point.span, point.in_span, self._ungrouped(point))
        return (*place, *self.arguments(point)[1:])

    def arguments(self, point: InjectionPoint) -> tuple[InjectionPoint, int, float, float, float, float, str]:
        """Those of `LowRank`."""
        dropouts = (self.dropout, self.rank_dropout, self.module_dropout)
        return (point, self.rank_at(point), self.scale_at(point), *dropouts, self.init)

    @property
    def observations(self) -> int:
        return _OBSERVED_BATCHES if self._inits & {*FROM_DATA} else 0

    @property
    def observes_gradients(self) -> bool:
        return "lora_ga" in self._inits

    @property
    def _inits(self) -> set[str]:
        return {self.init, *(self.at(key).init for key in self.settings)}

    def observed(self, modules: Mapping[str, AdapterModule], base: BaseValues) -> None:
        own = [(key, one) for key, one in modules.items() if isinstance(one, LowRank) and one.init in FROM_DATA]
        starts = [module.start_from_data(key, base) for key, module in own]  # all are known before any is set
        for (_, module), (a, b) in zip(own, starts, strict=True):
            module.begin(a, b)

    def rate(self, parameter: str, point: InjectionPoint) -> float:
        return self.plus if parameter == "B" else 1.0


def _choice(name: str, value: object, known: Sequence[str] | Mapping[str, object]) -> list[str]:
    if not isinstance(value, str) or value in known:
        return []
    return [f"{name} must be one of {', '.join(known)}, not {value!r}.{did_you_mean(value, known)}"]
