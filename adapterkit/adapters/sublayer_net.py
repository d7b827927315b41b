"""What bottleneck types share: a two-layer network that sees a sublayer, and where its output goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
_GATE_STD = 0.02

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu,
    "relu2": lambda h: F.relu(h).square(),
    "relu6": F.relu6,
    "mish": F.mish,
    "quick_gelu": lambda h: h * torch.sigmoid(1.702 * h),
    "identity": lambda h: h,
}

# What the network sees, from the residual stream x, the sublayer's output s, and the sublayer's neighbours.
INPUTS: dict[str, Callable[[Tensor, Tensor, Sublayer], Tensor]] = {
    "pfeiffer": lambda x, s, base: base.norm_out(s + x),
    "houlsby": lambda x, s, base: s,
    "parallel": lambda x, s, base: x,
    "parallel_norm": lambda x, s, base: base.norm_in(x),
}

# What its output is added to, from x, s and what it sees.
RESIDUALS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "sublayer": lambda x, s, h: s,
    "sum": lambda x, s, h: s + x,
    "input": lambda x, s, h: h,
}

NORMS_AFTER = ("network", "sum")
GATINGS = (False, True, "sequence")
_LEARNT: dict[object, Callable[[int], tuple[int, ...]]] = {
    "learned": lambda features: (),
    "channel": lambda features: (features,),
}


@dataclass(frozen=True)
class SublayerNet(AdapterConfig):
    """The fields of every bottleneck type.

    Attributes:
        targets: Sublayer outputs: "attn", "mlp" or "attn mlp"; "cross" where there is cross attention; "hidden".
        form: How the network sees its input: one of those of `Bottleneck`.
        reduction: The hidden width is features / reduction, rounded down, and at least 1.
        width: The hidden width itself; takes the place of `reduction`.
        activation: relu, gelu, gelu_new (by tanh), silu, tanh, sigmoid, leaky_relu, relu2 (squared), relu6, mish,
            quick_gelu (by sigmoid) or identity.
        scaling: Factor on the network's output A; "learned" for a parameter, "channel" for one per feature, which start
            at 1.
        init: How its weights start; "" for the type's own way.
        residual: What A is added to: the sublayer's output s, the "sum" s + x, or A's own "input". The last two count x
            twice in the block, where the block adds it again.
        norm_before: Whether A's input has a layer norm of its own.
        norm_after: A learnt layer norm over the "network" A, before it is added, or over the "sum"; None for none.
        gating: Whether every token has a gate, `sigmoid(w h + b)`; "sequence" for its mean over all positions, padding
            among them, as UniPELT has it (arXiv:2110.07577): a causal model then sees the future.
        hidden_dropout: Probability of zeroing an element of the hidden layer in training.
        dropout: Of A's output.
        drop_path: Of the whole of A, for each sample; what is kept is scaled up (stochastic depth, arXiv:1603.09382).
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"output"})
    inits: ClassVar[tuple[str, ...]] = ()
    targets: str = "mlp"
    form: str = "pfeiffer"
    reduction: float = 16
    width: int | None = None
    activation: str = "relu"
    scaling: float | str = 1.0
    init: str = ""
    residual: str = "sublayer"
    norm_before: bool = False
    norm_after: str | None = None
    gating: bool | str = False
    hidden_dropout: float = 0.0
    dropout: float = 0.0
    drop_path: float = 0.0

    def problems(self) -> list[str]:
        found = [
            *one_of("form", self.form, INPUTS),
            *one_of("activation", self.activation, ACTIVATIONS),
            *one_of("init", self.init, self.inits),
            *one_of("residual", self.residual, RESIDUALS),
            *([] if self.norm_after is None else one_of("norm_after", self.norm_after, NORMS_AFTER)),
        ]
        if self.gating not in GATINGS:
            found.append(f"gating must be one of {', '.join(map(str, GATINGS))}, not {self.gating!r}")
        if not 1 / _MAX_EXPANSION <= self.reduction <= _MAX_WIDTH:
            found.append(f"reduction must be from 1/{_MAX_EXPANSION} to {_MAX_WIDTH}, not {self.reduction!r}")
        if self.width is not None and not 1 <= self.width <= _MAX_WIDTH:
            found.append(f"width must be None or from 1 to {_MAX_WIDTH}, not {self.width!r}")
        if isinstance(self.scaling, str) and self.scaling not in _LEARNT:
            found.append(f"scaling must be a number or one of {', '.join(map(str, _LEARNT))}, not {self.scaling!r}")
        if not isinstance(self.scaling, str) and abs(self.scaling) > _MAX_SCALE:
            found.append(f"scaling must be within {_MAX_SCALE:g}, not {self.scaling!r}")
        rates = {name: getattr(self, name) for name in ("hidden_dropout", "dropout", "drop_path")}
        found += [f"{k} must be at least 0 and less than 1, not {v!r}" for k, v in rates.items() if not 0 <= v < 1]
        return found

    def accepts(self, point: InjectionPoint) -> str | None:
        if point.is_block and self.form == "pfeiffer":
            return "the output of a whole block holds the residual stream already: use form='houlsby' there"
        return super().accepts(point)

    def width_at(self, point: InjectionPoint) -> int:
        """The hidden width at a point."""
        return self.width or max(1, int(point.out_features / self.reduction))


