"""The attention of families that compute it in their own files: Bloom, Falcon, MPT and DeBERTa-v2.

Their forwards have no place to reach in, so they are computed here while a prefix is active, and by the modules
themselves at all other times. All four come down to

    softmax(scale q k^T + bias) v

with an additive bias that holds mask, linear biases (ALiBi) or relative positions. A prefix has no distance to
anything: it meets every query with the bias of the query's own position, which is the greatest that the query sees, as
linear biases only fall with the distance. Counted from anywhere else, the bias of a prefix would change with padding
and with the length of the cache.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapterkit.backend import AttentionSeam, extension_of


def bloom_attention(
    module: Any,
    hidden_states: Tensor,
    residual: Tensor,
    alibi: Tensor,
    attention_mask: Tensor | None,
    layer_past: Any = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What BloomAttention computes. `alibi` is [batch * heads, 1, length]; its output has the residual added."""
    fused = module.query_key_value(hidden_states).unflatten(-1, (module.num_heads, 3, module.head_dim))
    query, key, value = (part.transpose(1, 2) for part in fused.unbind(-2))
    if layer_past is not None:
        key, value = layer_past.update(key, value, module.layer_idx)
    bias = alibi.unflatten(0, (-1, module.num_heads)).expand(-1, -1, query.shape[2], -1)
    bias = bias * module.beta + _additive(attention_mask, query)
    dropout = module.attention_dropout.p if module.training else 0.0
    call = _Call(module.inv_norm_factor, dropout, output_attentions)
    mixed, weights = _attended(module, query, key, value, bias, call)
    # The mode that multiplies slice by slice leaves the bias out.
    sliced = module.pretraining_tp > 1 and module.slow_but_exact
    output = F.linear(mixed, module.dense.weight) if sliced else module.dense(mixed)
    return residual + F.dropout(output, module.hidden_dropout, module.training), weights


def falcon_attention(
    module: Any,
    hidden_states: Tensor,
    alibi: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    layer_past: Any = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What FalconAttention computes. In the new decoder keys and values reach the cache once per query head."""
    heads, width = module.num_heads, module.head_dim
    query, key, value = module._split_heads(module.query_key_value(hidden_states))
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    if position_embeddings is not None and alibi is None:
        rotate = inspect.getmodule(inspect.unwrap(type(module).forward)).apply_rotary_pos_emb  # pyright: ignore
        query, key = rotate(query, key, *position_embeddings)
    if layer_past is not None:
        key, value = layer_past.update(key, value, module.layer_idx)
    bias = _additive(attention_mask, query)
    if alibi is not None and (module.config._attn_implementation != "sdpa" or output_attentions):
        bias = bias + alibi.view(-1, heads, 1, alibi.shape[-1]) * module.inv_norm_factor
    # One prefix per head of keys, as everywhere: the copies among the heads are equal.
    key, value = (part[:, :: part.shape[1] // module.num_kv_heads] for part in (key, value))
    # With rotary embeddings Falcon drops nothing out.
    dropout = module.attention_dropout.p if module.training and alibi is not None else 0.0
    mixed, weights = _attended(module, query, key, value, bias, _Call(1 / math.sqrt(width), dropout, output_attentions))
    return module.dense(mixed), weights


def mpt_attention(
    module: Any,
    hidden_states: Tensor,
    position_bias: Tensor | None,
    past_key_values: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What MptAttention computes. `position_bias` is [heads, 1, longest]; a boolean mask is True at what is hidden."""
    fused = module.Wqkv(hidden_states)
    if module.clip_qkv:
        fused = fused.clamp(min=-module.clip_qkv, max=module.clip_qkv)
    parts = fused.unflatten(-1, (3, module.n_heads, module.head_dim)).unbind(-3)
    query, key, value = (part.transpose(1, 2) for part in parts)
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, module.layer_idx)
    bias = _additive(None if attention_mask is None else ~attention_mask, query)
    if position_bias is not None:
        bias = bias + position_bias[:, :, -key.shape[2] :]
    dropout = module.attn_dropout_p if module.training else 0.0
    mixed, weights = _attended(module, query, key, value, bias, _Call(module.softmax_scale, dropout, weights=True))
    return module.out_proj(mixed), weights


def deberta_attention(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor,
    output_attentions: bool = False,
    query_states: Tensor | None = None,
    relative_pos: Tensor | None = None,
    rel_embeddings: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """What DisentangledSelfAttention computes. A prefix has contents alone: no term of its scores knows a position."""
    heads = module.num_attention_heads
    projected = (
        module.query_proj(hidden_states if query_states is None else query_states),
        module.key_proj(hidden_states),
        module.value_proj(hidden_states),
    )
    query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in projected)
    terms = 1 + sum(name in module.pos_att_type for name in ("c2p", "p2c"))
    bias = _additive(attention_mask.bool(), query)
    if module.relative_attention:
        relative = module.disentangled_attention_bias(
            query.flatten(0, 1), key.flatten(0, 1), relative_pos, module.pos_dropout(rel_embeddings), terms
        )
        if isinstance(relative, Tensor):  # without c2p and p2c it is the number 0
            bias = bias + relative.unflatten(0, (-1, heads))
    scale = 1 / math.sqrt(query.shape[-1] * terms)
    dropout = module.dropout.p if module.training else 0.0
    call = _Call(scale, dropout, output_attentions, own_position=False)
    return _attended(module, query, key, value, bias, call)


