"""One tiny model of every vision family beside ViT, frozen, from a config: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.models.beit import Beit
from timm.models.convnext import ConvNeXt
from timm.models.eva import Eva
from timm.models.hiera import Hiera
from timm.models.metaformer import (
    Attention,
    LayerNorm2dNoBias,
    LayerNormNoBias,
    MetaFormer,
    SepConv,
)
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SiglipTextConfig,
    SiglipTextModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinConfig,
    SwinForImageClassification,
)

from tests.backends import vision_models as models

Make = Callable[[], Any]

WIDTH, CLASSES = models.WIDTH, models.CLASSES
SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 2 * WIDTH,
    "image_size": 8,
    "patch_size": 4,
}
TEXT_SIZES: dict[str, Any] = {
    **{key: SIZES[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")},
    "vocab_size": 40,
    "max_position_embeddings": 12,
    "eos_token_id": 39,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
_LABELS: dict[str, Any] = {"num_labels": CLASSES}
_WINDOWS: dict[str, Any] = {"img_size": 16, "patch_size": 2, "window_size": 4, "depths": (2, 1), "num_heads": (2, 2)}


def _timm(cls: type, **options: Any) -> Make:
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": WIDTH, "depth": 2, "num_heads": 2, "num_classes": CLASSES}
    return lambda: cls(**{**sizes, **options})


def _windowed(cls: type, **options: Any) -> Make:
    return lambda: cls(**_WINDOWS, embed_dim=WIDTH, num_classes=CLASSES, **options)


def _convnext(**options: Any) -> Make:
    dims = (WIDTH, WIDTH, 12, 16)
    return lambda: ConvNeXt(depths=(1, 1, 1, 1), dims=dims, num_classes=CLASSES, ls_init_value=0.5, **options)


def _hiera(**options: Any) -> Make:
    layout: dict[str, Any] = {"img_size": (32, 32), "stages": (1, 2, 1), "q_pool": 2, "mask_unit_size": (4, 4)}
    attention = {"mask_unit_attn": (True, False, False), "num_heads": 1, "embed_dim": WIDTH}
    return lambda: Hiera(**layout, **attention, num_classes=CLASSES, **options)


def _caformer() -> MetaFormer:
    mixers: list[Any] = [SepConv, SepConv, Attention, Attention]
    norms: list[Any] = [LayerNorm2dNoBias, LayerNorm2dNoBias, LayerNormNoBias, LayerNormNoBias]
    sizes: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 12, 32, 64), "num_classes": CLASSES}
    return MetaFormer(**sizes, token_mixers=mixers, norm_layers=norms)


TIMM: dict[str, Make] = {
    "eva": _timm(Eva, init_values=0.5),
    "eva02": _timm(Eva, swiglu_mlp=True, qkv_fused=False, use_rot_pos_emb=True, scale_mlp=True),
    "eva packed": _timm(Eva, swiglu_mlp=True, qkv_bias=False, scale_attn_inner=True),
    "eva grouped": _timm(Eva, attn_type="rope", qkv_fused=False, num_kv_heads=1, use_rot_pos_emb=True),
    "eva post-norm": _timm(Eva, use_post_norm=True),
    "dinov3": _timm(
        Eva,
        attn_type="rope",
        rope_type="dinov3",
        use_rot_pos_emb=True,
        use_abs_pos_emb=False,
        num_reg_tokens=1,
        init_values=0.5,
    ),
    "beit": _timm(Beit, init_values=0.5, use_rel_pos_bias=True, use_abs_pos_emb=False),
    "beit v2": _timm(Beit, init_values=0.5, use_shared_rel_pos_bias=True, swiglu_mlp=True, qkv_bias=False),
    "swin": _windowed(SwinTransformer),
    "swin v2": _windowed(SwinTransformerV2),
    "convnext": _convnext(),
    "convnext v2": _convnext(use_grn=True, conv_mlp=True, stem_type="overlap", head_hidden_size=6),
    "hiera": _hiera(),
    "caformer": _caformer,
}

TRANSFORMERS: dict[str, Make] = {
    "dinov2": lambda: Dinov2ForImageClassification(Dinov2Config(**SIZES, **_LABELS)),
    "dinov2 gated": lambda: Dinov2Model(Dinov2Config(**SIZES, use_swiglu_ffn=True, drop_path_rate=0.2)),
    "dinov2 registers": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SIZES)),
    "dinov3": lambda: DINOv3ViTModel(DINOv3ViTConfig(**SIZES, num_register_tokens=1)),
    "dinov3 gated": lambda: DINOv3ViTModel(DINOv3ViTConfig(**SIZES, use_gated_mlp=True)),
    "beit": lambda: BeitForImageClassification(
        BeitConfig(**SIZES, use_relative_position_bias=True, **_LABELS, layer_scale_init_value=0.5)
    ),
    "swin": lambda: SwinForImageClassification(
        SwinConfig(**{_NAMES.get(key, key): value for key, value in _WINDOWS.items()}, embed_dim=8, **_LABELS)
    ),
    "clip": lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**SIZES, projection_dim=6)),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**SIZES)),
    "siglip text": lambda: SiglipTextModel(SiglipTextConfig(**TEXT_SIZES, projection_size=6)),
}
_NAMES = {"img_size": "image_size"}

FAMILIES = {**{f"timm {name}": make for name, make in TIMM.items()}, **TRANSFORMERS}
WITHOUT_OUTPUTS = ("timm convnext", "timm convnext v2")
WITHOUT_PREFIX = ("timm swin v2", *WITHOUT_OUTPUTS)


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The model in evaluation, with every parameter away from what would hide an error (zero biases, tiny weights)."""
    torch.manual_seed(3)
    return shaken(FAMILIES[name]()).to(dtype)


def shaken(model: nn.Module) -> Any:
    """The model, frozen and in evaluation, with random values where freshly made parameters are all alike or tiny."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.numel():
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.requires_grad_(False).eval()


def see(model: nn.Module) -> Tensor:
    """The main output for fixed images, or for fixed text."""
    dtype = next(model.parameters()).dtype
    if isinstance(model, SiglipTextModel):
        return model(torch.arange(2, 10).view(2, 4)).pooler_output
    config: Any = getattr(model, "config", None)
    size: int = config.image_size if config is not None else 32
    if isinstance(model, (Eva, Beit, SwinTransformer, SwinTransformerV2)):
        grid: Any = model.patch_embed
        size = grid.img_size[0]
    made = model(models.images(size=size, dtype=dtype))
    if isinstance(model, SiglipVisionModel):  # the pooled output, which everything has a part in
        return made.pooler_output
    return made if isinstance(made, Tensor) else made[0]
