"""Blocks of diffusion models: modulated norms, gates, and two streams side by side.

Shift, scale and gate of a modulated norm come from time and text. A gate scales what a sublayer gives: an adapter at
its output stands inside of it, and `norm_in` is the norm before it is modulated.
"""

from __future__ import annotations

from typing import Any

from adapterkit.mapping.entries import Output
from adapterkit.mapping.forward_order import called_children
from adapterkit.mapping.layouts import is_class
from adapterkit.mapping.templates.template import BlockTemplate


def _added(role: str, sublayer: str, norm: str) -> Output:
    """Gives x + gate * sublayer(modulated norm(x)); of a norm without parameters the first layer tells the width."""
    first = sublayer.partition(".")[0]
    width = "|".join(f"{first}.{layer}" for layer in ("to_q", "net.0.proj", "to_query", "in_layer"))
    return Output(role, sublayer, residual=norm, norm_in=f"{norm}.norm|{norm}", width=width)


def _bare(role: str, sublayer: str) -> Output:
    """Gives x + gate * sublayer(x)."""
    return Output(role, sublayer, residual=sublayer)


def _around(role: str, norm_in: str, norm_out: str, width: str | None = None) -> Output:
    """Gives x + gate * norm_out(sublayer(modulated norm_in(x))). `width` as of `Output`."""
    return Output(role, norm_out, residual=norm_in, norm_in=f"{norm_in}.norm|{norm_in}", width=width)


_LAST, _LAST_TEXT = "attn.to_out.1|attn.to_out.0|attn.to_out", "attn.to_add_out"


def _is_plain(block: Any) -> bool:
    """Whether the feed-forward's residual is the stream that its norm sees; AuraFlow's is the block's own input."""
    return not is_class(block.norm2, "diffusers", "FP32LayerNorm")


def _skips_third(block: Any) -> bool:
    """Whether a third norm is left out, and the feed-forward sees the second one, as the table of PixArt says."""
    return "norm3" not in (called_children(block) or ())


def _norm_type(block: Any) -> str:
    """How diffusers' block of many arrangements is arranged; empty for others."""
    told = getattr(block, "norm_type", None)
    return told if isinstance(told, str) and isinstance(getattr(block, "only_cross_attention", None), bool) else ""


def _sees_itself(block: Any) -> bool:
    """Whether both attentions are to the sequence itself."""
    return _norm_type(block) not in ("", "ada_norm_single") and block.double_self_attention is True


def _sees_text(block: Any) -> bool:
    return _norm_type(block) not in ("", "ada_norm_single") and not _sees_itself(block)


_FIRST, _SECOND, _THIRD = (
    _added("attn", "attn1", "norm1"),
    _added("cross", "attn2", "norm2"),
    _added("mlp", "ff", "norm3"),
)
_AUDIO = "audio_norm1 audio_attn1 audio_norm2 audio_attn2 audio_norm3 audio_ff"
_BOTH = "audio_to_video_norm audio_to_video_attn video_to_audio_norm video_to_audio_attn"


def _hears(block: Any) -> bool:
    """Whether the forward runs the layers of sound."""
    return "audio_attn1" in (called_children(block) or ())


_BASIC = "norm1 attn1 norm2 attn2 pos_embed"

