"""Low-rank adaptation: a weight's update as the product of two thin factors."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from adapterkit.adapter import AdapterConfig, AdditiveModule
from adapterkit.kernels.weights import apply_weight, mix_features
from adapterkit.points import InjectionPoint, Kind, WeightLayout
from adapterkit.selectors import Selector

_MAX_RANK, _MAX_SCALE = 2**16, 1e4


class LoRAModule(AdditiveModule):
    """`base(x) + scale * B(A(x))`: A [rank, in / groups, *kernel] computes as the module does, B [out, rank] mixes.

    An embedding's indices cannot be dropped out: there, dropout acts on the rows that A looks up.
    """

    def __init__(self, point: InjectionPoint, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        out, *rest = point.shape
        self.layout, self.scale = cast("WeightLayout", point.layout), scale
        self.A, self.B = nn.Parameter(torch.zeros(rank, *rest)), nn.Parameter(torch.zeros(out, rank))
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        if self.layout.form == "embedding":
            nn.init.normal_(self.B)
        else:
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def delta(self, x: Tensor) -> Tensor:
        """See `AdditiveModule`. The factors are cast to x's dtype, never x to theirs: they are small, and x is not."""
        if self.layout.form == "embedding":
            h = self.dropout(apply_weight(x, self.A, self.layout))
        else:
            h = apply_weight(self.dropout(x), self.A.to(x.dtype), self.layout)
        return mix_features(h, self.B.to(h.dtype), self.layout) * self.scale

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `AdapterModule.merged`: one pass over the weight."""
        a, b = self.A.to(weight.dtype).flatten(1), self.B.to(weight.dtype)
        return torch.addmm(weight.flatten(1), b, a, alpha=self.scale).view(weight.shape), bias

    def delta_weight(self) -> Tensor:
        """`scale * B A` in float32 or wider, so that a merge rounds once."""
        dtype = torch.promote_types(self.A.dtype, torch.float32)
        product = self.B.to(dtype) @ self.A.to(dtype).flatten(1)
        return product.unflatten(1, self.A.shape[1:]) * self.scale


@dataclass(frozen=True)
class LoRA(AdapterConfig):
    """`W + alpha / rank * B A` (Hu et al. 2021, arXiv:2106.09685, eq. 3), with its convolution and embedding forms.

    Attributes:
        rank: Rank of the update.
        alpha: None means the rank of the point, so that the update is scaled by 1.
        dropout: Probability of zeroing an element of the input in training.
        ranks: Selector -> rank of the points that it matches; the last match wins.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"weight"})
    targets: str = "attention"
    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    ranks: Mapping[str, int] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        with contextlib.suppress(TypeError, ValueError):  # what makes no mapping is told by problems()
            object.__setattr__(self, "ranks", dict(self.ranks))
        super().__post_init__()

    def to_dict(self) -> dict[str, Any]:
        """See `AdapterConfig.to_dict`. `ranks` as pairs: its order matters, and an object's keys have none."""
        return {**super().to_dict(), "ranks": [list(pair) for pair in self.ranks.items()]}

    def problems(self) -> list[str]:
        """See `AdapterConfig.problems`."""
        if not isinstance(self.ranks, Mapping):
            return [f"ranks must map selectors to ranks, not {self.ranks!r}"]
        ranks = {"rank": self.rank, **{f"ranks[{Selector(key).text!r}]": rank for key, rank in self.ranks.items()}}
        wrong = {key: r for key, r in ranks.items() if type(r) is not int or not 1 <= r <= _MAX_RANK}
        found = [f"{key} must be an int from 1 to {_MAX_RANK}, not {r!r}" for key, r in wrong.items()]
        if isinstance(self.dropout, (int, float)) and not 0 <= self.dropout < 1:
            found.append(f"dropout must be at least 0 and less than 1, not {self.dropout!r}")
        if not found and isinstance(self.alpha, (int, float)) and abs(self.alpha) > _MAX_SCALE * min(ranks.values()):
            found.append(f"alpha / rank must be within {_MAX_SCALE:g}, not {self.alpha!r} / {min(ranks.values())}")
        return found

    def selection_problems(self, points: Sequence[InjectionPoint]) -> list[str]:
        """See `AdapterConfig.selection_problems`: a rank that no point receives is a typo."""
        idle = [key for key in self.ranks if not any(Selector(key).matches(point) for point in points)]
        roles = ", ".join(sorted({point.role for point in points}))
        shown = ", ".join(repr(key) for key in idle[:5]) + (f" and {len(idle) - 5} more" if len(idle) > 5 else "")
        return [f"ranks: {shown} match none of the selected points (roles: {roles})"] if idle else []

    def accepts(self, point: InjectionPoint) -> str | None:
        """See `AdapterConfig.accepts`."""
        layout = point.layout
        if isinstance(layout, WeightLayout) and layout.groups > 1 and point.span:
            return "LoRA acts on whole grouped convolutions"
        if isinstance(layout, WeightLayout) and layout.access == "read" and self.dropout:
            return "the model reads this weight, whose input dropout cannot reach: set dropout=0 here"
        return super().accepts(point)

    def build(self, point: InjectionPoint) -> LoRAModule:
        """See `AdapterConfig.build`."""
        rank = [self.rank, *(r for key, r in self.ranks.items() if Selector(key).matches(point))][-1]
        return LoRAModule(point, rank, (rank if self.alpha is None else self.alpha) / rank, self.dropout)
