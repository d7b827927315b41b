"""PVeRA: VeRA with hidden features that training draws from a distribution (Fillioux et al. 2025, arXiv:2512.07703)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.errors import ShapeMismatchError
from adapterkit.kernels import low_rank
from adapterkit_peft_types.ranked import Ranked

_MAX_SEED, _MAX_START = 2**63 - 1, 1e4


class Projections(nn.Module):
    """A [2 rank, widest input] and B [widest output, rank], drawn from a seed as PEFT draws them, in float32."""

    def __init__(self, inputs: int, outputs: int, rank: int, seed: int, saved: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in (("A", (2 * rank, inputs)), ("B", (outputs, rank))):
            empty, bound = torch.empty(shape, dtype=torch.float32), math.sqrt(6 / shape[1])
            drawn = empty if empty.is_meta else empty.uniform_(-bound, bound, generator=generator)
            self.register_buffer(name, drawn, persistent=saved)
        self.register_buffer("widths", torch.tensor([inputs, outputs]))
        self.own = [inputs, outputs]
        self.register_load_state_dict_post_hook(_check_widths)


def _check_widths(module: nn.Module, incompatible: object) -> None:
    projections, widths = cast("Projections", module), cast("Tensor", module.widths)
    if not widths.is_meta and widths.tolist() != projections.own:
        told = f"the projections were drawn for widths {widths.tolist()}, and here they are {projections.own}"
        raise ShapeMismatchError(f"{told}: other numbers would be drawn", None, "shared/widths")


class PVeRAModule(ak.AdditiveModule):
    """`b * B z` with z of the mean and log-variance `d * A x`, [rank] each: d [2 rank], b [out]."""

    def __init__(self, point: ak.InjectionPoint, config: PVeRA) -> None:
        super().__init__()
        self.shape, self.layout = point.shape, point.layout
        self.d = nn.Parameter(torch.full((2 * config.rank,), float(config.d_initial)))
        self.b = nn.Parameter(torch.zeros(point.out_features))
        self.dropout = nn.Dropout(config.dropout) if config.dropout else None

    def product(self) -> ak.Factors:
        """The update with the mean."""
        rank, (out, width) = len(self.d) // 2, self.shape
        a = self.d[:rank, None] * self.shared.A[:rank, :width].to(self.d)
        return ak.Factors(a, self.b[:, None] * self.shared.B[:out].to(self.b), self.layout)

    def factors(self) -> ak.Factors | None:
        return None if self.training else self.product()

    def delta(self, x: Tensor) -> Tensor:
        if not self.training:
            return low_rank.update(x, self.product())
        out, width = self.shape
        x = x if self.dropout is None else self.dropout(x)
        a, d = self.shared.A[:, :width].to(x.dtype), self.d.to(x.dtype)
        mean, logarithm = (d * nn.functional.linear(x, a)).chunk(2, dim=-1)
        z = mean + torch.randn_like(mean) * torch.exp(0.5 * logarithm)
        return self.b.to(x.dtype) * nn.functional.linear(z, self.shared.B[:out].to(x.dtype))

    def delta_weight(self) -> Tensor:
        return low_rank.dense(self.product())


@dataclass(frozen=True)
class PVeRA(Ranked):
    """VeRA of the mean; training draws from the normal distribution of the variance that is learnt beside it.

    Attributes:
        rank: Of the projections.
        dropout: Of the input, in training.
        d_initial: Where d starts.
        seed: Of A and B.
        save_projection: Whether files hold A and B; otherwise they are drawn again.
    """

    common: ClassVar[frozenset[str]] = frozenset({"rank", "seed", "save_projection"})
    forms: ClassVar[frozenset[str] | None] = frozenset({"linear", "linear_t"})
    rank: int = 256
    d_initial: float = 0.1
    seed: int = 0
    save_projection: bool = True

    def problems(self) -> list[str]:
        found = super().problems()
        if not 0 < abs(self.d_initial) <= _MAX_START:
            found.append(f"d_initial must not be 0 and within {_MAX_START:g}, not {self.d_initial!r}")
        if not 0 <= self.seed <= _MAX_SEED:
            found.append(f"seed must be from 0 to {_MAX_SEED}, not {self.seed!r}")
        return found

    def accepts(self, point: ak.InjectionPoint) -> str | None:
        if point.is_read:
            return "the model reads this weight, and PVeRA draws random numbers for its input in training; use VeRA"
        return super().accepts(point)

    def build(self, point: ak.InjectionPoint) -> PVeRAModule:
        return PVeRAModule(point, self)

    def shared(self, points: Sequence[ak.InjectionPoint]) -> Projections:
        inputs, outputs = (max(point.shape[i] for point in points) for i in (1, 0))
        return Projections(inputs, outputs, self.rank, self.seed, self.save_projection)