class SublayerNetModule(AdapterModule):
    """`r + A(h)`, where `INPUTS[form]` is h, `RESIDUALS[residual]` is r, and A the network of `Bottleneck`.

    Subclasses set `down` and `up`, and say what `reduce` and `expand` compute with them.

    Args:
        features: d, the width of the residual stream.
        config: What it looks like.
    """

    def __init__(self, features: int, config: SublayerNet) -> None:
        super().__init__()
        self.config = config
        self.norm_before = nn.LayerNorm(features) if config.norm_before else None
        self.norm_after = nn.LayerNorm(features) if config.norm_after else None
        self.gate = nn.Linear(features, 1) if config.gating else None
        if self.gate is not None:
            nn.init.normal_(self.gate.weight, std=_GATE_STD)
            nn.init.zeros_(self.gate.bias)
        shape = _LEARNT.get(config.scaling)
        self.scale = float(config.scaling) if shape is None else nn.Parameter(torch.ones(shape(features)))

    def reduce(self, h: Tensor) -> Tensor:
        """[..., d] -> [..., width]."""
        raise NotImplementedError

    def expand(self, h: Tensor) -> Tensor:
        """[..., width] -> [..., d]."""
        raise NotImplementedError

    def forward(self, x: Tensor, base: Base) -> Tensor:
        """See `AdapterModule.forward`. x and s are [batch, length, d]."""
        s = base(x)
        h = INPUTS[self.config.form](x, s, cast("Sublayer", base))
        u = self.network(h).to(s.dtype)
        if self.config.norm_after == "network":
            u = layer_norm(self.norm_after, u)
        y = RESIDUALS[self.config.residual](x, s, h).to(s.dtype) + u
        return layer_norm(self.norm_after, y) if self.config.norm_after == "sum" else y

    def sees(self, x: Tensor, base: Base) -> Tensor:
        return INPUTS[self.config.form](x, base(x), cast("Sublayer", base))

    def network(self, h: Tensor) -> Tensor:
        """A(h), [batch, length, d]."""
        config = self.config
        hidden = ACTIVATIONS[config.activation](self.reduce(layer_norm(self.norm_before, h)))
        u = self.expand(F.dropout(hidden, config.hidden_dropout, self.training))
        u = u * (self.scale.to(u.dtype) if isinstance(self.scale, Tensor) else self.scale)
        if self.gate is not None:
            g = torch.sigmoid(linear(self.gate, h))
            u = u * (g.mean(1, keepdim=True) if config.gating == "sequence" else g)
        return F.dropout(self._drop_path(u), config.dropout, self.training)

    def _drop_path(self, u: Tensor) -> Tensor:
        """Zeroes whole samples in training, and scales up the others."""
        kept = 1 - self.config.drop_path
        if kept == 1 or not self.training:
            return u
        return u * u.new_empty((len(u), *(1,) * (u.ndim - 1))).bernoulli_(kept).div_(kept)


def linear(layer: nn.Linear, h: Tensor) -> Tensor:
    """The layer where h is and in its dtype: its weights are small and are cast, h is large and is not."""
    return F.linear(h, layer.weight.to(h), layer.bias.to(h))


def layer_norm(norm: nn.LayerNorm | None, h: Tensor) -> Tensor:
    """The norm, in h's dtype; h itself where there is none."""
    if norm is None:
        return h
    return F.layer_norm(h, norm.normalized_shape, norm.weight.to(h.dtype), norm.bias.to(h.dtype), norm.eps)


def one_of(name: str, value: str, known: tuple[str, ...] | Mapping[str, object]) -> list[str]:
    """What is wrong with a value that must be one of these."""
    if value in known:
        return []
    return [f"{name} must be one of {', '.join(known)}, not {value!r}.{did_you_mean(value, known)}"]
