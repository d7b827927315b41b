"""Small sizes of timm's models, as data: by the name of the class, or of the module of timm.models for some.

Widths and heads differ between stages, so that none can be taken for another, and there are two heads or more. Depths
are as small as shows every kind of block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

_WIDTHS = (16, 24, 32, 48)
_ONES, _TWOS = (1, 1, 1, 1), (2, 2, 2, 2)


@dataclass(frozen=True)
class Small:
    """How to build a small one.

    Attributes:
        side: Of its square images.
        options: For timm's function of that architecture.
        built: By that function; or by the class itself, where the function takes no other sizes; or by the class from
            the function's config (`model_cfgs` of its module), which the options are then a change of.
        takes: Options of the class read off the model: name -> path in a stage of the module whose class it is,
            one for each stage.
    """

    side: int
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    built: Literal["function", "class", "config"] = "function"
    takes: Mapping[str, str] = field(default_factory=dict[str, str])


def _plain(side: int = 32, **options: Any) -> Small:
    return Small(side, {"img_size": side, "embed_dim": 24, "depth": 2, "num_heads": 2, **options})


def _windows(cls_options: Mapping[str, Any] | None = None) -> Small:
    sizes = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (2, 1), "num_heads": (2, 4)}
    return Small(32, {**sizes, **(cls_options or {})})


_CONV_ATTENTION = {"width_list": [8, 16, 16, 32, 48], "depth_list": [0, 1, 1, 3, 4], "head_widths": (32, 48)}
_LEVIT = {"img_size": 128, "embed_dim": (32, 48, 64), "key_dim": 8, "num_heads": (2, 3, 4), "depth": (1, 1, 1)}

CLASSES: Mapping[str, Small] = {
    "Beit": _plain(),
    "CPUBone": Small(64, _CONV_ATTENTION),
    "CSATv2": Small(64, {"dims": _WIDTHS, "depths": (1, 1, 2, 2), "transformer_depths": (0, 0, 1, 1)}),
    "Cait": _plain(),
    "CoaT": Small(64, {"img_size": 64, "embed_dims": (32,) * 4, "serial_depths": _ONES, "num_heads": 8}),
    "ConVit": _plain(embed_dim=12, local_up_to_layer=1),
    "ConvNeXt": Small(64, {"dims": _WIDTHS, "depths": _ONES}),
    "CrossVit": Small(240, {"embed_dim": (16, 24), "depth": ((1, 2, 0), (1, 1, 0)), "num_heads": (2, 2)}),
    "DaVit": Small(64, {"depths": _ONES, "embed_dims": _WIDTHS, "num_heads": _TWOS}),
    "DeepseekVitClassifier": _plain(84, embed_dim=64),
    "EdgeNeXt": Small(64, {"dims": (16, 16, 24, 32), "depths": (1, 2, 2, 2), "heads": _TWOS}),
    "EfficientFormer": Small(224, {"depths": (1, 1, 1, 3), "embed_dims": (16, 16, 24, 32)}),
    "EfficientFormerV2": Small(64, {"img_size": 64, "depths": (1, 1, 2, 2), "embed_dims": (16, 16, 24, 32)}),
    "EfficientVitMsra": Small(
        128, {"img_size": 128, "embed_dim": (16, 24, 32), "key_dim": (4,) * 3, "depth": (1,) * 3, "num_heads": (2,) * 3}
    ),
    "Eva": _plain(embed_dim=32, patch_size=8),
    "FastVit": Small(64, {"layers": _ONES, "embed_dims": (16, 32, 32, 64)}),
    "Gemma4VitClassifier": _plain(96, embed_dim=32, head_dim=16, intermediate_size=48, position_embedding_size=36),
    "GlobalContextVit": Small(
        128,
        {"img_size": 128, "window_size": (4, 4, 8, 4), "embed_dim": 16, "depths": _TWOS, "num_heads": _TWOS},
        "class",
    ),
    "Hiera": Small(64, {"img_size": (64, 64), "embed_dim": 8, "num_heads": 2, "stages": (1, 1, 2, 1)}),
    "HieraDet": Small(
        64,
        {
            "embed_dim": 8,
            "num_heads": 2,
            "stages": (1, 2, 2, 1),
            "window_spec": (4, 4, 4, 2),
            "global_att_blocks": (4,),
        },
    ),
    "Levit": Small(128, _LEVIT),
    "LevitDistilled": Small(128, _LEVIT),
    "LowFormer": Small(64, _CONV_ATTENTION),
    "MaxxVit": Small(64, {"img_size": 64, "embed_dim": (32, 32, 64, 64), "depths": _ONES, "stem_width": 16}),
    "MetaFormer": Small(
        32,
        {"depths": _ONES, "dims": (16, 24, 32, 64)},
        "class",
        {"token_mixers": "blocks.0.token_mixer", "norm_layers": "blocks.0.norm1"},
    ),
    "MlpMixer": Small(32, {"img_size": 32, "embed_dim": 24, "num_blocks": 2}),
    "MobileNetV5": Small(64, {"channel_multiplier": 0.1}),
    "MultiScaleVit": Small(64, {"depths": (1, 1, 2, 1), "embed_dim": _WIDTHS, "num_heads": _TWOS}, "config"),
    "NaFlexVit": Small(32, {"embed_dim": 32, "depth": 2, "num_heads": 2, "pos_embed_grid_size": (2, 2)}),
    "Nest": Small(
        32,
        {"img_size": 32, "patch_size": 2, "embed_dims": (8, 12, 16), "num_heads": (2, 2, 2), "depths": (1, 1, 1)},
        "class",
    ),
    "NextViT": Small(64, {"depths": (1, 2, 5, 2)}),
    "PoolingVisionTransformer": Small(
        32, {"img_size": 32, "patch_size": 8, "stride": 4, "base_dims": (8,) * 3, "depth": (1,) * 3, "heads": (2, 4, 8)}
    ),
    "PyramidVisionTransformerV2": Small(64, {"depths": _ONES, "embed_dims": (8, 16, 24, 32), "num_heads": _TWOS}),
    "Qwen3VitClassifier": _plain(64, embed_dim=32, pos_embed_grid_size=4),
    "SwiftFormer": Small(64, {"layers": _TWOS, "embed_dims": (16, 16, 24, 32)}),
    "SwinTransformer": _windows(),
    "SwinTransformerV2": _windows(),
    "SwinTransformerV2Cr": _windows(),
    "TNT": Small(
        32, {"img_size": 32, "embed_dim": 24, "inner_dim": 8, "depth": 2, "num_heads_inner": 2, "num_heads_outer": 2}
    ),
    "TinyVit": Small(
        64, {"embed_dims": (16, 16, 24, 32), "depths": _ONES, "num_heads": _TWOS, "window_sizes": (4, 4, 4, 2)}
    ),
    "Twins": Small(64, {"img_size": 64, "depths": _ONES, "embed_dims": (8, 16, 24, 32), "num_heads": _TWOS}),
    "VOLO": Small(32, {"img_size": 32, "layers": _ONES, "embed_dims": (12, 16, 16, 16), "num_heads": _TWOS}, "class"),
    "VisionTransformer": _plain(),
    "VisionTransformerDistilled": _plain(),
    "VisionTransformerRelPos": _plain(),
    "VisionTransformerSAM": _plain(patch_size=4, window_size=4),
    "Visformer": Small(64, {"img_size": 64, "embed_dim": 32, "depth": (1, 1, 1), "num_heads": 2}),
    "Xcit": _plain(),
}

_DEPTH_ALONE = Small(64, {"img_size": 64, "depth": 2})  # the stem tells the width

MODULES: Mapping[str, Small] = {
    "byoanet": Small(64, {"img_size": 64}),
    "vision_transformer_hybrid": _DEPTH_ALONE,
    "vitamin": _DEPTH_ALONE,
}
