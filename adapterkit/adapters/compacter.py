"""Compacter: bottleneck adapters whose weights are sums of Kronecker products with matrices that all layers share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapterkit.adapters.sublayer_net import SublayerNet, SublayerNetModule
from adapterkit.points import InjectionPoint

_MAX_N = 64
_MAX_RANK = 2**12
_MAX_RANGE = 1e2


def _starts(std: float) -> dict[str, Callable[[Tensor], Tensor]]:
    return {
        "glorot_uniform": nn.init.xavier_uniform_,
        "glorot_normal": nn.init.xavier_normal_,
        "normal": partial(nn.init.normal_, std=std),
    }


class Rule(nn.Module):
    """What all layers share: `rule` [n, n, n], the matrices S_1 ... S_n."""

    def __init__(self, n: int, std: float) -> None:
        super().__init__()
        self.rule = nn.Parameter(torch.empty(n, n, n))
        nn.init.normal_(self.rule, std=std)


class KroneckerLinear(nn.Module):
    """`x W + bias` with `W = sum_i kron(S_i, left_i right_i)`, [inputs, outputs].

    `left` is [n, inputs / n, rank], `right` [n, rank, outputs / n], `bias` [outputs].

    Args:
        inputs, outputs, n, rank: See above.
        start: Sets the factors' start values.
        rule_std: Standard deviation of an S of its own, `rule` [n, n, n]; None where it is given one.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        n: int,
        rank: int,
        start: Callable[[Tensor], Tensor],
        rule_std: float | None = None,
    ) -> None:
        super().__init__()
        self.rule = None if rule_std is None else nn.Parameter(torch.empty(n, n, n).normal_(std=rule_std))
        self.left = nn.Parameter(torch.empty(n, inputs // n, rank))
        self.right = nn.Parameter(torch.empty(n, rank, outputs // n))
        self.bias = nn.Parameter(torch.zeros(outputs))
        with torch.no_grad():
            for matrix in (*self.left, *self.right):
                start(matrix)

    def forward(self, x: Tensor, rule: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs], in x's dtype; the weight is small and is formed in the parameters' own."""
        return F.linear(x, self.weight(rule).to(x.dtype), self.bias.to(x.dtype))

    def weight(self, rule: Tensor) -> Tensor:
        """W transposed, [outputs, inputs], from S [n, n, n]."""
        blocks = torch.einsum("ipq,ikj->qjpk", rule.to(self.left), self.left @ self.right)
        return blocks.reshape(len(self.bias), -1)


class CompacterModule(SublayerNetModule):
    """`down` and `up` are `KroneckerLinear` with the S of `shared.rule`, or each with one of its own."""

    def __init__(self, features: int, width: int, config: Compacter) -> None:
        super().__init__(features, config)
        start = _starts(config.init_range)[config.init]
        std = None if config.shared_rule else config.init_range
        self.down = KroneckerLinear(features, width, config.n, config.rank, start, std)
        self.up = KroneckerLinear(width, features, config.n, config.rank, start, std)
        nn.init.zeros_(self.up.right)

    def reduce(self, h: Tensor) -> Tensor:
        return self.down(h, self._rule(self.down))

    def expand(self, h: Tensor) -> Tensor:
        return self.up(h, self._rule(self.up))

    def _rule(self, layer: KroneckerLinear) -> Tensor:
        return self.shared.rule if layer.rule is None else layer.rule


@dataclass(frozen=True)
class Compacter(SublayerNet):
    """Bottleneck adapters with few parameters (Karimi Mahabadi et al. 2021, arXiv:2106.04647, eqs. 4 to 6).

    Both weights of the network are, written for row vectors,

        W = sum_{i=1..n} kron(S_i, L_i R_i)        S_i [n, n],  L_i [in / n, rank],  R_i [rank, out / n]

    with S shared by all layers: n^3 numbers in all, and rank * (in + out) for a weight. The rest is as in `Bottleneck`,
    with the same fields. R of the upper weight starts at zero (there is no effect yet), unlike the paper's.

    Attributes:
        targets: See `Bottleneck`. "attn mlp" with form "houlsby" is Compacter; `plus_plus` is Compacter++.
        reduction: The hidden width is features / reduction, rounded down to a multiple of n, and at least n.
        width: The hidden width itself, a multiple of n.
        n: Number of products, which divides the features.
        rank: Of every L_i R_i.
        init: How L and R start: glorot_uniform, glorot_normal or normal.
        init_range: Standard deviation of S, and of L and R with init="normal".
        shared_rule: Whether all layers share S; otherwise both weights of every layer have one of their own.
    """

    inits: ClassVar[tuple[str, ...]] = tuple(_starts(1.0))
    common: ClassVar[frozenset[str]] = frozenset({"n", "init_range", "shared_rule"})
    targets: str = "attn mlp"
    form: str = "houlsby"
    reduction: float = 32
    activation: str = "gelu"
    init: str = "glorot_uniform"
    n: int = 4
    rank: int = 1
    init_range: float = 0.01
    shared_rule: bool = True

    @classmethod
    def plus_plus(cls, **changes: Any) -> Compacter:
        """Compacter++: after the feed-forward alone, as `Bottleneck.pfeiffer`."""
        return cls(**{"targets": "mlp", "form": "pfeiffer", **changes})

    def problems(self) -> list[str]:
        found = super().problems()
        for name, most in (("n", _MAX_N), ("rank", _MAX_RANK)):
            if not 1 <= getattr(self, name) <= most:
                found.append(f"{name} must be from 1 to {most}, not {getattr(self, name)!r}")
        if not 0 < self.init_range <= _MAX_RANGE:
            found.append(f"init_range must be more than 0 and at most {_MAX_RANGE:g}, not {self.init_range!r}")
        if not found and self.width is not None and self.width % self.n:
            found.append(f"width must be a multiple of n={self.n}, not {self.width!r}")
        return found

    def accepts(self, point: InjectionPoint) -> str | None:
        if point.kind in self.kinds and point.out_features % self.n:
            return f"n={self.n} does not divide its {point.out_features} features"
        return super().accepts(point)

    def width_at(self, point: InjectionPoint) -> int:
        return self.width or max(1, int(point.out_features / self.reduction / self.n)) * self.n

    def build(self, point: InjectionPoint) -> CompacterModule:
        return CompacterModule(point.out_features, self.width_at(point), self)

    def shared(self, points: Sequence[InjectionPoint]) -> Rule | None:
        return Rule(self.n, self.init_range) if self.shared_rule else None
