"""Blocks of vision models: tokens in rows or planes, windows, pools, scales and stochastic depth.

The last module of a sublayer before the sum is its stochastic depth, where each has one of its own, else its scale,
else itself; what is multiplied to it behind that is a parameter.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from adapterkit.mapping.entries import Output
from adapterkit.mapping.templates.blocks import before, block, pre, sandwich
from adapterkit.mapping.templates.template import BlockTemplate


def _sublayer(role: str, sublayer: str, norm: str, number: int, part: str = "mlp") -> Output:
    """Gives x + scale(sublayer(norm(x))), tokens in rows, or in planes where `part` convolves."""
    last = f"layer_scale{number}|drop_path{number}|ls{number}|{sublayer}"
    return Output(role, last, residual=norm, norm_in=norm, convolved=part)


def _unnormed(role: str, last: str, residual: str, width: str, part: str = "mlp") -> Output:
    """Gives x + last(...), where no norm of the block is in front."""
    return Output(role, last, residual=residual, width=width, convolved=part)


def _is_identity(name: str) -> Any:
    return lambda block: isinstance(getattr(block, name), nn.Identity)


def _is_other(name: str) -> Any:
    return lambda block: not isinstance(getattr(block, name), nn.Identity)


_ATTN, _MLP = _sublayer("attn", "attn", "norm1", 1), _sublayer("mlp", "mlp", "norm2", 2)
_PLAIN, _SCALES = "norm1 attn norm2 mlp", "ls1 ls2"
_SHORTCUTS = "shortcut_proj_attn shortcut_pool_attn shortcut_proj_mlp"
_OTHERS = f"shortcut proj cpe1 pos_embed {_SHORTCUTS}"
_DROPS = "drop_path1 drop_path2"

_APART = "cat window_unpartition"
"""What tells that the sum is not of what enters the norm: the sublayer gives some tokens, or windows."""

_NORMED = "tokens_norm"
"""What tells that the sum is of what comes out of the norm: XCiT's blocks of the class token."""


def _dropped(attention: str, forward: str, width: str, width2: str = "") -> tuple[Output, Output]:
    """Sublayers that begin with modules of these names, and end in a stochastic depth."""
    first = _unnormed("attn", "drop_path1", attention, width)
    return first, _unnormed("mlp", "drop_path2", forward, width2 or width)


