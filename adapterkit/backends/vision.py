"""Vision transformers: timm's VisionTransformer, and ViT of transformers.

Head, pooling and embeddings have roles that no preset reaches (`head`, `head.*`, `embed.*`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

from torch import nn

from adapterkit.backend import Backend, Reach
from adapterkit.backends.longer import longer_blocks
from adapterkit.backends.timm_attention import TimmAttentionSeam
from adapterkit.backends.timm_features import forward_intermediates
from adapterkit.backends.transformers_attention import TransformersAttentionSeam
from adapterkit.mapping.everywhere import prompt_layer_points
from adapterkit.mapping.family import Attention, Block, Fused, Group, Output, Tokens, Weight, is_class, resolve
from adapterkit.mapping.layouts import first_path
from adapterkit.mapping.templates.blocks import before
from adapterkit.points import AttentionPoint, InjectionPoint, Span, TokensLayout, TokensPoint


def _heads(attention: nn.Module) -> tuple[int, int]:
    """Heads and their width. transformers 4 says `attention_head_size`."""
    width = getattr(attention, "head_dim", None) or attention.attention_head_size
    return int(attention.num_heads if hasattr(attention, "num_heads") else attention.num_attention_heads), int(width)  # type: ignore[arg-type]


def _parallel_rows(block: nn.Module, rows: int) -> list[Span]:
    """ViT-22B's one input projection: feed-forward, queries, keys, values."""
    sizes: list[int] = block.in_split  # type: ignore[assignment]
    return [Span(sum(sizes[:i]), size) for i, size in enumerate(sizes)]


# --- timm ------------------------------------------------------------------------------------------------------------

_TIMM_STEM = (Group("patch_embed", "", (Weight("embed.patch", "proj"),)),)

_TIMM_ATTENTION = (Block("attn mlp"), Weight("attn.gate", "attn.gate"), Attention("attn.kv", "attn", _heads))
# x + drop_path(scale(sublayer(norm(x)))): the stochastic depth is the last module of a sublayer, and always there.
TIMM_OUTPUTS = (before("attn", "drop_path1", "norm1"), before("mlp", "drop_path2", "norm2"))
# x + drop_path(scale(attention(norm(x)) + feed_forward(norm(x)))): one sublayer, whose attention is no module.
_TIMM_PARALLEL_SCALING = (
    Fused(("mlp.up", "attn.q", "attn.k", "attn.v"), "in_proj", _parallel_rows),
    Weight("attn.o", "attn_out_proj"),
    Weight("mlp.down", "mlp_out_proj"),
    Weight("proj.out", "out_proj"),
    Output("block", "drop_path", residual="in_norm", norm_in="in_norm"),
)
TIMM_HEAD = (
    Group(
        "attn_pool",
        "",
        (
            Weight("head.q", "q"),
            Fused(("head.k", "head.v"), "kv"),
            Weight("head.o", "proj"),
            Weight("head.up", "mlp.fc1"),
            Weight("head.down", "mlp.fc2"),
        ),
    ),
    Group("", "", (Weight("head", "head"),)),
    Group("", "dist", (Weight("head", "head_dist"),)),
)


def _timm_blocks(block: nn.Module) -> tuple[Group, ...]:
    """The groups for a model whose blocks are like this one (timm builds them all alike)."""
    if "attns" in block._modules:  # attentions side by side, then feed-forwards side by side, each with its own norm
        attention, mlp = (before(role, "drop_path", "norm") for role in ("attn", "mlp"))
        return (
            Group("blocks.{layer}.attns.{branch}", "{layer}.{branch}", (*_TIMM_ATTENTION, attention)),
            Group("blocks.{layer}.ffns.{branch}", "{layer}.{branch}", (Block("mlp"), mlp)),
        )
    # x + norm(sublayer(x)): adapters know norms before the sublayer, and after the sum, but none in between.
    outputs = () if is_class(block, "timm", "ResPostBlock") else TIMM_OUTPUTS
    return (Group("blocks.{layer}", "{layer}", (*_TIMM_ATTENTION, *outputs, *_TIMM_PARALLEL_SCALING)),)