DIFFUSION_BLOCKS: tuple[BlockTemplate, ...] = (
    BlockTemplate(
        "norm1 norm1_context attn norm2 ff",
        streams={
            "img": (_added("attn", _LAST, "norm1"), _added("mlp", "ff", "norm2")),
            "txt": (_added("attn", _LAST_TEXT, "norm1_context"), _added("mlp", "ff_context", "norm2_context")),
        },
        optional="norm2_context ff_context",
        when=_is_plain,
        whole=False,
    ),
    BlockTemplate(
        "norm1 norm1_context attn norm2 ff",
        streams={
            "img": (_added("attn", _LAST, "norm1"),),
            "txt": (_added("attn", _LAST_TEXT, "norm1_context"),),
        },
        optional="norm2_context ff_context",
        when=lambda block: not _is_plain(block),
        whole=False,
    ),
    BlockTemplate("norm attn proj_mlp proj_out", (_added("mlp", "proj_out", "norm"),), whole=False),
    BlockTemplate("norm attn ff", (_added("attn", "attn", "norm"), _added("mlp", "ff", "norm"))),
    BlockTemplate(
        "norm1_i attn1 norm3_i ff_i",
        streams={
            "img": (_added("attn", "attn1.to_out", "norm1_i"), _added("mlp", "ff_i", "norm3_i")),
            "txt": (_added("attn", "attn1.to_out_t", "norm1_t"), _added("mlp", "ff_t", "norm3_t")),
        },
        optional="adaLN_modulation norm1_t norm3_t ff_t",
        whole=False,
    ),
    BlockTemplate("norm attn.to_qkv_mlp_proj", (_added("mlp", "attn.to_out", "norm"),), whole=False),
    BlockTemplate(
        "norm3 ff", (_FIRST, _SECOND, _THIRD), optional=_BASIC, cross="attn2", when=_sees_text, branches=True
    ),
    BlockTemplate(
        "norm3 ff",
        (_FIRST, _added("attn", "attn2", "norm2"), _THIRD),
        optional=_BASIC,
        when=_sees_itself,
        branches=True,
    ),
    BlockTemplate(
        "attn1 attn2 norm1 norm2 ff",
        (_FIRST, _bare("cross", "attn2"), _added("mlp", "ff", "norm2")),
        optional="norm3",
        cross="attn2",
        when=lambda block: _norm_type(block) == "ada_norm_single",
        branches=True,
    ),
    BlockTemplate(
        "norm1 attn1 norm2 attn2 norm3 ff",
        (_FIRST, _SECOND, _THIRD),
        optional="before_proj after_proj norm_in ff_in skip_norm skip_linear",
        cross="attn2",
    ),
    BlockTemplate("norm1 attn1 norm2 attn2", (_FIRST, _SECOND), optional="kv_mapper", cross="attn2"),
    BlockTemplate(
        "norm1 attn1 attn2 norm2 ff.net.0",
        (_added("attn", "attn1", "norm1"), _bare("cross", "attn2"), _added("mlp", "ff", "norm2")),
        optional="ff norm3",
        cross="attn2",
        when=_skips_third,
    ),
    BlockTemplate(
        "norm1 attn1 attn2 norm2 ff.conv_inverted",
        (_added("attn", "attn1", "norm1"), _bare("cross", "attn2")),
        optional="ff",
        cross="attn2",
    ),
    BlockTemplate(
        "norm1 attn1 attn2 norm2 ffn norm3",
        (_added("attn", "attn1", "norm1"), _added("cross", "attn2", "norm2"), _added("mlp", "ffn", "norm3")),
        optional="proj_in proj_out",
        cross="attn2",
    ),
    BlockTemplate(
        "norm1 self_attn norm3 cross_attn norm2 ffn",
        (_added("attn", "self_attn", "norm1"), _added("cross", "cross_attn", "norm3"), _added("mlp", "ffn", "norm2")),
        cross="cross_attn",
    ),
    BlockTemplate(
        "norm1 attn norm2 ff",
        (_added("attn", "attn", "norm1"), _added("mlp", "ff", "norm2")),
        optional="norm_out adaln_proj",
        when=_is_plain,
    ),
    BlockTemplate("norm1 attn norm2 ff", (_added("attn", "attn", "norm1"),), when=lambda block: not _is_plain(block)),
    BlockTemplate("norm1 attn norm2 ff_in ff_out", (_added("attn", "attn", "norm1"), _added("mlp", "ff_out", "norm2"))),
    BlockTemplate(
        "norm1 attn cross_attn norm2 mlp",
        (_added("attn", "attn", "norm1"), _bare("cross", "cross_attn"), _added("mlp", "mlp", "norm2")),
        optional="plucker_proj",
        cross="cross_attn",
    ),
    BlockTemplate(
        "attention_norm1 attention attention_norm2 ffn_norm1 feed_forward ffn_norm2",
        (
            _around("attn", "attention_norm1", "attention_norm2"),
            _around("cross", "cross_attn_norm1", "cross_attn_norm2"),
            _around("mlp", "ffn_norm1", "ffn_norm2"),
        ),
        optional="adaLN_modulation adaln_modulation cross_attn_norm1 cross_attention cross_attn_norm2",
        cross="cross_attention",
    ),
    BlockTemplate(
        "norm1 attn norm2 ffn_norm1 feed_forward ffn_norm2",
        (_around("attn", "norm1", "norm2"), _around("mlp", "ffn_norm1", "ffn_norm2")),
    ),
    BlockTemplate(
        "norm1 norm1_context attn1 norm2 norm3 ff norm4",
        streams={
            "img": (_around("attn", "norm1", "norm2"), _around("mlp", "norm3", "norm4", "ff.net.0.proj")),
            "txt": (
                _around("attn", "norm1_context", "norm2_context"),
                _around("mlp", "norm3_context", "norm4_context", "ff_context.net.0.proj"),
            ),
        },
        optional="norm2_context norm3_context ff_context norm4_context",
        whole=False,
    ),
    BlockTemplate(
        "img_mod img_norm1 attn img_norm2 img_mlp txt_mod txt_norm1 txt_norm2 txt_mlp",
        streams={
            "img": (_added("attn", f"{_LAST}|attn.img_attn_proj", "img_norm1"), _added("mlp", "img_mlp", "img_norm2")),
            "txt": (
                _added("attn", f"{_LAST_TEXT}|attn.txt_attn_proj", "txt_norm1"),
                _added("mlp", "txt_mlp", "txt_norm2"),
            ),
        },
        whole=False,
    ),
    BlockTemplate(
        "img_norm1 attn img_norm2 img_mlp",
        (_added("attn", "attn", "img_norm1"), _added("mlp", "img_mlp", "img_norm2")),
        "txt_mlp",
    ),
    BlockTemplate(
        "pre_attn_norm attn pre_mlp_norm img_mlp",
        (_added("attn", "attn", "pre_attn_norm"), _added("mlp", "img_mlp", "pre_mlp_norm")),
        optional="img_mod encoder_proj",
    ),
    BlockTemplate(
        "img_pre_norm attention post_attention_layernorm gate_proj up_proj down_proj",
        (_added("attn", "attention", "img_pre_norm"), _added("mlp", "down_proj", "post_attention_layernorm")),
        optional="modulation",
    ),
    BlockTemplate(
        "input_layernorm attn post_attention_layernorm gate_proj up_proj down_proj",
        (_added("attn", "attn", "input_layernorm"), _added("mlp", "down_proj", "post_attention_layernorm")),
    ),
    BlockTemplate(
        "self_attn_norm self_attn cross_attn_norm cross_attn mlp_norm mlp",
        (
            _added("attn", "self_attn", "self_attn_norm"),
            _added("cross", "cross_attn", "cross_attn_norm"),
            _added("mlp", "mlp", "mlp_norm"),
        ),
        cross="cross_attn",
    ),
    BlockTemplate(
        "cross_attn_norm cross_attention self_attn_norm self_attention ffn_norm ffn",
        (
            _added("cross", "cross_attention", "cross_attn_norm"),
            _added("attn", "self_attention", "self_attn_norm"),
            _added("mlp", "ffn", "ffn_norm"),
        ),
        cross="cross_attention",
    ),
    BlockTemplate(
        "adaLN_sa_ln self_attention adaLN_mlp_ln mlp",
        (_added("mlp", "mlp", "adaLN_mlp_ln"),),
        whole=False,  # the sequence comes first
    ),
    BlockTemplate(
        "self_attention_norm self_attention feed_forward_norm feed_forward",
        (
            _added("attn", "self_attention", "self_attention_norm"),
            _added("cross", "cross_attention", "cross_attention_norm"),
            _added("mlp", "feed_forward", "feed_forward_norm"),
        ),
        optional="visual_modulation text_modulation cross_attention_norm cross_attention",
        cross="cross_attention",
    ),
    BlockTemplate(
        "attn_norm attn feed_forward_norm feed_forward",
        (_added("attn", "attn", "attn_norm"), _added("mlp", "feed_forward", "feed_forward_norm")),
        optional="text_modulation",
    ),
    BlockTemplate(
        "self_attn cross_attn_norm cross_attn ffn",
        (_added("cross", "cross_attn", "cross_attn_norm"),),
        optional="cross_attn_norm_c adaln_mlp",
        cross="cross_attn",
    ),
    BlockTemplate(
        "pre_norm self_attn cross_attend_norm cross_attn ff_norm ff",
        (
            _added("attn", "self_attn", "pre_norm"),
            _added("cross", "cross_attn", "cross_attend_norm"),
            _added("mlp", "ff", "ff_norm"),
        ),
        optional="to_local_embed",
        cross="cross_attn",
    ),
    BlockTemplate(
        "self_attn mlp mlp_moe_gen input_layernorm input_layernorm_moe_gen",
        streams={
            "txt": (
                _added("attn", "self_attn.to_out", "input_layernorm"),
                _added("mlp", "mlp", "post_attention_layernorm"),
            ),
            "img": (
                _added("attn", "self_attn.to_add_out", "input_layernorm_moe_gen"),
                _added("mlp", "mlp_moe_gen", "post_attention_layernorm_moe_gen"),
            ),
        },
        optional="post_attention_layernorm post_attention_layernorm_moe_gen",
        whole=False,
    ),
    BlockTemplate(
        f"norm1 attn1 norm2 attn2 norm3 ff {_AUDIO}",
        (_FIRST, _SECOND, _THIRD),
        optional=_BOTH,
        cross="attn2 audio_attn2 audio_to_video_attn video_to_audio_attn",
        when=lambda block: not _hears(block),
    ),
    BlockTemplate(
        f"norm1 attn1 norm2 attn2 norm3 ff {_AUDIO}",
        (_FIRST, _SECOND, _THIRD, _added("cross", "audio_to_video_attn", "audio_to_video_norm")),
        streams={
            "audio": (
                _added("attn", "audio_attn1", "audio_norm1"),
                _added("cross", "audio_attn2", "audio_norm2"),
                _added("cross", "video_to_audio_attn", "video_to_audio_norm"),
                _added("mlp", "audio_ff", "audio_norm3"),
            )
        },
        optional=_BOTH,
        cross="attn2 audio_attn2 audio_to_video_attn video_to_audio_attn",
        whole=False,
        when=_hears,
    ),
)
"""All that match and whose order holds must be one, or say nothing of a block."""
