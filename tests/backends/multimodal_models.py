"""Tiny models of several towers, frozen, from configs: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipConfig,
    SiglipModel,
)

from tests.backends import vision_models as models
from tests.backends.vision_families import SIZES, TEXT_SIZES, shaken

IMAGE_TOKEN = 38
_LANGUAGE: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 16,
    "vocab_size": 40,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_QWEN_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 16,
    "out_hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "window_size": 8,
    "fullatt_block_indexes": [1],
    "temporal_patch_size": 1,
}
_MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}


def _llava() -> Any:
    vision = {"model_type": "clip_vision_model", **SIZES, "projection_dim": 8}
    text = {"model_type": "llama", **_LANGUAGE}
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, vision_feature_layer=-1)
    return LlavaForConditionalGeneration(config)


def _qwen() -> Any:
    text = {"model_type": "qwen2_5_vl_text", **_LANGUAGE, "rope_parameters": _MROPE}
    special: dict[str, Any] = {"image_token_id": IMAGE_TOKEN, "bos_token_id": 1, "eos_token_id": 2}
    config = Qwen2_5_VLConfig(vision_config=_QWEN_VISION, text_config=text, **special)
    return Qwen2_5_VLForConditionalGeneration(config)


def _qwen3() -> Any:
    text = {"model_type": "qwen3_vl_text", **_LANGUAGE, "head_dim": 8, "rope_parameters": _MROPE}
    levels = {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    vision = {key: value for key, value in _QWEN_VISION.items() if key not in ("window_size", "fullatt_block_indexes")}
    special: dict[str, Any] = {"image_token_id": IMAGE_TOKEN, "bos_token_id": 1, "eos_token_id": 2}
    config = Qwen3VLConfig(vision_config={**vision, **levels}, text_config=text, **special)
    return Qwen3VLForConditionalGeneration(config)


MAKE: dict[str, Callable[[], Any]] = {
    "clip": lambda: CLIPModel(CLIPConfig(vision_config=SIZES, text_config=TEXT_SIZES, projection_dim=6)),
    "siglip": lambda: SiglipModel(
        SiglipConfig(vision_config=SIZES, text_config={**TEXT_SIZES, "projection_size": SIZES["hidden_size"]})
    ),
    "llava": _llava,
    "qwen": _qwen,
    "qwen3": _qwen3,
}
GENERATING = ("llava", "qwen", "qwen3")


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(3)
    model = shaken(MAKE[name]()).to(dtype)
    see(model)  # at its first call, transformers leaves a mark on the modules whose outputs it captures
    return model


def inputs(model: Any) -> dict[str, Tensor]:
    """An image and text for it; for the language models two rows, whose image stands among the words."""
    dtype = model.dtype
    if isinstance(model, (CLIPModel, SiglipModel)):
        ids = torch.tensor([[1, 5, 6, 7, 39], [1, 8, 9, 10, 39]])
        return {"input_ids": ids, "pixel_values": models.images(dtype=dtype)}
    ids = torch.tensor([[1, 5, *[IMAGE_TOKEN] * 4, 6, 7], [1, 8, *[IMAGE_TOKEN] * 4, 9, 10]])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if isinstance(model, LlavaForConditionalGeneration):
        return {**given, "pixel_values": models.images(dtype=dtype)}
    patches = torch.randn(32, 3 * 4 * 4, generator=torch.Generator().manual_seed(6)).to(dtype)
    kinds = (ids == IMAGE_TOKEN).int()
    return {
        **given,
        "pixel_values": patches,
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
        "mm_token_type_ids": kinds,
    }


def see(model: Any) -> Tensor:
    """What the model says of its inputs."""
    made = model(**inputs(model))
    return made.logits if hasattr(made, "logits") else made.logits_per_image