# No module runs all blocks, or not whenever they run: prompts stand behind the tokens from there to the last norm.
_UNTIL_NORM = TokensLayout(extendable=True, lengthens=True, until="norm")


def _timm_tokens(model: nn.Module, component: str) -> InjectionPoint:
    """By hand: `norm_pre` is often an identity, which does not tell its width."""
    width = int(model.embed_dim)  # type: ignore[arg-type]
    layout, tags = TokensLayout(extendable=True), {"component": component}
    return TokensPoint("tokens", "norm_pre", "", width, width, layout, tags=tags)


class TimmViTBackend(Backend):
    """timm's VisionTransformer with any of its blocks: plain, post-norm or parallel, also as DeiT, distilled or CLIP.

    The `tokens` point is `norm_pre`: class, register and patch tokens with their positions, just before the blocks.
    Whoever extends them must leave class and register tokens in front, where pooling looks for them.
    """

    component = "vision"
    whole_blocks = True
    ignored: ClassVar[Mapping[str, str]] = {
        "patch_embed.backbone.*": "a hybrid's convolutions standardise their weight at each call, so nothing merges"
    }

    def points(self, model: nn.Module, component: str) -> list[InjectionPoint]:
        blocks = _timm_blocks(next(model.get_submodule("blocks").children()))
        tokens = _timm_tokens(model, component)
        found = [*resolve(model, _TIMM_STEM, component), tokens, *resolve(model, [*blocks, *TIMM_HEAD], component)]
        return [*found, replace(tokens, role="prompt", layout=_UNTIL_NORM), *prompt_layer_points(model, found)]

    def reach(self, model: nn.Module, point: InjectionPoint) -> Reach:
        if point.role == "prompt.layer":
            return Reach(lengthening=longer_blocks)
        if point.role == "prompt":
            return Reach(reading={"forward_intermediates": forward_intermediates})
        return Reach(seam=TimmAttentionSeam()) if isinstance(point, AttentionPoint) else super().reach(model, point)


# --- transformers ----------------------------------------------------------------------------------------------------

# Alternatives are the names of transformers 5, then those of 4. In 4, `attention` holds the attention and its output
# projection, each a module of its own. The dropout after a sublayer is one module for both sublayers in 5, so the
# sublayer's last own module is the core, and dropout follows what an adapter adds.
_VIT_BLOCK = (
    before("attn", "attention", "layernorm_before"),
    before("mlp", "mlp|output.dropout", "layernorm_after"),
    Block(),
)
_VIT = (
    Group("vit.embeddings|embeddings", "", (Weight("embed.patch", "patch_embeddings.projection"),)),
    Group("vit|", "", (Tokens("tokens", "embeddings", extendable=True), Weight("head.pooler", "pooler.dense"))),
    Group("vit.layers.{layer}|layers.{layer}|vit.encoder.layer.{layer}|encoder.layer.{layer}", "{layer}", _VIT_BLOCK),
    Group("", "", (Weight("head", "classifier|decoder.0"),)),
)


class ViTBackend(Backend):
    """transformers' ViT, with or without a head, in the layouts of transformers 4 and 5.

    The `tokens` point is `embeddings`: class and patch tokens with their positions. The class token must stay in front.
    """

    component = "vision"
    whole_blocks = True
    writes = ("save_pretrained",)
    ignored: ClassVar[Mapping[str, str]] = {}

    def points(self, model: nn.Module, component: str) -> list[InjectionPoint]:
        found = resolve(model, _VIT, component)
        vit = first_path(model, "vit|") or ""
        layout = replace(_UNTIL_NORM, until=f"{vit}.layernorm".strip("."), whole=vit)
        prompts = [replace(point, role="prompt", layout=layout) for point in found if isinstance(point, TokensPoint)]
        return [*found, *prompts, *prompt_layer_points(model, found)]

    def reach(self, model: nn.Module, point: InjectionPoint) -> Reach:
        if point.role == "prompt.layer":
            return Reach(lengthening=longer_blocks)
        if isinstance(point, AttentionPoint):
            return Reach(seam=TransformersAttentionSeam())
        return super().reach(model, point)
