"""The attention seam of diffusers: what its standard processors compute, with keys and values extended.

An `Attention` of diffusers hands its work to `module.processor`. While a prefix is active the work is done here. The
processor stays where it is, so that everything that lists or exchanges processors finds what it expects.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from adapterkit.backend import AttentionSeam, extension_of
from adapterkit.errors import IncompatibleTargetError

_logger = logging.getLogger(__name__)

Mix = Callable[[Any, Tensor, Tensor, Tensor, Tensor | None], Tensor]


def attend(
    module: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    temb: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """What the module's processor computes, over keys and values that the active adapters have extended.

    Args:
        module: diffusers' `Attention`.
        hidden_states: [batch, length, features] or [batch, channels, height, width]: the queries' source.
        encoder_hidden_states: [batch, context, features] of keys and values; None in self-attention.
        attention_mask: Additive, [batch, 1, context].
        temb: Conditioning of the spatial norm, where there is one.
        **kwargs: Ignored with a warning, as diffusers does with what a processor does not know.

    Returns:
        The shape of `hidden_states`.

    Raises:
        IncompatibleTargetError: The processor was exchanged for one that cannot be extended.
    """
    mix = _mix_of(module)
    if mix is None:
        raise IncompatibleTargetError(_refusal(module))
    if kwargs:
        _logger.warning("cross_attention_kwargs %s are unknown to %s and are ignored", sorted(kwargs), _name(module))
    residual = hidden_states
    if module.spatial_norm is not None:
        hidden_states = module.spatial_norm(hidden_states, temb)
    image = hidden_states.shape if hidden_states.ndim == 4 else None
    if image is not None:
        hidden_states = hidden_states.flatten(2).transpose(1, 2)
    mixed = _attend(module, mix, hidden_states, encoder_hidden_states, attention_mask)
    for layer in module.to_out:  # projection, dropout
        mixed = layer(mixed)
    if image is not None:
        mixed = mixed.transpose(-1, -2).reshape(image)
    if module.residual_connection:
        mixed = mixed + residual
    return mixed / module.rescale_output_factor


class DiffusersAttentionSeam(AttentionSeam):
    """Reaches every `Attention` that runs diffusers' standard processor, fused (`AttnProcessor2_0`) or explicit.

    And Sana's cross-attention.
    """

    forward: ClassVar[Callable[..., Any] | None] = staticmethod(attend)

    def refusal(self, module: nn.Module) -> str | None:
        return None if _mix_of(module) is not None else _refusal(module)

    def attend_refusal(self, module: nn.Module) -> str | None:
        return self.refusal(module)


def is_fused(module: nn.Module) -> bool:
    """Whether an attention projects with one layer that `fuse_qkv_projections()` made: a copy of its own three."""
    name = _name(module)
    if name in ("FluxAttnProcessor", "FluxIPAdapterAttnProcessor"):  # these ask the module
        return bool(module.fused_projections)
    return name in ("FusedAttnProcessor2_0", "FusedJointAttnProcessor2_0")


def _attend(module: Any, mix: Mix, x: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
    """The attention between the outer reshapes: [batch, length, features] -> [batch, length, heads * head_dim]."""
    batch, length, _ = (x if context is None else context).shape
    mask = module.prepare_attention_mask(mask, length, batch)  # [batch * heads, 1 or queries, length]
    if mask is not None:
        mask = mask.view(batch, module.heads, -1, mask.shape[-1])
    if module.group_norm is not None:
        x = module.group_norm(x.transpose(1, 2)).transpose(1, 2)
    query = module.to_q(x)
    if context is None:
        context = x
    elif module.norm_cross is not None:
        context = module.norm_encoder_hidden_states(context)
    parts = (query, module.to_k(context), module.to_v(context))
    query, key, value = (part.unflatten(-1, (module.heads, -1)).transpose(1, 2) for part in parts)
    return mix(module, query, key, value, mask).transpose(1, 2).flatten(2)


def _mix_fused(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """As `AttnProcessor2_0`: [batch, heads, length, head_dim] each."""
    query = query if module.norm_q is None else module.norm_q(query)
    key = key if module.norm_k is None else module.norm_k(key)
    return _around(module, query, key, value, mask, _fused)


def _mix_sana(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """As `SanaAttnProcessor2_0`, whose norms see all heads at once."""

    def across_heads(norm: nn.Module | None, x: Tensor) -> Tensor:
        return (
            x if norm is None else norm(x.transpose(1, 2).flatten(2)).unflatten(-1, (module.heads, -1)).transpose(1, 2)
        )

    query, key = across_heads(module.norm_q, query), across_heads(module.norm_k, key)
    return _around(module, query, key, value, mask, _fused)


def _mix_explicit(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """As `AttnProcessor`, which folds the heads into the batch and has scale and upcasts of its own."""
    return _around(module, query, key, value, mask, _explicit, module.scale)


def _fused(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).to(query.dtype)


def _explicit(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    batch, heads = query.shape[:2]
    if mask is not None:
        mask = mask.float() if module.upcast_attention else mask  # torch adds it to scores of its own dtype only
        mask = mask.expand(batch, heads, -1, -1).flatten(0, 1)
    weights = module.get_attention_scores(query.flatten(0, 1), key.flatten(0, 1), mask)
    return weights.unflatten(0, (batch, heads)) @ value


def _around(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, mix: Mix, scale: float | None = None
) -> Tensor:
    """An attention over extended keys and values, and the adapters' own beside it."""
    extension = extension_of(module)
    if extension is None:
        return mix(module, query, key, value, mask)
    keys, values, mask = extension.extend(key, value, mask, queries=query.shape[2], causal=False)
    return extension.attend(query, key, value, mix(module, query, keys, values, mask), scale=scale)


_MIXES: dict[tuple[str, str], Mix] = {
    ("diffusers.models.attention_processor", "AttnProcessor2_0"): _mix_fused,
    ("diffusers.models.attention_processor", "AttnProcessor"): _mix_explicit,
    ("diffusers.models.transformers.sana_transformer", "SanaAttnProcessor2_0"): _mix_sana,
}


def _mix_of(module: nn.Module) -> Mix | None:
    """The equation of the module's processor. Exact classes only: a subclass may compute anything."""
    cls = type(getattr(module, "processor", None))
    return _MIXES.get((cls.__module__, cls.__name__))


def _name(module: nn.Module) -> str:
    return type(getattr(module, "processor", None)).__name__


def _refusal(module: nn.Module) -> str:
    return (
        f"its attention processor is {_name(module)}, whose keys and values cannot be extended; supported are "
        f"{', '.join(name for _, name in _MIXES)}: call the model's set_default_attn_processor(), and disable "
        "attention slicing and xformers"
    )
