"""Mixtures of experts of transformers: Mixtral, Qwen3-MoE, DeepSeek-V3, gpt-oss, and the text model of Llama 4.

Since transformers 5 the experts of a layer are stacked in one parameter, [experts, ...]; before, most were a list of
modules. Both give the same points, one for each expert and role: `moe.up@language.3.17`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from adapterkit.backend import Reach
from adapterkit.backends.language_decoders import EMBEDDED, HEAD
from adapterkit.backends.longer import longer_decoder
from adapterkit.backends.transformers_family import Family, FamilyBackend, stacked
from adapterkit.mapping.family import Entry, Experts, Read
from adapterkit.mapping.templates.blocks import before
from adapterkit.plugins.classes import EXPERTS
from adapterkit.points import InjectionPoint, Span

if TYPE_CHECKING:
    from torch import Tensor, nn

Entries = tuple[Entry, ...]


def _alternate(_: nn.Module, rows: int) -> list[Span]:
    """Gate and up row by row: g0 u0 g1 u1 ..."""
    return [Span(start, 1, count=rows // 2, step=2) for start in range(2)]


_STACKED = (
    Experts(("moe.gate", "moe.up"), "mlp.experts", "gate_up_proj"),
    Experts(("moe.down",), "mlp.experts", "down_proj"),
)


def _decoder(kind: str, mlp: str, router: str, block: Entries) -> Family:
    """A decoder whose feed-forwards are at `mlp`, with what makes them choose experts at `router`."""
    groups = stacked(
        "model",
        EMBEDDED,
        "layers.{layer}",
        HEAD,
        Read("moe.router", router),
        *block,
        before("attn", "self_attn.o_proj", "input_layernorm"),
        before("mlp", mlp, "post_attention_layernorm"),
    )
    return Family(EXPERTS[kind], groups, lengthening=longer_decoder, rotary=True)


MIXTRAL = _decoder("mixtral", "mlp|block_sparse_moe", "mlp.gate|block_sparse_moe.gate", _STACKED)
# Some layers of Qwen3-MoE, and the first of DeepSeek-V3, are dense.
QWEN3, DEEPSEEK = (_decoder(kind, "mlp", "mlp.gate", _STACKED) for kind in ("qwen3", "deepseek"))
GPT_OSS = _decoder(
    "gpt_oss",
    "mlp",
    "mlp.router",
    (
        Experts(("moe.gate", "moe.up"), "mlp.experts", "gate_up_proj", "gate_up_proj_bias", "linear_t", _alternate),
        Experts(("moe.down",), "mlp.experts", "down_proj", "down_proj_bias", "linear_t"),
    ),
)
LLAMA4 = _decoder(
    "llama4",
    "feed_forward",
    "feed_forward.router",
    (
        Experts(("moe.gate", "moe.up"), "feed_forward.experts", "gate_up_proj", form="linear_t"),
        Experts(("moe.down",), "feed_forward.experts", "down_proj", form="linear_t"),
    ),
)


def one_by_one(experts: nn.Module, *args: Tensor, **kwargs: Tensor) -> Tensor:
    """The forward that a class of experts was written with, which reads them one by one.

    transformers wraps it in a choice of kernels, which are handed the whole stack.
    """
    return inspect.unwrap(type(experts).forward)(experts, *args, **kwargs)


class ExpertsBackend(FamilyBackend):
    """Mixtral, Qwen3-MoE, DeepSeek-V3, gpt-oss and Llama 4's text model, with any of their heads or none."""

    component = "language"
    name = "experts"
    generates = True
    families = (MIXTRAL, QWEN3, DEEPSEEK, GPT_OSS, LLAMA4)
    ignored: ClassVar[Mapping[str, str]] = {
        "*norm": "a norm's gain is no projection; adapters act on the projections beside it",
        "*.self_attn.sinks": "one logit per head is no projection",
    }

    def reach(self, model: nn.Module, point: InjectionPoint) -> Reach:
        return Reach(plain=one_by_one) if "expert" in point.tags else super().reach(model, point)
