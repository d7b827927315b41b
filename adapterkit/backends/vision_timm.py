"""timm's other vision models: EVA (also as EVA-02 and DINOv3), BEiT, Swin, Swin v2, ConvNeXt, Hiera, MetaFormer.

Some of these attentions do not call their `qkv` but read its weight, to add a bias of their own: those points are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import nn

from adapterkit.backend import Backend, Reach
from adapterkit.backends.called_attention import CalledAttentionSeam
from adapterkit.backends.vision import TIMM_HEAD, TIMM_OUTPUTS
from adapterkit.mapping.family import Attention, Block, Group, Output, Weight, resolve
from adapterkit.mapping.templates.blocks import before
from adapterkit.points import AttentionPoint, InjectionPoint, OutputPoint, TokensLayout, TokensPoint, WeightPoint


def _heads(attention: Any) -> tuple[int, int]:
    """Heads and their width, as the attention uses them: where they are grouped, keys are repeated before."""
    heads = attention.heads if hasattr(attention, "heads") else attention.num_heads
    rows = attention.q_proj.out_features if attention.qkv is None else attention.qkv.out_features // 3
    return int(heads), int(rows // heads)


_KEYS = Attention("attn.kv", "attn", _heads)
# x + norm(sublayer(x)): the norm belongs to the sublayer, which the stream enters as it is. Before attention, Swin v2
# cuts the stream into windows, so it is taken where it enters the block.
_POST_NORM_OUTPUTS = (
    Output("attn", "drop_path1", residual="", width="norm1"),
    Output("mlp", "drop_path2", residual="mlp", width="norm2"),
)
_PATCHES = Group("patch_embed", "", (Weight("embed.patch", "proj"),))
_POOLED_HEAD = Group("head", "", (Weight("head", "fc"), Weight("head.hidden", "pre_logits.fc")))


def _with_reads(model: nn.Module, points: list[InjectionPoint]) -> list[InjectionPoint]:
    """Marks the projections whose weight is read. timm decides by the bias, which is then no part of the projection."""
    holders: list[Any] = [m for m in model.modules() if getattr(m, "q_bias", None) is not None]
    read = {id(holder.qkv) for holder in holders if not holder.qkv_bias_separate}
    return [
        replace(point, layout=replace(point.layout, access="read"))
        if isinstance(point, WeightPoint) and id(model.get_submodule(point.path)) in read
        else point
        for point in points
    ]


class _TimmBackend(Backend):
    """Maps by a table."""

    component = "vision"
    whole_blocks = True
    table: ClassVar[tuple[Group, ...]] = ()
    ignored: ClassVar[Mapping[str, str]] = {}

    def points(self, model: nn.Module, component: str) -> list[InjectionPoint]:
        return _with_reads(model, resolve(model, self.table, component))

    def reach(self, model: nn.Module, point: InjectionPoint) -> Reach:
        return Reach(seam=CalledAttentionSeam()) if isinstance(point, AttentionPoint) else super().reach(model, point)


class TimmEvaBackend(_TimmBackend):
    """timm's Eva, with any of its attentions, and its Beit.

    The `tokens` point is the last module before the blocks. Rotary and relative positions fix the number of tokens.
    """

    def points(self, model: nn.Module, component: str) -> list[InjectionPoint]:
        block: nn.Module = next(model.get_submodule("blocks").children())
        outputs = _POST_NORM_OUTPUTS if type(block).__name__ == "EvaBlockPostNorm" else TIMM_OUTPUTS
        entries = (Block("attn mlp"), Weight("attn.gate", "attn.gate"), _KEYS, *outputs)
        stem = [*resolve(model, [_PATCHES], component), _tokens(model, component)]
        rest = resolve(model, [Group("blocks.{layer}", "{layer}", entries), *TIMM_HEAD], component)
        return _with_reads(model, [*stem, *rest])


def _tokens(model: Any, component: str) -> InjectionPoint:
    relative = [m for m in model.modules() if getattr(m, "relative_position_bias_table", None) is not None]
    layout = TokensLayout(extendable=not relative and getattr(model, "rope", None) is None)
    path = "norm_pre" if hasattr(model, "norm_pre") else "pos_drop"
    width = int(model.embed_dim)
    return TokensPoint("tokens", path, "", width, width, layout, tags={"component": component})


_ENDS = (_PATCHES, _POOLED_HEAD)
_REDUCTION = Group("layers.{stage}.downsample", "{stage}", (Weight("down.proj", "reduction"),))


class TimmSwinBackend(_TimmBackend):
    """timm's SwinTransformer. A prefix stands in front of every window."""

    table = (*_ENDS, _REDUCTION, Group("layers.{stage}.blocks.{layer}", "{stage}.{layer}", (Block(), *TIMM_OUTPUTS)))


