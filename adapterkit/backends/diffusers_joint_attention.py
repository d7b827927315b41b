"""The attention seam of diffusers' joint attention: image and text in one softmax, with keys and values extended.

Stable Diffusion 3 and Flux compute the same equation: a softmax over the tokens of both streams, each with projections
and norms of its own. What is put in front of the keys is seen by the queries of both, and
an adapter's own attention is asked for the queries of both.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapterkit.backend import AttentionSeam, extension_of
from adapterkit.errors import IncompatibleTargetError

_logger = logging.getLogger(__name__)

Rotary = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class _Form:
    """What tells the two processors apart: the order of the streams, and whether a mask is heeded."""

    text_first: bool
    masked: bool


_FORMS: dict[tuple[str, str], _Form] = {
    ("diffusers.models.attention_processor", "JointAttnProcessor2_0"): _Form(text_first=False, masked=False),
    ("diffusers.models.transformers.transformer_flux", "FluxAttnProcessor"): _Form(text_first=True, masked=True),
    # Before 0.35.
    ("diffusers.models.attention_processor", "FluxAttnProcessor2_0"): _Form(text_first=True, masked=True),
}


def attend_jointly(
    module: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    image_rotary_emb: Rotary | None = None,
    **kwargs: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """What the module's processor computes, over keys and values that the active adapters have extended.

    The kernel is torch's own, also where another backend of diffusers was chosen: those differ in speed only.

    Args:
        module: diffusers' `Attention` or `FluxAttention`.
        hidden_states: [batch, length, features] of the image; in Flux's single blocks of both streams.
        encoder_hidden_states: [batch, text length, features], or None where there is one stream.
        attention_mask: Broadcastable to [batch, heads, lengths, lengths], or [batch, lengths].
        image_rotary_emb: Cosines and sines [lengths, head_dim], of both streams in the order of the processor.
        **kwargs: Ignored with a warning, as diffusers does with what a processor does not know.

    Returns:
        The shape of `hidden_states`, and that of `encoder_hidden_states` where it is given.

    Raises:
        IncompatibleTargetError: The processor was exchanged for one that cannot be extended.
    """
    form, objection = _form_of(module), _objection(module)
    if form is None or objection:
        raise IncompatibleTargetError(objection)
    if kwargs:
        _logger.warning("joint_attention_kwargs %s are unknown to %s and are ignored", sorted(kwargs), _name(module))
    streams = [_project(module, hidden_states, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"))]
    if encoder_hidden_states is not None:
        names, norms = ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k")
        streams.insert(0 if form.text_first else 1, _project(module, encoder_hidden_states, names, norms))
    query, key, value = (torch.cat(parts, dim=2) for parts in zip(*streams, strict=True))
    if image_rotary_emb is not None:
        query, key = _rotate(query, image_rotary_emb), _rotate(key, image_rotary_emb)
    mixed = _mix(module, query, key, value, attention_mask if form.masked else None)
    if encoder_hidden_states is None:
        return _leave(module, mixed)
    lengths = (hidden_states.shape[1], encoder_hidden_states.shape[1])
    if form.text_first:
        text, image = (
            part.contiguous() for part in mixed.split(lengths[::-1], dim=1)
        )  # copied as Flux does: same bits
    else:
        image, text = mixed.split(lengths, dim=1)
    leave_text = getattr(module, "to_add_out", None)  # missing where nothing follows in the text's stream
    return _leave(module, image), text if leave_text is None else leave_text(text)


class JointAttentionSeam(AttentionSeam):
    """Reaches the attentions that run the standard processors of Stable Diffusion 3 and Flux."""

    forward: ClassVar[Callable[..., Any] | None] = staticmethod(attend_jointly)

    def refusal(self, module: nn.Module) -> str | None:
        return _objection(module)

    def attend_refusal(self, module: nn.Module) -> str | None:
        return _objection(module)


def _project(
    module: Any, x: Tensor, names: tuple[str, str, str], norms: tuple[str, str]
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [batch, heads, length, head_dim] of one stream, normed."""
    width = module.to_k.out_features // module.heads
    query, key, value = (getattr(module, name)(x).unflatten(-1, (-1, width)) for name in names)
    norm_query, norm_key = (getattr(module, name, None) for name in norms)
    query = query if norm_query is None else norm_query(query)
    key = key if norm_key is None else norm_key(key)
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def _rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotary embedding of neighbouring pairs, in float32 as diffusers computes it."""
    cosines, sines = (part.to(x.device) for part in rotary)
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(-2)
    return (x.float() * cosines + turned.float() * sines).to(x.dtype)


def _mix(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Values weighted by the softmax over keys: [batch, length, heads * head_dim]."""
    if mask is not None and mask.shape == (key.shape[0], key.shape[2]):
        mask = mask[:, None, None]
    extension, keys, values = extension_of(module), key, value
    if extension is not None:
        keys, values, mask = extension.extend(key, value, mask, queries=query.shape[2], causal=False)
    mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
    if extension is not None:
        mixed = extension.attend(query, key, value, mixed)
    return mixed.transpose(1, 2).flatten(2).to(query.dtype)


def _leave(module: Any, x: Tensor) -> Tensor:
    """Output projection and dropout, which Flux's single blocks do themselves."""
    for layer in getattr(module, "to_out", None) or ():
        x = layer(x)
    return x


def _form_of(module: nn.Module) -> _Form | None:
    """The form of the module's processor. Exact classes only: a subclass may compute anything."""
    cls = type(getattr(module, "processor", None))
    return _FORMS.get((cls.__module__, cls.__name__))


def _objection(module: nn.Module) -> str | None:
    processor = getattr(module, "processor", None)
    if _form_of(module) is None:
        return (
            f"its attention processor is {_name(module)}, whose keys and values cannot be extended; supported are "
            f"{', '.join(name for _, name in _FORMS)}: call transformer.set_attn_processor() with one of them"
        )
    if getattr(processor, "_parallel_config", None) is not None:
        return "its sequence is split over several devices, and every one of them would put the same keys in front"
    return None


def _name(module: nn.Module) -> str:
    return type(getattr(module, "processor", None)).__name__
