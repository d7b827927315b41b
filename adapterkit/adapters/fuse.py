"""AdapterFusion: a learnt attention over the effects of other adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapterkit.adapter import AdapterConfig, AdapterModule, Base, Part, Sublayer
from adapterkit.points import InjectionPoint, Kind

_MAX_TEMPERATURE = 1e4
_OFF_DIAGONAL = 1e-6


QUERIES: dict[str, Callable[[Tensor, Tensor, Sublayer, Any], Tensor]] = {
    "sum": lambda x, s, base, last: base.norm_out(s + x),
    "output": lambda x, s, base, last: s,
    "part": lambda x, s, base, last: last.sees(x, base),
}
"""What a query may be made from, given the stream x, the sublayer's output s, the base, and the last part."""


class FuseModule(AdapterModule):
    """`s + sum_i p_i V u_i` with `p = softmax(q K u / temperature)`; see `Fuse`.

    Args:
        features: d, the width of the stream.
        parts: Names of the n adapters.
        value: Whether V is learnt, [d, d]; it starts near the identity.
        temperature: Divides the logits.
        dropout: On the logits, in training.
        regularisation: Factor of the penalty on V.
        query: What the query is made from; see `QUERIES`.
    """

    def __init__(
        self,
        features: int,
        parts: tuple[str, ...],
        value: bool,
        temperature: float,
        dropout: float,
        regularisation: float,
        query: str = "sum",
    ) -> None:
        super().__init__()
        self.parts, self.temperature, self.regularisation = parts, temperature, regularisation
        self.sees_as = query
        self.query = nn.Linear(features, features)
        self.key = nn.Linear(features, features, bias=False)  # a bias would move all logits alike
        for layer in (self.query, self.key):
            nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(self.query.bias)
        start = torch.full((features, features), _OFF_DIAGONAL).fill_diagonal_(1.0)
        self.value = nn.Parameter(start) if value else None
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def combine(self, x: Tensor, base: Base, parts: Sequence[Part]) -> Tensor:
        """See `AdapterModule.combine`. x and s are [batch, length, d], u [batch, length, n, d]."""
        s = base(x)
        u = torch.stack([part(x, base) - s for part in parts], dim=-2)
        return s + self.fused(QUERIES[self.sees_as](x, s, cast("Sublayer", base), parts[-1]), u)

    def fused(self, h: Tensor, u: Tensor) -> Tensor:
        """The attention of h [..., d] over u [..., n, d]."""
        query = F.linear(h, self.query.weight.to(h.dtype), self.query.bias.to(h.dtype))
        logits = (F.linear(u, self.key.weight.to(u.dtype)) @ query.unsqueeze(-1)).squeeze(-1)
        p = torch.softmax(self.dropout(logits) / self.temperature, dim=-1)
        mixed = (p.unsqueeze(-2) @ u).squeeze(-2)  # V is linear: it is applied to the mean, not to each of n
        return mixed if self.value is None else F.linear(mixed, self.value.to(mixed.dtype))

    def penalty(self) -> Tensor | None:
        """`regularisation * ||I - V||^2`: keeps V near the identity."""
        if self.value is None or not self.regularisation:
            return None
        identity = torch.eye(len(self.value), device=self.value.device, dtype=self.value.dtype)
        return self.regularisation * (identity - self.value).square().sum()


@dataclass(frozen=True)
class Fuse(AdapterConfig):
    """AdapterFusion (Pfeiffer et al. 2021, arXiv:2005.00247, eq. 1): attention over what adapters do, token by token.

    With s the sublayer's output, x the residual stream, u_i the effect of adapter i, and h = norm_out(s + x):

        p = softmax_i((Q h) . (K u_i) / temperature)        s + sum_i p_i V u_i

    `query` may choose another h.

    The parts must be attached before, and are not trained by it: `adapters.train("fusion")` is what `add` does. It has
    an effect from the start: nearly the mean of theirs.

    Attributes:
        parts: Names of the adapters, at least one. One that does not act at a point has no effect there.
        targets: Sublayer outputs where the parts act.
        value: Whether V is learnt; otherwise it is the identity.
        temperature: See above.
        dropout: Probability of zeroing a logit in training.
        regularisation: Training adds this times `||I - V||^2` of every point.
        query: What h is: the "sum" above, the sublayer's "output" s, or what the last "part" sees, as in AdapterHub.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"output"})
    neutral: ClassVar[bool] = False
    parts: tuple[str, ...] = ()
    targets: str = field(default="mlp", kw_only=True)
    value: bool = True
    temperature: float = 1.0
    dropout: float = 0.0
    regularisation: float = 0.01
    query: str = "sum"

    def problems(self) -> list[str]:
        found = []
        if self.query not in QUERIES:
            found.append(f"query must be one of {', '.join(QUERIES)}, not {self.query!r}")
        names = isinstance(self.parts, tuple) and all(isinstance(part, str) for part in self.parts)
        if not names or not self.parts or len(set(self.parts)) < len(self.parts):
            found.append(f"parts must be a tuple of different adapter names, at least one, not {self.parts!r}")
        if (
            isinstance(self.temperature, (int, float))
            and not 1 / _MAX_TEMPERATURE <= self.temperature <= _MAX_TEMPERATURE
        ):
            found.append(
                f"temperature must be from 1/{_MAX_TEMPERATURE:g} to {_MAX_TEMPERATURE:g}, not {self.temperature!r}"
            )
        if isinstance(self.dropout, (int, float)) and not 0 <= self.dropout < 1:
            found.append(f"dropout must be at least 0 and less than 1, not {self.dropout!r}")
        if isinstance(self.regularisation, (int, float)) and self.regularisation < 0:
            found.append(f"regularisation must not be negative, but it is {self.regularisation!r}")
        return found

    def build(self, point: InjectionPoint) -> FuseModule:
        return FuseModule(
            point.out_features,
            self.parts,
            self.value,
            self.temperature,
            self.dropout,
            self.regularisation,
            self.query,
        )
