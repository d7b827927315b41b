"""Blocks of diffusion models: modulated norms, gates, and two streams side by side.

Shift, scale and gate of a modulated norm come from time and text. A gate scales what a sublayer gives: an adapter at
its output stands inside of it, and `norm_in` is the norm before it is modulated.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from adapterkit.mapping.entries import Output
from adapterkit.mapping.forward_order import called_children
from adapterkit.mapping.layouts import is_class
from adapterkit.mapping.templates.blocks import block
from adapterkit.mapping.templates.template import BlockTemplate


def _outputs(sublayers: str) -> tuple[Output, ...]:
    """What `sublayers` says, separated by commas: a role and a sublayer's names, of which each is one of these.

    - `mlp ff norm`: gives x + gate * ff(modulated norm(x)).
    - `cross attn2`: gives x + gate * attn2(x).
    """
    return tuple(_output(*words.split()) for words in sublayers.split(","))


def _output(role: str, sublayer: str, norm: str | None = None) -> Output:
    if norm is None:
        return Output(role, sublayer, residual=sublayer)
    first = sublayer.partition(".")[0]  # of a norm without parameters the first layer tells the width
    width = "|".join(f"{first}.{layer}" for layer in ("to_q", "net.0.proj", "to_query", "in_layer"))
    return Output(role, sublayer, residual=norm, norm_in=f"{norm}.norm|{norm}", width=width)


def _around(role: str, norm_in: str, norm_out: str, width: str | None = None) -> Output:
    """Gives x + gate * norm_out(sublayer(modulated norm_in(x))). `width` as of `Output`."""
    return Output(role, norm_out, residual=norm_in, norm_in=f"{norm_in}.norm|{norm_in}", width=width)


def _modulated(sublayers: str, **further: Any) -> BlockTemplate:
    """A block of these sublayers, of which those of the role `cross` attend to other tokens."""
    outputs = _outputs(sublayers)
    crossed = " ".join(one.core for one in outputs if one.role == "cross")
    return block(*outputs, **{"cross": crossed, **further})


def _joint(has: str, img: str, txt: str, **further: Any) -> BlockTemplate:
    """A block of two streams."""
    return BlockTemplate(has, streams={"img": _outputs(img), "txt": _outputs(txt)}, whole=False, **further)


_LAST, _LAST_TEXT = "attn.to_out.1|attn.to_out.0|attn.to_out", "attn.to_add_out"


def _is_plain(block: Any) -> bool:
    """Whether the feed-forward's residual is the stream that its norm sees; AuraFlow's is the block's own input."""
    return not is_class(block.norm2, "diffusers", "FP32LayerNorm")


def _skips_third(block: Any) -> bool:
    """Whether a third norm is left out, and the feed-forward sees the second one."""
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


def _hears(block: Any) -> bool:
    """Whether the forward runs the layers of sound."""
    return "audio_attn1" in (called_children(block) or ())


_THREE = "attn attn1 norm1, cross attn2 norm2, mlp ff norm3"
_BASIC = "norm1 attn1 norm2 attn2 pos_embed"
_TEXT_TOO = {"optional": "norm2_context ff_context"}


def _with_sound(*outputs: Output, **further: Any) -> BlockTemplate:
    """Video and sound, each with its own attentions, and between both."""
    return block(
        *_outputs(_THREE),
        *outputs,
        also="audio_norm1 audio_attn1 audio_norm2 audio_attn2 audio_norm3 audio_ff",
        optional="audio_to_video_norm audio_to_video_attn video_to_audio_norm video_to_audio_attn",
        cross="attn2 audio_attn2 audio_to_video_attn video_to_audio_attn",
        **further,
    )


def _sound() -> Iterator[BlockTemplate]:
    yield _with_sound(when=lambda block: not _hears(block))
    heard = (
        "attn audio_attn1 audio_norm1, cross audio_attn2 audio_norm2, cross video_to_audio_attn video_to_audio_norm, "
        "mlp audio_ff audio_norm3"
    )
    seen = _outputs("cross audio_to_video_attn audio_to_video_norm")
    yield _with_sound(*seen, streams={"audio": _outputs(heard)}, whole=False, when=_hears)


