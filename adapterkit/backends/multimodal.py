"""Models of several towers: CLIP and SigLIP (image, text), LLaVA, Qwen2.5-VL and Qwen3-VL (image, language).

A tower is mapped as the model that it is, by its own backend; its points then get the tower's name as a tag and in
front of their site: `attn.q@clip.vision.3`, which `attn.q@tower=vision` selects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn

from adapterkit.backend import Backend, Reach
from adapterkit.backends.language_decoders import LLAMA
from adapterkit.backends.transformers_attention import TransformersAttentionSeam
from adapterkit.backends.transformers_ties import untying
from adapterkit.layouts import Repeats
from adapterkit.mapping.family import Attention, Fused, Group, Output, Weight, first_path, resolve
from adapterkit.plugins import get_plugin_manager
from adapterkit.points import AttentionPoint, InjectionPoint, OutputLayout, OutputPoint, Tag, TokensPoint


@dataclass(frozen=True)
class Tower:
    """A part of a model that is a model itself.

    Attributes:
        name: The tower's tag, and the first word of its points' sites.
        path: Alternatives, as in `Group.pattern`.
        groups: Where its points are; None to ask the backend that claims the tower's class.
    """

    name: str
    path: str
    groups: tuple[Group, ...] | None = None


class TowersBackend(Backend):
    """Maps each tower, and what stands beside them."""

    writes = ("save_pretrained",)
    whole_blocks = True
    towers: ClassVar[tuple[Tower, ...]] = ()
    beside: ClassVar[tuple[Group, ...]] = ()

    def points(self, model: nn.Module, component: str) -> list[InjectionPoint]:
        """See `Backend.points`.

        Raises:
            UnsupportedModelError: No backend knows one of the towers.
        """
        found = resolve(model, self.beside, component)
        for tower, path, module in self._towers(model):
            if tower.groups is None:
                points = _backend(module).points(module, component)
            else:
                points = resolve(module, tower.groups, component)
            found += [_inside(point, tower.name, path) for point in points]
        order = {name: i for i, (name, _) in enumerate(model.named_modules(remove_duplicate=False))}
        return sorted(found, key=lambda point: order[point.path])

    def untying(self, model: nn.Module, names: Sequence[Sequence[str]]) -> Callable[[], None] | None:
        return untying(model, names)

    def reach(self, model: nn.Module, point: InjectionPoint) -> Reach:
        """See `Backend.reach`. The tower's own backend tells it, of the point as it sees it."""
        for tower, path, module in self._towers(model):
            if tower.name != point.tags.get("tower"):
                continue
            if tower.groups is None:
                found = _backend(module).reach(module, replace(point, path=point.path[len(path) + 1 :]))
                attending = {f"{path}.{end}": how for end, how in found.attending.items()}
                counting = {f"{path}.{end}".strip("."): how for end, how in found.counting.items()}
                reading = {f"{path}.{method}": how for method, how in found.reading.items()}
                return replace(found, attending=attending, counting=counting, reading=reading)
            if isinstance(point, AttentionPoint):
                return Reach(seam=TransformersAttentionSeam())
        return super().reach(model, point)

    def repeats(self, model: nn.Module, point: InjectionPoint) -> Repeats | None:
        # An image encoder's rows are images, or pieces of them, as many as each sample has.
        return "each" if point.tags.get("tower") == "language" else None

    def _towers(self, model: nn.Module) -> Iterator[tuple[Tower, str, nn.Module]]:
        for tower in self.towers:
            path = first_path(model, tower.path)
            if path is not None:
                yield tower, path, model.get_submodule(path)


def _backend(tower: nn.Module) -> Backend:
    return get_plugin_manager().backend_for(tower).load()()


def _inside(point: InjectionPoint, tower: str, path: str) -> InjectionPoint:
    """The point as seen from the model that holds the tower at `path`."""

    def joined(inner: str | None) -> str | None:
        return None if inner is None else f"{path}.{inner}" if inner else path

    layout: Any = point.layout
    if isinstance(point, OutputPoint):
        layout = OutputLayout(f"{path}.{layout.residual}", joined(layout.norm_in), joined(layout.norm_out))
    if isinstance(point, TokensPoint):
        layout = replace(layout, until=joined(layout.until), whole=joined(layout.whole))
    site = f"{tower}.{point.site}" if point.site else tower
    return replace(point, path=str(joined(point.path)), site=site, layout=layout, tags={**point.tags, "tower": tower})


