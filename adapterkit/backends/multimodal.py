"""Models of several towers: CLIP and SigLIP (image, text), LLaVA, Qwen2.5-VL and Qwen3-VL (image, language).

A tower is mapped as the model that it is, by its own backend: see `Backend.parts`. Here is what stands beside them, and
the image encoder of Qwen, which stands alone in no model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

from torch import nn

from adapterkit.backend import Backend, Reach
from adapterkit.backends.inside import withheld_inside
from adapterkit.backends.transformers_attention import TransformersAttentionSeam
from adapterkit.backends.transformers_ties import untying
from adapterkit.contract.layouts import Repeats
from adapterkit.mapping.family import Block, Group, Weight, resolve
from adapterkit.mapping.templates.blocks import before
from adapterkit.mapping.towers import towers
from adapterkit.points import AttentionPoint, InjectionPoint, Tag

_NORMS = "a norm's gain is no projection; adapters act on the projections beside it"


class TowersBackend(Backend):
    """Maps what stands beside the towers."""

    writes = ("save_pretrained",)
    beside: ClassVar[tuple[Group, ...]] = ()
    ignored: ClassVar[Mapping[str, str]] = {}

    def points(self, model: nn.Module, component: str) -> list[InjectionPoint]:
        return resolve(model, self.beside, component)

    def parts(self, model: nn.Module) -> Mapping[str, str]:
        return towers(model)

    def withheld(self, model: nn.Module, part: str, point: InjectionPoint) -> str | None:
        return withheld_inside(model, part, point)

    def untying(self, model: nn.Module, names: Sequence[Sequence[str]]) -> Callable[[], None] | None:
        return untying(model, names)

    def repeats(self, model: nn.Module, point: InjectionPoint) -> Repeats | None:
        # An image encoder's rows are images, or pieces of them, as many as each sample has.
        return "each" if point.tags.get("tower") == "language" else None


class ClipBackend(TowersBackend):
    """transformers' CLIPModel and SiglipModel."""

    component = "clip"
    beside: ClassVar[tuple[Group, ...]] = (
        Group("", "text", (Weight("head", "text_projection"),), {"tower": "text"}),
        Group("", "vision", (Weight("head", "visual_projection"),), {"tower": "vision"}),
    )


_HEAD = Group("", "language", (Weight("head", "lm_head"),), {"tower": "language"})
_PROJECTOR: dict[str, Tag] = {"tower": "projector"}


class VisionLanguageBackend(TowersBackend):
    """A language model that reads images through a projector: LLaVA, with any image encoder and language model."""

    component = "vision_language"
    beside: ClassVar[tuple[Group, ...]] = (
        Group(
            "model.multi_modal_projector|multi_modal_projector",
            "projector",
            (Weight("proj.in", "linear_1"), Weight("proj.out", "linear_2")),
            _PROJECTOR,
        ),
        _HEAD,
    )


class QwenVisionLanguageBackend(TowersBackend):
    """Qwen2.5-VL and Qwen3-VL."""

    component = "vision_language"
    beside: ClassVar[tuple[Group, ...]] = (_HEAD,)


_MERGER = (Weight("proj.in", "mlp.0|linear_fc1"), Weight("proj.out", "mlp.2|linear_fc2"))


class QwenVisionBackend(Backend):
    """Their image encoders. A prefix stands in front of every window of the image, or of the image."""

    component = "vision"
    whole_blocks = True
    writes = ("save_pretrained",)
    ignored: ClassVar[Mapping[str, str]] = {"*norm*": _NORMS}
    groups: ClassVar[tuple[Group, ...]] = (
        Group("patch_embed", "", (Weight("embed.patch", "proj"),)),
        Group("", "", (Weight("embed.pos", "pos_embed"),)),
        Group("blocks.{layer}", "{layer}", (Block(), before("attn", "attn", "norm1"), before("mlp", "mlp", "norm2"))),
        Group("merger", "projector", _MERGER, _PROJECTOR),
        Group("deepstack_merger_list.{level}", "projector.{level}", _MERGER, _PROJECTOR),
    )

    def points(self, model: nn.Module, component: str) -> list[InjectionPoint]:
        return resolve(model, self.groups, component)

    def reach(self, model: nn.Module, point: InjectionPoint) -> Reach:
        if isinstance(point, AttentionPoint):
            return Reach(seam=TransformersAttentionSeam())
        return super().reach(model, point)

    def untying(self, model: nn.Module, names: Sequence[Sequence[str]]) -> Callable[[], None] | None:
        return untying(model, names)
