"""CLIP's text encoders, which Stable Diffusion conditions on, in the layouts of transformers 4 and 5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from adapterkit.backend import Backend, Reach
from adapterkit.backends.transformers_attention import TransformersAttentionSeam
from adapterkit.backends.transformers_family import stacked
from adapterkit.backends.vision_transformers import TEXT
from adapterkit.mapping.family import Weight, resolve
from adapterkit.points import AttentionPoint, InjectionPoint

if TYPE_CHECKING:
    from torch import nn


# Transformers 4 keeps the encoder below `text_model` in every class; 5 only where there is a projection beside it.
GROUPS = stacked("text_model", TEXT, "encoder.layers.{layer}", (Weight("head", "text_projection"),))


class ClipTextBackend(Backend):
    """CLIPTextModel and CLIPTextModelWithProjection."""

    component = "text_encoder"
    whole_blocks = True
    writes = ("save_pretrained",)
    ignored: ClassVar[Mapping[str, str]] = {
        "*layer_norm*": "a norm's gain is no projection; adapters act on the projections beside it"
    }

    def points(self, model: nn.Module, component: str) -> list[InjectionPoint]:
        return resolve(model, GROUPS, component)

    def reach(self, model: nn.Module, point: InjectionPoint) -> Reach:
        if isinstance(point, AttentionPoint):
            return Reach(seam=TransformersAttentionSeam())
        return super().reach(model, point)
