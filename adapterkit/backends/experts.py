"""Mixtures of experts of transformers: Mixtral, Qwen3-MoE, DeepSeek-V3, gpt-oss, and the text model of Llama 4.

Since transformers 5 the experts of a layer are stacked in one parameter, [experts, ...]; before, most were a list of
modules. Both give the same points, one for each expert and role: `moe.up@language.3.17`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from adapterkit.backend import Reach
from adapterkit.backends.longer import longer_decoder
from adapterkit.backends.transformers_family import Family, FamilyBackend
from adapterkit.mapping.family import Attention, Entry, Experts, Group, Output, Read, Tokens, Weight
from adapterkit.plugins.classes import EXPERTS
from adapterkit.points import InjectionPoint, Span

if TYPE_CHECKING:
    from torch import Tensor, nn

Entries = tuple[Entry, ...]


def _heads(attention: Any) -> tuple[int, int]:
    return attention.k_proj.out_features // attention.head_dim, attention.head_dim


def _latent_heads(attention: Any) -> tuple[int, int, int]:
    """Heads, and the widths of keys and values as they are once expanded, which is after the cache."""
    each = attention.qk_nope_head_dim + attention.v_head_dim
    return attention.kv_b_proj.out_features // each, attention.qk_head_dim, attention.v_head_dim


def _alternate(_: nn.Module, rows: int) -> list[Span]:
    """Gate and up row by row: g0 u0 g1 u1 ..."""
    return [Span(start, 1, count=rows // 2, step=2) for start in range(2)]


def _gated(prefix: str, path: str) -> Entries:
    return tuple(Weight(f"{prefix}.{part}", f"{path}.{part}_proj") for part in ("gate", "up", "down"))


_ATTENTION = (
    *(Weight(f"attn.{part}", f"self_attn.{part}_proj") for part in "qkvo"),
    Output("attn", "self_attn.o_proj", residual="input_layernorm", norm_in="input_layernorm"),
)
_HEADS = Attention("attn.kv", "self_attn", _heads)
_LATENT = (
    Attention("attn.kv", "self_attn", _latent_heads),
    Weight("attn.q_a", "self_attn.q_a_proj"),
    Weight("attn.q_b", "self_attn.q_b_proj"),
    Weight("attn.kv_a", "self_attn.kv_a_proj_with_mqa"),
    Weight("attn.kv_b", "self_attn.kv_b_proj"),
)
_STACKED = (
    Experts(("moe.gate", "moe.up"), "mlp.experts", "gate_up_proj"),
    Experts(("moe.down",), "mlp.experts", "down_proj"),
)
_LAYERS = ("model.layers.{layer}", "layers.{layer}")


def _mlp(path: str) -> Output:
    return Output("mlp", path, residual="post_attention_layernorm", norm_in="post_attention_layernorm")


def _decoder(block: Entries, *further: Group) -> tuple[Group, ...]:
    return (
        Group("model|", "", (Weight("embed.tokens", "embed_tokens"), Tokens("tokens", "embed_tokens"))),
        Group("|".join(_LAYERS), "{layer}", (*_ATTENTION, *block)),
        *further,
        Group("", "", (Weight("head", "lm_head|score|qa_outputs"),)),
    )


def _listed(path: str, gate: str, up: str, down: str) -> Group:
    """Experts that are modules of their own, as before transformers 5."""
    pattern = "|".join(f"{layer}.{path}.{{expert}}" for layer in _LAYERS)
    return Group(
        pattern, "{layer}.{expert}", (Weight("moe.gate", gate), Weight("moe.up", up), Weight("moe.down", down))
    )


MIXTRAL = Family(
    EXPERTS["mixtral"],
    _decoder(
        (_HEADS, Read("moe.router", "mlp.gate|block_sparse_moe.gate"), *_STACKED, _mlp("mlp|block_sparse_moe")),
        _listed("block_sparse_moe.experts", "w1", "w3", "w2"),
    ),
)
# Some layers of Qwen3-MoE, and the first of DeepSeek-V3, are dense.
QWEN3 = Family(
    EXPERTS["qwen3"],
    _decoder(
        (_HEADS, *_gated("mlp", "mlp"), Read("moe.router", "mlp.gate"), *_STACKED, _mlp("mlp")),
        _listed("mlp.experts", "gate_proj", "up_proj", "down_proj"),
    ),
)
DEEPSEEK = Family(
    EXPERTS["deepseek"],
    _decoder(
        (
            *_LATENT,
            *_gated("mlp", "mlp"),
            Read("moe.router", "mlp.gate"),
            *_STACKED,
            *_gated("moe.shared", "mlp.shared_experts"),
            _mlp("mlp"),
        ),
        _listed("mlp.experts", "gate_proj", "up_proj", "down_proj"),
    ),
)
GPT_OSS = Family(
    EXPERTS["gpt_oss"],
    _decoder(
        (
            _HEADS,
            Read("moe.router", "mlp.router"),
            Experts(("moe.gate", "moe.up"), "mlp.experts", "gate_up_proj", "gate_up_proj_bias", "linear_t", _alternate),
            Experts(("moe.down",), "mlp.experts", "down_proj", "down_proj_bias", "linear_t"),
            _mlp("mlp"),
        )
    ),
)
LLAMA4 = Family(
    EXPERTS["llama4"],
    _decoder(
        (
            _HEADS,
            *_gated("mlp", "feed_forward"),
            Read("moe.router", "feed_forward.router"),
            Experts(("moe.gate", "moe.up"), "feed_forward.experts", "gate_up_proj", form="linear_t"),
            Experts(("moe.down",), "feed_forward.experts", "down_proj", form="linear_t"),
            *_gated("moe.shared", "feed_forward.shared_expert"),
            _mlp("feed_forward"),
        )
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
    families = tuple(
        replace(family, lengthening=longer_decoder, rotary=True)
        for family in (MIXTRAL, QWEN3, DEEPSEEK, GPT_OSS, LLAMA4)
    )
    ignored: ClassVar[Mapping[str, str]] = {
        "*norm": "a norm's gain is no projection; adapters act on the projections beside it",
        "*.self_attn.sinks": "one logit per head is no projection",
    }

    def reach(self, model: nn.Module, point: InjectionPoint) -> Reach:
        return Reach(plain=one_by_one) if "expert" in point.tags else super().reach(model, point)