VISION_BLOCKS: tuple[BlockTemplate, ...] = (
    BlockTemplate(_PLAIN, (_ATTN, _MLP), _OTHERS, optional=f"{_SCALES} norm3 local_mp", unless=_APART, order=_PLAIN),
    BlockTemplate(_PLAIN, (_MLP,), _OTHERS, optional=_SCALES, names=_APART, unless=_NORMED, whole=False, order=_PLAIN),
    # Streams that are pooled or widened beside the attention enter no module.
    BlockTemplate(
        f"{_PLAIN} proj", (_ATTN, _MLP), "pos_embed", optional=_SCALES, order=_PLAIN, when=_is_identity("proj")
    ),
    BlockTemplate(f"{_PLAIN} proj", (_MLP,), "pos_embed", optional=_SCALES, order=_PLAIN, when=_is_other("proj")),
    BlockTemplate(f"{_PLAIN} shortcut", (_ATTN, _MLP), optional=_SCALES, when=_is_identity("shortcut")),
    BlockTemplate(f"{_PLAIN} shortcut", (_MLP,), optional=_SCALES, when=_is_other("shortcut")),
    BlockTemplate(f"{_PLAIN} shortcut_pool_attn|shortcut_proj_attn", (_MLP,), "shortcut_proj_mlp", optional=_SHORTCUTS),
    BlockTemplate(f"{_PLAIN} cpe1", (_ATTN, _MLP), optional="cpe2", whole=False),
    BlockTemplate(
        f"{_PLAIN} pos_embed",
        (before("attn", "attn", "norm1", "ls1"), before("mlp", "mlp", "norm2", "ls2")),
        optional=_SCALES,
        whole=False,
        when=lambda block: getattr(block, "downsample", False) is False,
    ),
    pre("factoratt_crpe norm1", "mlp norm2", optional="cpe"),
    block(before("attn", "xca", "norm_xca"), also="norm mlp", optional="convs pos_embd", whole=False),
    BlockTemplate(
        "norm1 token_mixer.qkv norm2 mlp",
        (_sublayer("attn", "token_mixer", "norm1", 1), _MLP),
        optional=f"{_SCALES} layer_scale1 layer_scale2 res_scale1 res_scale2",
        whole=False,
    ),
    BlockTemplate(
        f"norm token_mixer.qkv mlp {_DROPS}",
        (
            Output("attn", "drop_path1", residual="norm", norm_in="norm", convolved="mlp"),
            _unnormed("mlp", "drop_path2", "mlp", "norm"),
        ),
        optional="layer_scale_1 layer_scale_2",
        whole=False,
    ),
    BlockTemplate(
        f"token_mixer.q token_mixer.proj mlp.fc1.conv {_DROPS}",
        _dropped("token_mixer", "mlp", "mlp.fc1.conv"),
        optional=_SCALES,
        whole=False,
    ),
    # Norms behind the sublayers; the stream is cut into windows before attention, so it is taken where it enters.
    BlockTemplate(
        f"attn norm1 mlp norm2 {_DROPS}",
        _dropped("", "mlp", "norm1", "norm2"),
        optional="norm3",
        order="attn norm1 mlp norm2",
    ),
    sandwich("attn norm1 norm2", "mlp norm3 norm4", order="norm1 attn norm2 norm3 mlp norm4"),
    BlockTemplate(f"attn mlp.ln1.linear {_DROPS}", _dropped("attn", "mlp", "mlp.ln1.linear"), "local_conv"),
    BlockTemplate(f"attn.norm attn.qkv local_conv mlp.norm {_DROPS}", _dropped("", "mlp", "attn.norm", "mlp.norm")),
    BlockTemplate(
        "main.0 main.1.pwise shortcut drop_path",
        (_unnormed("attn", "drop_path", "", "main.0", "main.1.conv_proj"),),
        whole=False,
        when=_is_identity("shortcut"),
    ),
    BlockTemplate(
        "dw0 ffn0 mixer.m dw1 ffn1.m",
        (
            _unnormed("attn", "mixer.m", "mixer", "ffn1.m", "ffn1.m"),
            _unnormed("mlp", "ffn1.m", "ffn1", "ffn1.m", "ffn1.m"),
        ),
        whole=False,
    ),
    BlockTemplate(
        "norm attn.query.proj layer_scale drop_path",
        (Output("attn", "drop_path", residual="norm", norm_in="norm", convolved="attn.query.proj"),),
        "conv_cpe_dw",
        whole=False,
        when=lambda block: getattr(block, "has_skip", False) is True,
    ),
    BlockTemplate(
        "attn.to_query linear.fc1 layer_scale_1 layer_scale_2",
        (
            _unnormed("attn", "layer_scale_1", "attn", "linear.fc1", "linear"),
            _unnormed("mlp", "layer_scale_2", "linear", "linear.fc1", "linear"),
        ),
        optional="local_representation",
        whole=False,
    ),
    pre(
        "attn_out norm_out",
        "mlp norm_mlp",
        also="norm_in attn_in norm_mlp_in mlp_in",
        optional="norm1_proj proj norm2_proj",
        whole=False,
        streams={"pixels": (before("attn", "attn_in", "norm_in"), before("mlp", "mlp_in", "norm_mlp_in"))},
    ),
    BlockTemplate(
        "mhca norm|norm2 mlp mlp_drop_path",
        (Output("mlp", "mlp_drop_path", residual="norm2|norm", norm_in="norm2|norm", convolved="mlp"),),
        optional="patch_embed norm1 projection e_mhsa",
        whole=False,
    ),
    BlockTemplate(
        "self_attn conv1_1x1.conv conv3_1x1.conv shortcut drop_path",
        (_unnormed("attn", "drop_path", "", "conv1_1x1.conv", "conv1_1x1"),),
        optional="post_attn conv2_kxk",
        whole=False,
        when=_is_identity("shortcut"),
    ),
)
"""All that match and whose order holds must be one, or say nothing of a block."""