class OwnAttentionSeam(AttentionSeam):
    """Computes a family's attention in its place.

    Attributes:
        home: The file and the forward that `forward` stands for; a module with another one is refused.
    """

    home: ClassVar[tuple[str, str]]

    def refusal(self, module: nn.Module) -> str | None:
        original = inspect.unwrap(type(module).forward)  # attachment's wrapper unwraps to the original
        ours = list(inspect.signature(type(self).forward).parameters)[1:]  # pyright: ignore[reportArgumentType]
        theirs = list(inspect.signature(original).parameters)[1:]
        if (original.__module__, original.__qualname__) == self.home and theirs == ours:
            return None
        return (
            f"the keys and values of {type(module).__name__} cannot be extended; supported is {self.home[1]} of "
            f"{self.home[0]} with the arguments ({', '.join(ours)}): load the model with attn_implementation='eager', "
            "and if that does not help: pip install -U transformers"
        )

    def attend_refusal(self, module: nn.Module) -> str | None:
        return self.refusal(module)


class BloomAttentionSeam(OwnAttentionSeam):
    """Bloom's: linear biases, keys fused per head."""

    forward: ClassVar[Callable[..., Any] | None] = staticmethod(bloom_attention)
    home = ("transformers.models.bloom.modeling_bloom", "BloomAttention.forward")


class FalconAttentionSeam(OwnAttentionSeam):
    """Falcon's, old and new decoder: linear biases or rotary embedding, keys per head, per group or once."""

    forward: ClassVar[Callable[..., Any] | None] = staticmethod(falcon_attention)
    home = ("transformers.models.falcon.modeling_falcon", "FalconAttention.forward")


class MptAttentionSeam(OwnAttentionSeam):
    """MPT's: linear biases."""

    forward: ClassVar[Callable[..., Any] | None] = staticmethod(mpt_attention)
    home = ("transformers.models.mpt.modeling_mpt", "MptAttention.forward")


class DebertaAttentionSeam(OwnAttentionSeam):
    """DeBERTa-v2's: contents and relative positions apart."""

    forward: ClassVar[Callable[..., Any] | None] = staticmethod(deberta_attention)
    home = ("transformers.models.deberta_v2.modeling_deberta_v2", "DisentangledSelfAttention.forward")


def _additive(mask: Tensor | None, query: Tensor) -> Tensor:
    """A mask as a bias [batch or 1, heads or 1, queries or 1, length or 1]: zero where it is True, hardly less else."""
    if mask is None:
        return query.new_zeros(1, 1, 1, 1)
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)


@dataclass(frozen=True)
class _Call:
    """How an attention is computed: its scale and dropout, whether the softmax is asked for.

    `own_position` is whether the bias falls with the distance, so that a prefix meets a query with the greatest.
    """

    scale: float
    dropout: float
    weights: bool
    own_position: bool = True


def _attended(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, call: _Call
) -> tuple[Tensor, Tensor | None]:
    """The attention with the active prefixes in front, and the active adapters' own attentions beside it.

    Args:
        module: The attention module.
        query: [batch, heads, queries, head_dim].
        key, value: [batch, kv_heads, length, head_dim].
        bias: Broadcastable to [batch, heads, queries, length].
        call: How it is computed.

    Returns:
        [batch, queries, heads * head_dim], and the softmax where it is asked for.
    """
    mixed, softmax = _mix(query, *_extended(module, query, key, value, bias, call.own_position), call)
    if (extension := extension_of(module)) is not None:
        mixed = extension.attend(query, key, value, mixed, scale=call.scale)
    return mixed.transpose(1, 2).flatten(2), softmax


def _extended(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, own_position: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and bias with the active prefixes in front."""
    if (extension := extension_of(module)) is None:
        return key, value, bias
    keys, values, extended = extension.extend(key, value, bias, queries=query.shape[2], causal=False)
    added = keys.shape[2] - key.shape[2]
    if extended is None or not added:
        return keys, values, bias
    if own_position:
        front = extended[..., :added] + bias.amax(dim=-1, keepdim=True)
        extended = torch.cat([front, extended[..., added:]], dim=-1)
    return keys, values, extended


def _mix(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, call: _Call) -> tuple[Tensor, Tensor | None]:
    """softmax(scale q k^T + bias) v as [batch, heads, queries, head_dim], and the softmax where it is asked for."""
    key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
    if not call.weights:
        bias = bias.to(query.dtype)
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, dropout_p=call.dropout, scale=call.scale
        )
        return mixed, None
    scores = (query @ key.mT * call.scale + bias).to(torch.promote_types(query.dtype, torch.float32))
    softmax = F.dropout(scores.softmax(dim=-1).to(query.dtype), call.dropout)
    return softmax @ value, softmax
