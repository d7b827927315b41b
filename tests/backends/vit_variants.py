"""Every sort of vision transformer that the backends claim, tiny."""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.layers import GluMlp, SwiGLU, SwiGLUPacked
from timm.layers.attention import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock, ResPostBlock
from torch import Tensor, nn
from transformers import ViTForImageClassification

from tests.backends import vision_models as models


class GatedAttention(Attention):
    """timm's attention with the option that its VisionTransformer does not pass on."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options, gated=True)


TIMM: dict[str, dict[str, Any]] = {
    "plain": {},
    "every norm": {
        "qk_norm": True,
        "scale_attn_norm": True,
        "scale_mlp_norm": True,
        "init_values": 0.5,
        "pre_norm": True,
    },
    "dynamic size": {"dynamic_img_size": True, "no_embed_class": True, "reg_tokens": 2},
    "average pooling": {"class_token": False, "global_pool": "avg"},
    "map pooling": {"class_token": False, "global_pool": "map"},
    "no position": {"pos_embed": "none"},
    "drop": {"drop_path_rate": 0.3, "attn_drop_rate": 0.2, "proj_drop_rate": 0.1},
    "distilled": {"cls": VisionTransformerDistilled},
    "gated value first": {"mlp_layer": GluMlp},
    "gated gate first": {"mlp_layer": SwiGLUPacked},
    "gated split": {"mlp_layer": SwiGLU},
    "gated attention": {"attn_layer": GatedAttention},
    "differential attention": {"attn_layer": "diff"},
    "post-norm": {"block_fn": ResPostBlock},
    "parallel sublayers": {"block_fn": ParallelScalingBlock},
    "parallel sublayers, fused": {"block_fn": partial(ParallelScalingBlock, fuse_out_proj=True)},
    "parallel branches": {"block_fn": ParallelThingsBlock},
}
WITHOUT_OUTPUTS = ("post-norm",)
WITHOUT_PREFIX = ("differential attention", "parallel sublayers", "parallel sublayers, fused")


def classify(model: nn.Module) -> Tensor:
    """The scores of fixed images; of transformers' models whatever comes first."""
    made = model(models.images(dtype=next(model.parameters()).dtype))
    return made if isinstance(made, Tensor) else made[0]


def vit(cls: type = ViTForImageClassification, **options: Any) -> Any:
    return cls(models.vit_config(num_labels=models.CLASSES, **options)).eval()
