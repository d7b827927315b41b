"""Bottleneck adapters: a small two-layer network after, or beside, a sublayer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from adapterkit.adapters.sublayer_net import ACTIVATIONS, INPUTS, RESIDUALS, SublayerNet, SublayerNetModule, linear
from adapterkit.points import InjectionPoint

__all__ = ["ACTIVATIONS", "INITS", "INPUTS", "RESIDUALS", "Bottleneck", "BottleneckModule"]

_BERT_STD = 0.02
_HOULSBY_STD = 0.01


def _lora(down: nn.Linear, up: nn.Linear) -> None:
    nn.init.zeros_(up.weight)
    nn.init.zeros_(up.bias)


def _mam(down: nn.Linear, up: nn.Linear) -> None:
    _lora(down, up)
    nn.init.zeros_(down.bias)


def _bert(down: nn.Linear, up: nn.Linear) -> None:
    for layer in (down, up):
        nn.init.normal_(layer.weight, std=_BERT_STD)
        nn.init.zeros_(layer.bias)


def _houlsby(down: nn.Linear, up: nn.Linear) -> None:
    for layer in (down, up):
        nn.init.trunc_normal_(layer.weight, std=_HOULSBY_STD, a=-2 * _HOULSBY_STD, b=2 * _HOULSBY_STD)
        nn.init.zeros_(layer.bias)


INITS: dict[str, Callable[[nn.Linear, nn.Linear], None]] = {
    "lora": _lora,
    "mam": _mam,
    "bert": _bert,
    "houlsby": _houlsby,
}


class BottleneckModule(SublayerNetModule):
    """`down` is [width, features], `up` [features, width], both with a bias."""

    def __init__(self, features: int, width: int, config: SublayerNet) -> None:
        super().__init__(features, config)
        self.down, self.up = nn.Linear(features, width), nn.Linear(width, features)
        INITS[config.init](self.down, self.up)

    def reduce(self, h: Tensor) -> Tensor:
        return linear(self.down, h)

    def expand(self, h: Tensor) -> Tensor:
        return linear(self.up, h)


@dataclass(frozen=True)
class Bottleneck(SublayerNet):
    """A two-layer network per sublayer, whose output is added to the sublayer's, before the block's residual add.

    With x the residual stream, s = sublayer(norm_in(x)) and A the network, the sublayer's output becomes

        pfeiffer       s + A(norm_out(s + x))     Pfeiffer et al. 2020 (arXiv:2005.00247)
        houlsby        s + A(s)                   Houlsby et al. 2019 (arXiv:1902.00751)
        parallel       s + A(x)                   He et al. 2021 (arXiv:2110.04366), on the stream as it is
        parallel_norm  s + A(norm_in(x))          He et al. 2021, on what the sublayer itself sees

        A(h) = scaling * up(activation(down(norm_before(h)))) * gate(h)

    norm_in is the identity in post-norm blocks (which end in norm_out(s + x)), norm_out in pre-norm blocks (x + s).
    At a "hidden" target s is the block's whole output, behind its last norm, and nothing is added afterwards.

    The classmethods give each paper's own choice; every field can be changed: `Bottleneck.pfeiffer(width=8)`.

    Attributes:
        init: lora (up is zero, so it has no effect yet), mam (biases are zero too), bert (both normal, std 0.02),
            houlsby (both normal, std 0.01, cut at two deviations). The last two have a small effect from the start.
    """

    inits: ClassVar[tuple[str, ...]] = tuple(INITS)
    init: str = "lora"

    @property
    def neutral(self) -> bool:  # type: ignore[override]
        """Whether the network starts at zero, and nothing else changes the output."""
        return self.init in ("lora", "mam") and self.residual == "sublayer" and self.norm_after is None

    def build(self, point: InjectionPoint) -> BottleneckModule:
        return BottleneckModule(point.out_features, self.width_at(point), self)

    @classmethod
    def pfeiffer(cls, **changes: Any) -> Bottleneck:
        """`norm_out(A(norm_out(s + x)) + s + x)` after the feed-forward (arXiv:2005.00247; AdapterHub's `seq_bn`)."""
        return cls(**{"targets": "mlp", "form": "pfeiffer", "activation": "relu", "reduction": 16, **changes})

    @classmethod
    def houlsby(cls, **changes: Any) -> Bottleneck:
        """`norm_out(A(s) + s + x)` after both sublayers (arXiv:1902.00751; AdapterHub's `double_seq_bn`)."""
        return cls(**{"targets": "attn mlp", "form": "houlsby", "activation": "silu", "reduction": 16, **changes})

    @classmethod
    def parallel(cls, **changes: Any) -> Bottleneck:
        """`norm_out(s + 4 A(x) + x)` beside the feed-forward (arXiv:2110.04366; AdapterHub's `par_bn`).

        The paper's network sees what the feed-forward sees: `form="parallel_norm"` in a pre-norm block.
        """
        own = {"form": "parallel", "activation": "relu", "reduction": 2, "scaling": 4.0, "init": "mam"}
        return cls(**{"targets": "mlp", **own, **changes})

    @classmethod
    def adapter_plus(cls, **changes: Any) -> Bottleneck:
        """`y + c * A(y)` after a block, c one factor per channel (Steitz & Roth 2024, arXiv:2406.06820)."""
        own = {"form": "houlsby", "activation": "gelu", "width": 8, "scaling": "channel", "init": "houlsby"}
        return cls(**{"targets": "hidden", **own, "drop_path": 0.1, **changes})

    @classmethod
    def adaptformer(cls, **changes: Any) -> Bottleneck:
        """`s + 0.1 A(x)` beside the feed-forward of a vision transformer (Chen et al. 2022, arXiv:2205.13535).

        The paper's equation has a layer norm on x: `norm_before=True`; its published models have none.
        """
        own = {"form": "parallel", "activation": "relu", "width": 64, "scaling": 0.1, "init": "mam"}
        return cls(**{"targets": "mlp", **own, "hidden_dropout": 0.1, **changes})