class TimmSwinV2Backend(_TimmBackend):
    """timm's SwinTransformerV2: weights and outputs, no attention points.

    Attention by cosines, in one forward without a call that could take more keys.
    """

    table = (
        *_ENDS,
        _REDUCTION,
        Group("layers.{stage}.blocks.{layer}", "{stage}.{layer}", (Block("attn.kv"), *_POST_NORM_OUTPUTS)),
    )
    ignored: ClassVar[Mapping[str, str]] = {
        "*.attn.cpb_mlp.*": "computes position biases from coordinates, the same for every image"
    }


class TimmConvNextBackend(_TimmBackend):
    """timm's ConvNeXt, first and second version. Weights alone: what its blocks add up has its channels first."""

    table = (
        Group("stem.{index}", "{index}", (Weight("embed.patch", ""),)),
        Group("stages.{stage}.downsample", "{stage}", (Weight("down.conv", "1"),)),
        Group(
            "stages.{stage}.blocks.{layer}",
            "{stage}.{layer}",
            (Weight("res.conv1", "conv_dw"), Block(), Weight("res.shortcut", "shortcut.conv")),
        ),
        _POOLED_HEAD,
    )


class TimmHieraBackend(_TimmBackend):
    """timm's Hiera. A prefix stands in front of every mask unit.

    Where a block widens and pools its stream, that happens beside the attention, so the stream that the attention's
    output is added to enters no module: there is no `attn` output in such a block.
    """

    table = (
        *_ENDS,
        Group("blocks.{layer}", "{layer}", (Block(), Weight("res.shortcut", "proj"), _KEYS, *TIMM_OUTPUTS)),
    )

    def points(self, model: nn.Module, component: str) -> list[InjectionPoint]:
        blocks: list[Any] = list(model.get_submodule("blocks").children())
        pooled = {layer for layer, block in enumerate(blocks) if block.do_expand}
        return [
            point
            for point in super().points(model, component)
            if not (isinstance(point, OutputPoint) and point.role == "attn" and point.tags["layer"] in pooled)
        ]


# Only where the tokens are a sequence. What is added to a sublayer's output there is the stream times a learnt scale.
_META_FORMER_SEQUENCES = (
    Attention("attn.kv", "token_mixer", _heads),
    before("attn", "layer_scale1", "norm1"),
    before("mlp", "layer_scale2", "norm2"),
)


class TimmMetaFormerBackend(_TimmBackend):
    """timm's MetaFormer: CAFormer, whose last stages attend, ConvFormer and PoolFormer.

    Stages of convolutions or pooling have their channels first, and weight points alone.
    """

    table = (
        Group("stem", "", (Weight("embed.patch", "conv"),)),
        Group("stages.{stage}.downsample", "{stage}", (Weight("down.conv", "conv"),)),
        Group(
            "stages.{stage}.blocks.{layer}",
            "{stage}.{layer}",
            (
                Weight("res.conv1", "token_mixer.pwconv1"),
                Weight("res.conv2", "token_mixer.dwconv"),
                Weight("res.conv3", "token_mixer.pwconv2"),
                Block("attn mlp attn.kv"),
            ),
        ),
        Group("head", "", (Weight("head.hidden", "fc.fc1"), Weight("head", "fc.fc2|fc"))),
    )

    def points(self, model: nn.Module, component: str) -> list[InjectionPoint]:
        stages: list[Any] = list(model.get_submodule("stages").children())
        sequences = [
            Group(f"stages.{index}.blocks.{{layer}}", f"{index}.{{layer}}", _META_FORMER_SEQUENCES, {"stage": index})
            for index, stage in enumerate(stages)
            if not stage.use_nchw
        ]
        return resolve(model, [*self.table, *sequences], component)
