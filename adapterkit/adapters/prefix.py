"""Prefix tuning: learnt keys and values in front of those that an attention computes."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from adapterkit.adapter import AdapterConfig, AdapterModule
from adapterkit.contract.base import Beside
from adapterkit.errors import ShapeMismatchError
from adapterkit.points import AttentionLayout, InjectionPoint, Kind

_MAX_LENGTH = _MAX_WIDTH = 2**16
_MAX_STD = 100.0

GATINGS = {"shared": 1, "separate": 2}
"""Ways of `Prefix.gating`, with the number of gates."""


class PrefixModule(AdapterModule):
    """Puts `length` learnt positions in front of keys and values.

    Subclasses say where the positions come from; both start with random keys and values of zero.
    """

    counted = False

    def prefix(self) -> tuple[Tensor, Tensor]:
        """The keys [kv_heads, length, head_dim] and values [kv_heads, length, value_width]."""
        raise NotImplementedError

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """See `AdapterModule.extend`. The result has the dtype of `keys`: attention wants one dtype."""
        front_keys, front_values = self.prefix()
        return _put_in_front(front_keys, keys), _put_in_front(front_values, values)


class PrefixGate(nn.Module):
    """One gate for keys and values, or one for each: `mean_t sigmoid(weight h_t + bias)`, h [batch, length, d]."""

    def __init__(self, features: int, count: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(count, features)), nn.Parameter(torch.zeros(count))

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Factors on keys and on values, [batch, 1, 1, 1].

        Raises:
            ShapeMismatchError: The attention is given tokens of another width than its keys are made from.
        """
        if h.shape[-1] != self.weight.shape[1]:
            told = f"the gate of a prefix was built for {self.weight.shape[1]} features, and the attention is given"
            raise ShapeMismatchError(f"{told} {h.shape[-1]}: set gating=None at such a cross attention")
        g = torch.sigmoid(nn.functional.linear(h, self.weight.to(h.dtype), self.bias.to(h.dtype))).mean(1)
        return g[:, 0].view(-1, 1, 1, 1), g[:, -1].view(-1, 1, 1, 1)


class GatedPrefix(PrefixModule):
    """A prefix whose keys and values are scaled for each sample, by what the attention's module is given.

    Args:
        inner: Where the positions come from.
        features: Of what the module is given.
        count: Of gates: one, or one for keys and one for values.
    """

    reads_input = True

    def __init__(self, inner: PrefixModule, features: int, count: int) -> None:
        super().__init__()
        self.inner, self.gate = inner, PrefixGate(features, count)

    def prefix(self) -> tuple[Tensor, Tensor]:
        return self.inner.prefix()

    def extend(self, keys: Tensor, values: Tensor, base: Beside) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """See `AdapterModule.extend`."""
        factors = self.gate(base.input)
        front = [part * factor.to(part.dtype) for part, factor in zip(self.prefix(), factors, strict=True)]
        return _put_in_front(front[0], keys), _put_in_front(front[1], values)


class DirectPrefix(PrefixModule):
    """`keys` [kv_heads, length, head_dim] and `values` [kv_heads, length, value_width] are the parameters."""

    def __init__(self, layout: AttentionLayout, length: int, init_std: float) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.empty(layout.kv_heads, length, layout.head_dim).normal_(std=init_std))
        self.values = nn.Parameter(torch.zeros(layout.kv_heads, length, layout.value_width))

    def prefix(self) -> tuple[Tensor, Tensor]:
        return self.keys, self.values


class ReparametrizedPrefix(PrefixModule):
    """A two-layer network makes the prefix: `up(tanh(down(embedding)))`.

    Args:
        layout: Heads of the keys and values: d = kv_heads * head_dim features of keys, v = kv_heads * value_width.
        length: Positions; `embedding` is [length, d].
        width: Of the hidden layer: `down` is [width, d] and `up` [d + v, width].
        init_std: Standard deviation of the rows of `up` that make keys; those that make values are zero.
    """

    def __init__(self, layout: AttentionLayout, length: int, width: int, init_std: float) -> None:
        super().__init__()
        features = layout.kv_heads * layout.head_dim
        self.kv_heads, self.widths = layout.kv_heads, (features, layout.kv_heads * layout.value_width)
        self.embedding = nn.Parameter(torch.randn(length, features))
        self.down = nn.Linear(features, width)
        self.up = nn.Linear(width, sum(self.widths))
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        nn.init.normal_(self.up.weight[:features], std=init_std)

    def prefix(self) -> tuple[Tensor, Tensor]:
        made = self.up(torch.tanh(self.down(self.embedding)))
        # Each [length, heads * width] -> [heads, length, width].
        keys, values = (part.unflatten(-1, (self.kv_heads, -1)).transpose(0, 1) for part in made.split(self.widths, -1))
        return keys, values


