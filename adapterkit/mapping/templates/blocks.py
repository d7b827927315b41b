"""Blocks by the children that they have: where the residual stream enters and leaves their sublayers.

Of templates for the same children, those hold whose norms stand before or behind their sublayers as in the block's
forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from adapterkit.mapping.entries import Output, Weight
from adapterkit.mapping.templates.template import BlockTemplate


def before(role: str, sublayer: str, norm: str, last: str = "") -> Output:
    """Gives x + sublayer(norm(x)). `last` are alternatives for the module whose output is the sublayer's."""
    return Output(role, f"{last}|{sublayer}" if last else sublayer, residual=norm, norm_in=norm, width=sublayer)


def behind(role: str, sublayer: str, norm: str, last: str = "") -> Output:
    """norm(x + sublayer(x))."""
    return Output(role, f"{last}|{sublayer}" if last else sublayer, residual=sublayer, norm_out=norm, width=sublayer)


def around(role: str, norm_in: str, norm_out: str) -> Output:
    """Gives x + norm_out(sublayer(norm_in(x)))."""
    return Output(role, norm_out, residual=norm_in, norm_in=norm_in)


def after(role: str, sublayer: str, norm: str) -> Output:
    """Gives x + norm(sublayer(x))."""
    return Output(role, norm, residual=sublayer, width=norm)


def block(*entries: Output | Weight, also: str = "", **further: Any) -> BlockTemplate:
    """A template of a block that has what its entries name, without what is optional, and what is named `also`."""
    optional = further.get("optional", "").split()
    named = [path for one in entries for path in _named(one) if path.partition(".")[0] not in optional]
    named = dict.fromkeys([*named, *also.split()])
    has = [path for path in named if not any(other.startswith(f"{path}.") for other in named)]
    return BlockTemplate(" ".join(has), entries, **further)


def _named(entry: Output | Weight) -> Iterator[str]:
    """The layer; the sublayer and its norms, of alternatives the last."""
    paths = (entry.path,) if isinstance(entry, Weight) else (entry.norm_in, entry.core, entry.residual, entry.norm_out)
    return (path.rpartition("|")[2] for path in paths if path)


def last(sublayer: str, names: str) -> str:
    """Alternatives for the module within a sublayer whose output is the sublayer's."""
    return "|".join(f"{sublayer}.{name}" for name in names.split("|")) if names else ""


def pre(attention: str, forward: str, ends: str = "", end: str = "", **further: Any) -> BlockTemplate:
    """A norm in front of each of two sublayers.

    Args:
        attention, forward: Name of the sublayer, and of its norm.
        ends, end: What may be the last module within the attention, and within the feed-forward.
        **further: See `BlockTemplate`.
    """
    (sublayer, norm), (other, norm2) = attention.split(), forward.split()
    outputs = before("attn", sublayer, norm, last(sublayer, ends)), before("mlp", other, norm2, last(other, end))
    return block(*outputs, **further)


def post(attention: str, forward: str, ends: str = "", end: str = "", **further: Any) -> BlockTemplate:
    """As `pre`, with the norm behind each residual connection."""
    (sublayer, norm), (other, norm2) = attention.split(), forward.split()
    outputs = behind("attn", sublayer, norm, last(sublayer, ends)), behind("mlp", other, norm2, last(other, end))
    return block(*outputs, **further)


def sandwich(attention: str, forward: str, **further: Any) -> BlockTemplate:
    """As `pre`, with two norms of each sublayer, before and behind it."""
    (sublayer, *norms), (other, *norms2) = attention.split(), forward.split()
    return block(around("attn", *norms), around("mlp", *norms2), also=f"{sublayer} {other}", **further)


def _bart(attention: str) -> Mapping[str, str]:
    return {"optional": f"{attention} {attention}_layer_norm", "cross": attention}


BLOCKS: tuple[BlockTemplate, ...] = (
    pre(
        "self_attn input_layernorm",
        "mlp post_attention_layernorm",
        "o_proj|out_proj|dense",
        "down_proj|fc2",
        unless="lambdas",
    ),
    sandwich(
        "self_attn input_layernorm post_attention_layernorm", "mlp pre_feedforward_layernorm post_feedforward_layernorm"
    ),
    block(after("attn", "self_attn", "post_attention_layernorm"), after("mlp", "mlp", "post_feedforward_layernorm")),
    block(
        behind("attn", "attention", "attention.output.LayerNorm", last("attention.output", "dropout|dense")),
        behind("cross", "crossattention", "crossattention.output.LayerNorm", "crossattention.output.dropout"),
        Output("mlp", "output.dropout|output.dense", residual="intermediate", norm_out="output.LayerNorm"),
        also="intermediate.dense",
        optional="crossattention",
        cross="crossattention",
    ),
    block(
        before("attn", "self_attn", "self_attn_layer_norm", "self_attn.out_proj"),
        before("cross", "encoder_attn", "encoder_attn_layer_norm", "encoder_attn.out_proj"),
        Output("mlp", "fc2", residual="final_layer_norm", norm_in="final_layer_norm"),
        also="fc1",
        **_bart("encoder_attn"),
    ),
    block(
        behind("attn", "self_attn", "self_attn_layer_norm", "self_attn.out_proj"),
        behind("cross", "encoder_attn", "encoder_attn_layer_norm", "encoder_attn.out_proj"),
        Output("mlp", "fc2", residual="fc1", norm_out="final_layer_norm"),
        **_bart("encoder_attn"),
    ),
    pre("self_attn layer_norm1", "mlp layer_norm2", "out_proj|o_proj", "fc2|down_proj"),
    pre("attention layernorm_before", "mlp layernorm_after"),
)
"""All that match and whose order holds must be one, or say nothing of a block."""
