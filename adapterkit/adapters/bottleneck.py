"""Bottleneck adapters: a small two-layer network after, or beside, a sublayer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapterkit.adapter import AdapterConfig, AdapterModule, Base, Sublayer
from adapterkit.errors import did_you_mean
from adapterkit.points import InjectionPoint, Kind

_MAX_WIDTH = 2**16
_MAX_EXPANSION = 64
_MAX_SCALE = 1e4

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
}

# What the network sees, from the residual stream x, the sublayer's output s, and the sublayer's neighbours.
INPUTS: dict[str, Callable[[Tensor, Tensor, Sublayer], Tensor]] = {
    "pfeiffer": lambda x, s, base: base.norm_out(s + x),
    "houlsby": lambda x, s, base: s,
    "parallel": lambda x, s, base: x,
    "parallel_norm": lambda x, s, base: base.norm_in(x),
}


class BottleneckModule(AdapterModule):
    """`s + scale * A(h)`, where `A(h) = up(f(down(h)))` and `INPUTS[form]` is h. `up` starts at zero: no effect.

    Args:
        features: Width of the residual stream.
        width: Of the hidden layer: `down` is [width, features], `up` [features, width], both with a bias.
        form: A key of `INPUTS`.
        activation: A key of `ACTIVATIONS`.
        scaling: A fixed factor, or None for one that is learnt, `scale` [], and starts at 1.
        dropout: Probability of zeroing an element of A's output in training.
    """

    def __init__(
        self, features: int, width: int, form: str, activation: str, scaling: float | None, dropout: float
    ) -> None:
        super().__init__()
        self.form, self.activation = form, activation
        self.down = nn.Linear(features, width)
        self.up = nn.Linear(width, features)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        self.scale = nn.Parameter(torch.ones(())) if scaling is None else scaling
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, x: Tensor, base: Base) -> Tensor:
        """See `AdapterModule.forward`. x and s are [batch, length, features]."""
        s = base(x)
        h = INPUTS[self.form](x, s, cast("Sublayer", base))
        h = ACTIVATIONS[self.activation](_linear(self.down, h))
        h = self.dropout(_linear(self.up, h)) * self.scale
        return s + h.to(s.dtype)


@dataclass(frozen=True)
class Bottleneck(AdapterConfig):
    """A two-layer network per sublayer, whose output is added to the sublayer's, before the block's residual add.

    With x the residual stream, s = sublayer(norm_in(x)) and A the network, the sublayer's output becomes

        pfeiffer       s + A(norm_out(s + x))     Pfeiffer et al. 2020 (arXiv:2005.00247); alone after "mlp"
        houlsby        s + A(s)                   Houlsby et al. 2019 (arXiv:1902.00751); after "attn mlp"
        parallel       s + A(x)                   He et al. 2021 (arXiv:2110.04366), on the stream as it is
        parallel_norm  s + A(norm_in(x))          He et al. 2021, on what the sublayer itself sees

    norm_in is the identity in post-norm blocks (which end in norm_out(s + x)), norm_out in pre-norm blocks (x + s).

    Attributes:
        targets: Sublayer outputs: "attn", "mlp" or "attn mlp"; "cross" where there is cross attention.
        form: One of the four above.
        reduction: The hidden width is features / reduction, rounded down, and at least 1.
        width: The hidden width itself; takes the place of `reduction`.
        activation: relu, gelu, gelu_new (by tanh), silu or tanh.
        scaling: Factor on A, or "learned" for a parameter that starts at 1.
        dropout: Probability of zeroing an element of A's output in training.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"output"})
    targets: str = "mlp"
    form: str = "pfeiffer"
    reduction: float = 16
    width: int | None = None
    activation: str = "relu"
    scaling: float | str = 1.0
    dropout: float = 0.0

    def problems(self) -> list[str]:
        """See `AdapterConfig.problems`."""
        found = [*_choice("form", self.form, INPUTS), *_choice("activation", self.activation, ACTIVATIONS)]
        if isinstance(self.reduction, (int, float)) and not 1 / _MAX_EXPANSION <= self.reduction <= _MAX_WIDTH:
            found.append(f"reduction must be from 1/{_MAX_EXPANSION} to {_MAX_WIDTH}, not {self.reduction!r}")
        if isinstance(self.width, int) and not 1 <= self.width <= _MAX_WIDTH:
            found.append(f"width must be None or from 1 to {_MAX_WIDTH}, not {self.width!r}")
        if isinstance(self.scaling, str) and self.scaling != "learned":
            found.append(f"scaling must be a number or 'learned', not {self.scaling!r}")
        if isinstance(self.scaling, (int, float)) and abs(self.scaling) > _MAX_SCALE:
            found.append(f"scaling must be within {_MAX_SCALE:g}, not {self.scaling!r}")
        if isinstance(self.dropout, (int, float)) and not 0 <= self.dropout < 1:
            found.append(f"dropout must be at least 0 and less than 1, not {self.dropout!r}")
        return found

    def build(self, point: InjectionPoint) -> BottleneckModule:
        """See `AdapterConfig.build`."""
        features = point.out_features
        width = self.width or max(1, int(features / self.reduction))
        scaling = None if self.scaling == "learned" else float(self.scaling)
        return BottleneckModule(features, width, self.form, self.activation, scaling, self.dropout)


def _linear(layer: nn.Linear, h: Tensor) -> Tensor:
    """The layer in h's dtype: its weights are small and are cast, h is large and is not."""
    return F.linear(h, layer.weight.to(h.dtype), layer.bias.to(h.dtype))


def _choice(name: str, value: object, known: dict[str, Callable[..., Tensor]]) -> list[str]:
    if not isinstance(value, str) or value in known:
        return []
    return [f"{name} must be one of {', '.join(known)}, not {value!r}.{did_you_mean(value, known)}"]
