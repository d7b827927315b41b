"""The attention seam of timm: the equation of its plain `Attention`, with keys and values extended.

timm's attention is one forward with no place to reach in, so it is computed here while a prefix is active, and by the
module itself at all other times.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapterkit.backend import AttentionSeam, extension_of

_HOMES = ("timm.layers.attention", "timm.models.vision_transformer")
"""Where timm defines its plain `Attention`: now, and in its older releases (1.0.15)."""


def attend(module: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """What `module(x, attn_mask, is_causal)` computes, over keys and values that the active adapters have extended.

    Args:
        module: timm's `Attention`.
        x: [batch, length, features].
        attn_mask: Broadcastable to [batch, heads, length, length], boolean (True is visible) or additive.
        is_causal: Causal attention; takes precedence over a mask, as in timm's unfused path.

    Returns:
        [batch, length, features out].
    """
    gate = None if getattr(module, "gate", None) is None else module.gate(x).sigmoid()  # older ones have none
    query, key, value = _project(module, x)
    length = key.shape[2]
    mask = None if is_causal or attn_mask is None else attn_mask.expand(*attn_mask.shape[:-1], length)
    extension, keys, values = extension_of(module), key, value
    if extension is not None:
        keys, values, mask = extension.extend(key, value, mask, queries=query.shape[2], causal=is_causal)
        # An extended mask is explicit; what torch calls causal would count from the prefix.
        is_causal = is_causal and keys.shape[2] == length
    mixed = _mix(module, query, keys, values, mask, is_causal)
    if extension is not None:
        mixed = extension.attend(query, key, value, mixed, scale=None if module.fused_attn else module.scale)
    mixed = mixed.transpose(1, 2).flatten(2)
    if (norm := getattr(module, "norm", None)) is not None:
        mixed = norm(mixed)
    return module.proj_drop(module.proj(mixed if gate is None else mixed * gate))


class TimmAttentionSeam(AttentionSeam):
    """Reaches timm's plain `Attention`. Its relatives compute something else, and are refused by name."""

    forward: ClassVar[Callable[..., Any] | None] = staticmethod(attend)

    def refusal(self, module: nn.Module) -> str | None:
        plain = [c for c in type(module).__mro__ if c.__name__ == "Attention" and c.__module__ in _HOMES]
        # A subclass with a forward of its own is no longer plain; attachment's wrapper unwraps to the original.
        if plain and inspect.unwrap(type(module).forward) is inspect.unwrap(plain[-1].forward):
            return None
        return (
            f"the keys and values of {type(module).__name__} cannot be extended; supported is timm's plain Attention "
            f"({_HOMES[0]}), which VisionTransformer has unless it was built with another attn_layer"
        )

    def attend_refusal(self, module: nn.Module) -> str | None:
        return self.refusal(module)


def _project(module: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [batch, heads, length, head_dim], normed."""
    fused = module.qkv(x).unflatten(-1, (3, module.num_heads, module.head_dim))
    query, key, value = fused.permute(2, 0, 3, 1, 4).unbind(0)
    return module.q_norm(query), module.k_norm(key), value


def _mix(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Values weighted by the softmax over keys: [batch, heads, queries, head_dim]."""
    if module.fused_attn:
        dropout = module.attn_drop.p if module.training else 0.0
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal)
    scores = (query * module.scale) @ key.transpose(-2, -1)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return module.attn_drop(scores.softmax(dim=-1)) @ value
