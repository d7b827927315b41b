"""LLaMA-Adapter: an attention over a learnt prompt, gated from zero (Zhang et al. 2023, arXiv:2303.16199)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.adapter import Attention
from adapterkit.errors import did_you_mean
from adapterkit.points import AttentionPoint, Kind

_MAX_LENGTH = 2**16
_GATES = ("heads", "layer")


class LlamaAdapterModule(ak.AdapterModule):
    """`base + tanh(g) softmax(Q (P W_k)^T) P W_v`: W_k and W_v are the model's own, P [length, features] is learnt.

    Args:
        length: Positions of the prompt.
        features: Width of the stream that the model's keys and values are made from.
        kv_heads: Heads of keys and values; each has a gate g, which starts at 0. None for one gate, which is g itself.
    """

    def __init__(self, length: int, features: int, kv_heads: int | None) -> None:
        super().__init__()
        self.by_head = kv_heads is not None
        self.prompt = nn.Parameter(torch.randn(length, features))
        self.gate = nn.Parameter(torch.zeros(kv_heads or 1))

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, base: Attention) -> Tensor:
        attended = base.mix(query, *base.project(self.prompt))
        gates = torch.tanh(self.gate) if self.by_head else self.gate
        gates = gates.to(query.dtype).repeat_interleave(query.shape[1] // len(gates))
        return base(query) + gates[:, None, None] * attended


@dataclass(frozen=True)
class LlamaAdapter(ak.AdapterConfig):
    """Eq. 6 to 9 of the paper: the softmax over the prompt is apart from the tokens', and multiplied by a gate.

    The prompt's keys have no position: they go through the model's key layer and through no rotary embedding. The paper
    adapts the topmost layers, `targets="attn.kv@layer>=2"`. There is a gate for each head of the keys; in a model whose
    queries have no more heads than its keys that is the authors' one for each head.

    Attributes:
        length: Positions of each layer's prompt.
        gate: "heads" for `tanh(g)` of each head, as the authors have it; "layer" for one g for the layer, as PEFT has.
        padded: Whether padding counts as positions of the queries, as PEFT has it.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"attention"})
    targets: str = "attn.kv"
    length: int = 10
    gate: str = "heads"
    padded: bool = False

    def problems(self) -> list[str]:
        found = []
        if not 1 <= self.length <= _MAX_LENGTH:
            found.append(f"length must be from 1 to {_MAX_LENGTH}, not {self.length!r}")
        if self.gate not in _GATES:
            found.append(
                f"gate must be one of {', '.join(_GATES)}, not {self.gate!r}.{did_you_mean(self.gate, _GATES)}"
            )
        return found

    def accepts(self, point: ak.InjectionPoint) -> str | None:
        if isinstance(point, AttentionPoint) and point.layout.source is None:
            return "the layers that make its keys and values, which the prompt goes through, are not known"
        return super().accepts(point)

    def build(self, point: ak.InjectionPoint) -> LlamaAdapterModule:
        heads = point.layout.kv_heads if self.gate == "heads" else None
        module = LlamaAdapterModule(self.length, point.layout.source, heads)
        module.padded = self.padded
        return module