_NORMS = "a norm's gain is no projection; adapters act on the projections beside it"


class ClipBackend(TowersBackend):
    """transformers' CLIPModel and SiglipModel."""

    component = "clip"
    ignored: ClassVar[Mapping[str, str]] = {
        "*norm*": _NORMS,
        "*head.attention.out_proj": "SigLIP pools with torch's MultiheadAttention, a head that no preset would reach",
    }
    towers: ClassVar[tuple[Tower, ...]] = (Tower("text", "text_model"), Tower("vision", "vision_model"))
    beside: ClassVar[tuple[Group, ...]] = (
        Group("", "text", (Weight("head", "text_projection"),), {"tower": "text"}),
        Group("", "vision", (Weight("head", "visual_projection"),), {"tower": "vision"}),
    )


def _qwen_heads(attention: Any) -> tuple[int, int]:
    return attention.num_heads, attention.head_dim


_PROJECTOR: dict[str, Tag] = {"tower": "projector"}

_QWEN_MERGER = (Weight("proj.in", "mlp.0|linear_fc1"), Weight("proj.out", "mlp.2|linear_fc2"))

QWEN_VISION = (
    Group("patch_embed", "", (Weight("embed.patch", "proj"),)),
    Group("", "", (Weight("embed.pos", "pos_embed"),)),
    Group(
        "blocks.{layer}",
        "{layer}",
        (
            Fused(("attn.q", "attn.k", "attn.v"), "attn.qkv"),
            Weight("attn.o", "attn.proj"),
            Attention("attn.kv", "attn", _qwen_heads),
            Output("attn", "attn", residual="norm1", norm_in="norm1"),
            Weight("mlp.gate", "mlp.gate_proj"),
            Weight("mlp.up", "mlp.up_proj|mlp.linear_fc1"),
            Weight("mlp.down", "mlp.down_proj|mlp.linear_fc2"),
            Output("mlp", "mlp", residual="norm2", norm_in="norm2"),
        ),
    ),
)


class VisionLanguageBackend(TowersBackend):
    """A language model that reads images through a projector: LLaVA, with any image encoder and language model."""

    component = "vision_language"
    ignored: ClassVar[Mapping[str, str]] = {"*norm*": _NORMS}
    towers: ClassVar[tuple[Tower, ...]] = (
        Tower("vision", "model.vision_tower|vision_tower"),
        Tower("language", "model.language_model|language_model"),
    )
    beside: ClassVar[tuple[Group, ...]] = (
        Group(
            "model.multi_modal_projector|multi_modal_projector",
            "projector",
            (Weight("proj.in", "linear_1"), Weight("proj.out", "linear_2")),
            _PROJECTOR,
        ),
        Group("", "language", (Weight("head", "lm_head"),), {"tower": "language"}),
    )


class QwenVisionLanguageBackend(TowersBackend):
    """Qwen2.5-VL and Qwen3-VL. A prefix stands in front of every window of the image encoder, or of the image."""

    component = "vision_language"
    ignored: ClassVar[Mapping[str, str]] = {"*norm*": _NORMS}
    towers: ClassVar[tuple[Tower, ...]] = (
        Tower("vision", "model.visual|visual", QWEN_VISION),
        Tower("language", "model.language_model|language_model", LLAMA.groups),
    )
    beside: ClassVar[tuple[Group, ...]] = (
        Group(
            "model.visual.merger|visual.merger",
            "projector",
            _QWEN_MERGER,
            _PROJECTOR,
        ),
        Group(
            "model.visual.deepstack_merger_list.{level}|visual.deepstack_merger_list.{level}",
            "projector.{level}",
            _QWEN_MERGER,
            _PROJECTOR,
        ),
        Group("", "language", (Weight("head", "lm_head"),), {"tower": "language"}),
    )