@dataclass(frozen=True)
class Prefix(AdapterConfig):
    """Li & Liang 2021 (arXiv:2101.00190), eq. 3, per attention: `softmax(q [P_k; k]^T) [P_v; v]`.

    At initialisation the values are zero, so the attention gives `(1 - p) * base`, where p is the share of the softmax
    that the prefix's keys draw: the direction of the base's output is kept, and its length shrinks with `length`.

    A prefix wants a higher learning rate than LoRA does: ten times as much is a good start.

    Attributes:
        length: Positions put in front.
        reparam: Hidden width of a network that makes the prefix (the paper's reparametrisation), or None for a prefix
            that is trained itself. The network is kept in the file, so that training can resume.
        init_std: Standard deviation of the initial keys, or of the weights that make them.
        gating: "shared" for a gate on what is put in front, one for each sample; "separate" for one on keys and one on
            values; None for none. It is UniPELT's (Mao et al. 2022, arXiv:2110.07577), averaged over what the attention
            is given: a causal model then sees the future.
        counted: Whether the positions count, for a bias of relative positions (T5) and for the tokens' own positions
            (learnt or rotary): tokens then seem to be `length` further away, as AdapterHub and PEFT have it. It wants a
            prefix at every layer of the stack.
        padded: Whether padding counts as positions too, as PEFT has it.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"attention"})
    neutral: ClassVar[bool] = False  # the prefix takes its share of the attention
    targets: str = "attn.kv"
    length: int = 16
    reparam: int | None = None
    init_std: float = 0.02
    gating: str | None = None
    counted: bool = False
    padded: bool = False

    def problems(self) -> list[str]:
        found = []
        if isinstance(self.length, int) and not 1 <= self.length <= _MAX_LENGTH:
            found.append(f"length must be from 1 to {_MAX_LENGTH}, not {self.length!r}")
        if isinstance(self.reparam, int) and not 1 <= self.reparam <= _MAX_WIDTH:
            found.append(f"reparam must be None or from 1 to {_MAX_WIDTH}, not {self.reparam!r}")
        if self.gating not in (None, *GATINGS):
            found.append(f"gating must be None or one of {', '.join(GATINGS)}, not {self.gating!r}")
        # With no spread all positions would be equal, would get equal gradients, and would stay equal for ever.
        if isinstance(self.init_std, (int, float)) and not 0 < self.init_std <= _MAX_STD:
            found.append(f"init_std must be more than 0 and at most {_MAX_STD:g}, not {self.init_std!r}")
        return found

    def alike(self, point: InjectionPoint) -> Hashable:
        return (point.layout, point.in_features, self.length, self.reparam, self.gating, self.counted, self.padded)

    def accepts(self, point: InjectionPoint) -> str | None:
        if self.gating is not None and point.kind == "attention" and point.layout.source is None:
            return "the gate needs the width of what the attention is given, and it is not known: set gating=None"
        return super().accepts(point)

    def build(self, point: InjectionPoint) -> PrefixModule:
        layout, std = point.layout, self.init_std
        if self.reparam is None:
            inner = DirectPrefix(layout, self.length, std)
        else:
            inner = ReparametrizedPrefix(layout, self.length, self.reparam, std)
        module = inner if self.gating is None else GatedPrefix(inner, layout.source, GATINGS[self.gating])
        module.counted, module.padded = self.counted, self.padded
        module.front = self.length if self.counted else 0
        return module


def _put_in_front(front: Tensor, rest: Tensor) -> Tensor:
    return torch.cat([front.to(rest.dtype).expand(rest.shape[0], -1, -1, -1), rest], dim=2)
