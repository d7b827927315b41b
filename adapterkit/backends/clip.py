"""CLIP's text encoders, which Stable Diffusion conditions on, in the layouts of transformers 4 and 5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from adapterkit.backend import Backend, Reach
from adapterkit.backends.transformers_attention import TransformersAttentionSeam
from adapterkit.mapping.family import Attention, Group, Output, Tokens, Weight, resolve
from adapterkit.points import AttentionPoint, InjectionPoint

if TYPE_CHECKING:
    from torch import nn


def _heads(attention: Any) -> tuple[int, int]:
    return attention.num_heads, attention.head_dim


# Transformers 4 keeps the encoder below `text_model` in every class; 5 only where there is a projection beside it.
GROUPS = (
    Group(
        "text_model.embeddings|embeddings",
        "",
        (
            Weight("embed.tokens", "token_embedding"),
            Weight("embed.pos", "position_embedding"),
            Tokens("tokens", "token_embedding"),
        ),
    ),
    Group(
        "text_model.encoder.layers.{layer}|encoder.layers.{layer}",
        "{layer}",
        (
            Weight("attn.q", "self_attn.q_proj"),
            Weight("attn.k", "self_attn.k_proj"),
            Weight("attn.v", "self_attn.v_proj"),
            Weight("attn.o", "self_attn.out_proj"),
            Attention("attn.kv", "self_attn", _heads),
            Output("attn", "self_attn.out_proj", residual="layer_norm1", norm_in="layer_norm1"),
            Weight("mlp.up", "mlp.fc1"),
            Weight("mlp.down", "mlp.fc2"),
            Output("mlp", "mlp.fc2", residual="layer_norm2", norm_in="layer_norm2"),
        ),
    ),
    Group("", "", (Weight("head", "text_projection"),)),
)


class ClipTextBackend(Backend):
    """CLIPTextModel and CLIPTextModelWithProjection."""

    component = "text_encoder"
    whole_blocks = True
    writes = ("save_pretrained",)
    ignored: ClassVar[Mapping[str, str]] = {
        "*layer_norm*": "a norm's gain is no projection; adapters act on the projections beside it",
    }

    def points(self, model: nn.Module, component: str) -> list[InjectionPoint]:
        return resolve(model, GROUPS, component)

    def reach(self, model: nn.Module, point: InjectionPoint) -> Reach:
        if isinstance(point, AttentionPoint):
            return Reach(seam=TransformersAttentionSeam())
        return super().reach(model, point)
