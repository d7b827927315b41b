"""IP-Adapter: an attention over image tokens beside the one over text (Ye et al. 2023, arXiv:2308.06721)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.adapter import Attention
from adapterkit.points import AttentionLayout, AttentionPoint, Kind

_MAX_WIDTH = 2**16
_EXAMPLE_TOKENS = 4


class IPAdapterModule(ak.AdapterModule):
    """`base + softmax(Q K^T) V`, K and V from image tokens [rows, tokens, width] by layers of its own.

    Args:
        layout: Heads of the model's keys and values.
        width: Of an image token.
        context: The name of the image tokens.
    """

    def __init__(self, layout: AttentionLayout, width: int, context: str) -> None:
        super().__init__()
        self.kv_heads, self.context = layout.kv_heads, context
        self.to_k_ip = nn.Linear(width, layout.kv_heads * layout.head_dim, bias=False)
        self.to_v_ip = nn.Linear(width, layout.kv_heads * layout.value_width, bias=False)
        nn.init.zeros_(self.to_v_ip.weight)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, base: Attention) -> Tensor:
        tokens = base.context[self.context]
        width = self.to_k_ip.in_features
        if tokens.ndim != 3 or not tokens.shape[1] or tokens.shape[2] != width:
            raise ak.ContextError(
                f"the side input {self.context!r} is {tuple(tokens.shape)}, and the adapter at {self.at} reads image "
                f"tokens [rows, tokens, {width}], or [1, tokens, {width}] for all rows"
            )
        tokens = tokens.to(query.dtype)
        own = (F.linear(tokens, layer.weight.to(query.dtype)) for layer in (self.to_k_ip, self.to_v_ip))
        keys, values = (part.unflatten(-1, (self.kv_heads, -1)).transpose(1, 2) for part in own)
        return base(query) + base.mix(query, keys, values)


@dataclass(frozen=True)
class IPAdapter(ak.AdapterConfig):
    """Eq. 5 of the paper: `softmax(Q K^T) V + scale * softmax(Q K_ip^T) V_ip`.

    The scale is the adapter's weight: `adapters.activate({"image": 0.6})`. The image tokens are a side input:
    `with adapters.context(image=tokens):`, [rows, tokens, width], or [1, tokens, width] for all rows. Where a pipeline
    doubles the batch for guidance, the rows without the image come first; the paper's are zeros before the projection
    that makes the tokens. A new adapter's values are zero, so that it has no effect.

    Attributes:
        width: Of an image token; None for the width of what the attention's own keys are made from.
        context: The name of the side input; another one for each of several images.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({"attention"})
    targets: str = "cross.kv"
    width: int | None = None
    context: str = "image"

    def problems(self) -> list[str]:
        found = []
        if self.width is not None and not 1 <= self.width <= _MAX_WIDTH:
            found.append(f"width must be None or from 1 to {_MAX_WIDTH}, not {self.width!r}")
        if not self.context.isidentifier():
            found.append(f"context must be a name like 'image', not {self.context!r}")
        return found

    def example_context(self, points: Sequence[ak.InjectionPoint], rows: int) -> Mapping[str, Tensor]:
        return {self.context: torch.randn(rows, _EXAMPLE_TOKENS, self._width_at(points[0]))}

    def accepts(self, point: ak.InjectionPoint) -> str | None:
        if isinstance(point, AttentionPoint) and self.width is None and point.layout.source is None:
            return "how wide its image tokens are is not known here: give a `width`"
        return super().accepts(point)

    def build(self, point: ak.InjectionPoint) -> IPAdapterModule:
        return IPAdapterModule(point.layout, self._width_at(point), self.context)

    def _width_at(self, point: ak.InjectionPoint) -> int:
        return point.layout.source if self.width is None else self.width
