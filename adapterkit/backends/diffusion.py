"""UNets of diffusers: Stable Diffusion 1.5, 2.1, XL and their relatives.

Sites follow the model's own order: `down.{block}.{index}` and `up.{block}.{index}` for a resnet or a transformer,
`mid.{index}` in the middle, and one number more for a block inside a transformer: `attn.q@unet.down.0.1.0`.

The first convolution is `embed.patch`, the last one `head`. No preset reaches them, nor the other embeddings: of time,
of text and of classes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

from torch import nn

from adapterkit.backend import Backend, Reach
from adapterkit.backends.seams import reach_of
from adapterkit.contract.layouts import Repeats
from adapterkit.errors import IncompatibleTargetError
from adapterkit.mapping.family import Attention, Block, Group, Weight, resolve
from adapterkit.mapping.templates.blocks import before
from adapterkit.mapping.templates.diffusion import is_fused
from adapterkit.points import AttentionPoint, InjectionPoint, Tag


def heads(attention: nn.Module) -> tuple[int, int]:
    """Heads of the keys and values of diffusers' attention, and the width of each."""
    queries, keys = (int(attention.get_submodule(name).out_features) for name in ("to_q", "to_k"))  # type: ignore[arg-type]
    width = queries // int(attention.heads)  # type: ignore[arg-type]
    return keys // width, width  # DreamLite has fewer heads of keys


RESNET = (
    Weight("res.conv1", "conv1"),
    Weight("res.time", "time_emb_proj"),
    Weight("res.conv2", "conv2"),
    Weight("res.shortcut", "conv_shortcut"),
)
_TRANSFORMER = (Weight("proj.in", "proj_in"), Weight("proj.out", "proj_out"))

# A block of a transformer; the k-diffusion upscaler has the same attentions without the feed-forward.
_NAMES = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
ATTENTIONS = (
    *(Weight(f"attn.{part}", f"attn1.{name}") for part, name in _NAMES.items()),
    *(Weight(f"cross.{part}", f"attn2.{name}") for part, name in _NAMES.items()),
    Attention("attn.kv", "attn1", heads),
    Attention("cross.kv", "attn2", heads),
)
# x + sublayer(norm(x)), three times.
_OUTPUTS = (before("attn", "attn1", "norm1"), before("cross", "attn2", "norm2"), before("mlp", "ff", "norm3"))

# An attention that stands where a transformer would; with image and text tokens in one softmax, the text's by `add_*`.
PROJECTIONS = tuple(Weight(f"attn.{part}", name) for part, name in _NAMES.items())
_BARE_ATTENTION = (*PROJECTIONS, Weight("cross.k", "add_k_proj"), Weight("cross.v", "add_v_proj"))


def stage(name: str, blocks: str, site: str) -> Iterator[Group]:
    """The groups of one stage, whose blocks are at `blocks` and have the canonical name `site`."""
    tags: dict[str, Tag] = {"stage": name}
    inner, place = f"{blocks}.attentions.{{index}}.transformer_blocks.{{layer}}", f"{site}.{{index}}.{{layer}}"
    yield Group(f"{blocks}.resnets.{{index}}", f"{site}.{{index}}", RESNET, dict(tags))
    yield Group(
        f"{blocks}.attentions.{{index}}",
        f"{site}.{{index}}",
        (*_TRANSFORMER, *_BARE_ATTENTION, *ATTENTIONS),
        dict(tags),
    )
    yield Group(inner, place, (*ATTENTIONS, *_OUTPUTS), dict(tags))
    yield Group(f"{inner}.ff", place, (Block(),), dict(tags))
    # At most one sampler ends a block: a convolution, or a resnet that resamples.
    for sampler, role in (("downsamplers.0", "down.conv"), ("upsamplers.0", "up.conv")):
        yield Group(f"{blocks}.{sampler}", site, (*RESNET, Weight(role, "conv")), dict(tags))


def embedding(role: str, path: str, prefix: str = "") -> tuple[Group, ...]:
    """The two layers of an embedding network, and the conditioning that distilled models add in front."""
    places = (("cond", "cond_proj"), ("1", "linear_1"), ("2", "linear_2"))
    return tuple(Group(path, prefix + site, (Weight(role, name),)) for site, name in places)


# What conditions a UNet, and its first convolution.
CONDITIONS = (
    Group("", "", (Weight("embed.patch", "conv_in"), Weight("embed.class", "class_embedding"))),
    *embedding("embed.time", "time_embedding"),
    *embedding("embed.class", "class_embedding"),
    *embedding("embed.text", "add_embedding"),
    Group("", "context", (Weight("embed.text", "encoder_hid_proj"),)),
)


_FUSING = "the model would compute with a copy of the layers that adapters act on; bake() them or detach() first"


class DiffusersBackend(Backend):
    """A family of diffusers: a table.

    Attributes:
        ignored: Globs of layers that have no point -> why.
    """

    ignored: ClassVar[Mapping[str, str]] = {}
    writes = ("save_pretrained",)
    refuses: ClassVar[Mapping[str, str]] = dict.fromkeys(("fuse_qkv_projections", "fuse_projections"), _FUSING)

    @abstractmethod
    def groups(self, model: nn.Module) -> Sequence[Group]:
        """The table."""

    def points(self, model: nn.Module, component: str) -> list[InjectionPoint]:
        """See `Backend.points`.

        Raises:
            IncompatibleTargetError: Projections are fused; adapters would act on layers that are no longer used.
        """
        fused = [name for name, module in model.named_modules() if is_fused(module)]
        if fused:
            raise IncompatibleTargetError(
                f"{fused[0]} and {len(fused) - 1} more project with a fused copy of the layers that adapters act on; "
                f"call the {type(model).__name__}'s unfuse_qkv_projections() first"
            )
        return resolve(model, self.groups(model), component)

    def repeats(self, model: nn.Module, point: InjectionPoint) -> Repeats | None:
        return "whole"  # guidance

    def reach(self, model: nn.Module, point: InjectionPoint) -> Reach:
        if isinstance(point, AttentionPoint):
            return reach_of(model.get_submodule(point.path), point)
        return super().reach(model, point)


class UNetBackend(DiffusersBackend):
    """diffusers' UNet2DConditionModel."""

    component = "unet"
    whole_blocks = True  # those of its transformers
    ignored: ClassVar[Mapping[str, str]] = {
        "add_embedding.*": "pooled text and image embeddings of Kandinsky and DeepFloyd are no two-layer network",
        "encoder_hid_proj.*": "projections of image embeddings (Kandinsky, IP-Adapter) have no role yet",
        "position_net.*": "GLIGEN's boxes are conditioning, trained with their own gates",
        "*.fuser.*": "GLIGEN's gated layers run only where boxes are given",
        "*.transformers.*": "two transformers mixed by a ratio (Versatile Diffusion) have no roles yet",
        "*.attentions.*.norm?.linear": "modulation of the k-diffusion upscaler's norms has no role yet",
        "*.resnets.*.norm?.linear": "modulation of the k-diffusion upscaler's norms has no role yet",
        "*.Conv2d_0": "a second name of `conv` in old samplers",
    }

    def groups(self, model: nn.Module) -> list[Group]:
        return [
            *CONDITIONS,
            *stage("down", "down_blocks.{block}", "down.{block}"),
            *stage("mid", "mid_block", "mid"),
            *stage("up", "up_blocks.{block}", "up.{block}"),
            Group("", "", (Weight("head", "conv_out"),)),
        ]