DIFFUSION_BLOCKS: tuple[BlockTemplate, ...] = (
    _joint(
        "norm1 norm1_context attn norm2 ff",
        f"attn {_LAST} norm1, mlp ff norm2",
        f"attn {_LAST_TEXT} norm1_context, mlp ff_context norm2_context",
        when=_is_plain,
        **_TEXT_TOO,
    ),
    _joint(
        "norm1 norm1_context attn norm2 ff",
        f"attn {_LAST} norm1",
        f"attn {_LAST_TEXT} norm1_context",
        when=lambda block: not _is_plain(block),
        **_TEXT_TOO,
    ),
    _modulated("mlp proj_out norm", also="attn proj_mlp", whole=False),
    _modulated("attn attn norm, mlp ff norm"),
    _joint(
        "norm1_i attn1 norm3_i ff_i",
        "attn attn1.to_out norm1_i, mlp ff_i norm3_i",
        "attn attn1.to_out_t norm1_t, mlp ff_t norm3_t",
        optional="adaLN_modulation norm1_t norm3_t ff_t",
    ),
    BlockTemplate("norm attn.to_qkv_mlp_proj", _outputs("mlp attn.to_out norm"), whole=False),
    BlockTemplate("norm3 ff", _outputs(_THREE), optional=_BASIC, cross="attn2", when=_sees_text, branches=True),
    BlockTemplate(
        "norm3 ff",
        _outputs("attn attn1 norm1, attn attn2 norm2, mlp ff norm3"),
        optional=_BASIC,
        when=_sees_itself,
        branches=True,
    ),
    _modulated(
        "attn attn1 norm1, cross attn2, mlp ff norm2",
        optional="norm3",
        when=lambda block: _norm_type(block) == "ada_norm_single",
        branches=True,
    ),
    _modulated(_THREE, optional="before_proj after_proj norm_in ff_in skip_norm skip_linear"),
    _modulated("attn attn1 norm1, cross attn2 norm2", optional="kv_mapper"),
    _modulated("attn attn1 norm1, cross attn2, mlp ff norm2", also="ff.net.0", optional="norm3", when=_skips_third),
    _modulated("attn attn1 norm1, cross attn2", also="norm2 ff.conv_inverted"),
    _modulated("attn attn1 norm1, cross attn2 norm2, mlp ffn norm3", optional="proj_in proj_out"),
    _modulated("attn self_attn norm1, cross cross_attn norm3, mlp ffn norm2"),
    _modulated("attn attn norm1, mlp ff norm2", optional="norm_out adaln_proj", when=_is_plain),
    _modulated("attn attn norm1", also="norm2 ff", when=lambda block: not _is_plain(block)),
    _modulated("attn attn norm1, mlp ff_out norm2", also="ff_in"),
    _modulated("attn attn norm1, cross cross_attn, mlp mlp norm2", optional="plucker_proj"),
    block(
        _around("attn", "attention_norm1", "attention_norm2"),
        _around("cross", "cross_attn_norm1", "cross_attn_norm2"),
        _around("mlp", "ffn_norm1", "ffn_norm2"),
        also="attention feed_forward",
        optional="adaLN_modulation adaln_modulation cross_attn_norm1 cross_attention cross_attn_norm2",
        cross="cross_attention",
    ),
    block(_around("attn", "norm1", "norm2"), _around("mlp", "ffn_norm1", "ffn_norm2"), also="attn feed_forward"),
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
    _joint(
        "img_mod img_norm1 attn img_norm2 img_mlp txt_mod txt_norm1 txt_norm2 txt_mlp",
        f"attn {_LAST}|attn.img_attn_proj img_norm1, mlp img_mlp img_norm2",
        f"attn {_LAST_TEXT}|attn.txt_attn_proj txt_norm1, mlp txt_mlp txt_norm2",
    ),
    _modulated("attn attn img_norm1, mlp img_mlp img_norm2", without="txt_mlp"),
    _modulated("attn attn pre_attn_norm, mlp img_mlp pre_mlp_norm", optional="img_mod encoder_proj"),
    _modulated(
        "attn attention img_pre_norm, mlp down_proj post_attention_layernorm",
        also="gate_proj up_proj",
        optional="modulation",
    ),
    _modulated("attn attn input_layernorm, mlp down_proj post_attention_layernorm", also="gate_proj up_proj"),
    _modulated("attn self_attn self_attn_norm, cross cross_attn cross_attn_norm, mlp mlp mlp_norm"),
    _modulated("cross cross_attention cross_attn_norm, attn self_attention self_attn_norm, mlp ffn ffn_norm"),
    # The sequence comes first.
    _modulated("mlp mlp adaLN_mlp_ln", also="adaLN_sa_ln self_attention", whole=False),
    _modulated(
        "attn self_attention self_attention_norm, cross cross_attention cross_attention_norm, "
        "mlp feed_forward feed_forward_norm",
        optional="visual_modulation text_modulation cross_attention_norm cross_attention",
    ),
    _modulated("attn attn attn_norm, mlp feed_forward feed_forward_norm", optional="text_modulation"),
    _modulated("cross cross_attn cross_attn_norm", also="self_attn ffn", optional="cross_attn_norm_c adaln_mlp"),
    _modulated(
        "attn self_attn pre_norm, cross cross_attn cross_attend_norm, mlp ff ff_norm", optional="to_local_embed"
    ),
    BlockTemplate(
        "self_attn mlp mlp_moe_gen input_layernorm input_layernorm_moe_gen",
        streams={
            "txt": _outputs("attn self_attn.to_out input_layernorm, mlp mlp post_attention_layernorm"),
            "img": _outputs(
                "attn self_attn.to_add_out input_layernorm_moe_gen, mlp mlp_moe_gen post_attention_layernorm_moe_gen"
            ),
        },
        optional="post_attention_layernorm post_attention_layernorm_moe_gen",
        whole=False,
    ),
    *_sound(),
)
"""All that match and whose order holds must be one, or say nothing of a block."""
