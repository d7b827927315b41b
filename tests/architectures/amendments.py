"""Defaults that the libraries themselves cannot build, as the least change that mends them."""

from __future__ import annotations

from collections.abc import Mapping

_HUNYUAN = {"in_channels": 4, "patch_size": 2}

AMENDED: Mapping[str, Mapping[str, object]] = {
    # diffusers: sizes that have no default, as the models that exist have them.
    "ControlNetUnionModel": {"addition_time_embed_dim": 256},
    "DreamLiteTransformer2DModel": {"in_channels": 1408},
    "EasyAnimateTransformer3DModel": {"in_channels": 16, "out_channels": 16, "patch_size": 2},
    "HiDreamImageTransformer2DModel": {
        "patch_size": 2,
        "caption_channels": [4096, 4096],
        "llama_layers": [*range(32)] + [31] * 16,
    },
    "HunyuanDiT2DControlNetModel": _HUNYUAN,
    "HunyuanDiT2DModel": _HUNYUAN,
    "LatteTransformer3DModel": {
        "in_channels": 4,
        "patch_size": 2,
        "caption_channels": 4096,
        "cross_attention_dim": 1408,
        "norm_type": "ada_norm_single",
        "num_embeds_ada_norm": 1000,
    },
    "LuminaNextDiT2DModel": {"num_kv_heads": 8},
    "OmniGenTransformer2DModel": {"rope_scaling": {"short_factor": [1.0] * 48, "long_factor": [1.0] * 48}},
    "Transformer2DModel": {"in_channels": 1408, "cross_attention_dim": 768},
    "TransformerTemporalModel": {"in_channels": 1408},
    "ZImageControlNetModel": {
        "control_layers_places": [0, 5],
        "control_refiner_layers_places": [0, 1],
        "control_in_dim": 16,
    },
    "FluxMultiControlNetModel": {"controlnets": ["FluxControlNetModel"]},
    "HunyuanDiT2DMultiControlNetModel": {"controlnets": ["HunyuanDiT2DControlNetModel"]},
    "MultiControlNetModel": {"controlnets": ["ControlNetModel"]},
    "MultiControlNetUnionModel": {"controlnets": ["ControlNetUnionModel"]},
    "QwenImageMultiControlNetModel": {"controlnets": ["QwenImageControlNetModel"]},
    "SD3MultiControlNetModel": {"controlnets": ["SD3ControlNetModel"]},
}
