"""The configuration of models of diffusers and transformers, read off the shapes in an original checkpoint.

Original checkpoints, those that UIs load, hold no configuration. What the weights' shapes do not depend on (numbers of
heads, schedules) is set to anything that fits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]
"""Name of a tensor behind a part's prefix -> its shape."""

_GROUPS = 32


def numbers(shapes: Shapes, start: str) -> list[int]:
    """The numbers that follow this beginning and a dot, in order."""
    inside = {key[len(start) + 1 :].partition(".")[0] for key in shapes if key.startswith(f"{start}.")}
    return sorted(int(number) for number in inside if number.isdigit())


def unet(shapes: Shapes) -> dict[str, Any]:
    """Of `UNet2DConditionModel`: Stable Diffusion 1.x, 2.x and XL."""
    down, up = _levels(shapes, "input_blocks", 1), _levels(shapes, "output_blocks", 0)
    width = shapes["input_blocks.0.0.weight"]
    first = next(key for key in shapes if key.endswith(".attn2.to_k.weight"))
    flat = next(shape for key, shape in shapes.items() if key.endswith(".proj_in.weight"))
    config: dict[str, Any] = {
        "in_channels": width[1],
        "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": tuple(level.width for level in down),
        "layers_per_block": down[0].layers,
        "down_block_types": tuple("CrossAttnDownBlock2D" if level.depth else "DownBlock2D" for level in down),
        "up_block_types": tuple("CrossAttnUpBlock2D" if level.depth else "UpBlock2D" for level in up),
        "transformer_layers_per_block": tuple(level.depth or 1 for level in down),
        "cross_attention_dim": shapes[first][1],
        "use_linear_projection": len(flat) == 2,
        "norm_num_groups": math.gcd(_GROUPS, *(level.width for level in down)),
        "attention_head_dim": 1,
    }
    if "label_emb.0.0.weight" in shapes:
        more = {"addition_embed_type": "text_time", "addition_time_embed_dim": 1}
        config |= {**more, "projection_class_embeddings_input_dim": shapes["label_emb.0.0.weight"][1]}
    return config


class _Level:
    """Blocks of one resolution: how many, how wide, and how many transformer layers each has."""

    def __init__(self, width: int, depth: int) -> None:
        self.width, self.depth, self.layers = width, depth, 1


def _levels(shapes: Shapes, start: str, first: int) -> list[_Level]:
    levels: list[_Level] = []
    fresh = True
    for number in numbers(shapes, start)[first:]:
        block = f"{start}.{number}"
        if f"{block}.0.op.weight" in shapes:
            fresh = True
            continue
        width = shapes[f"{block}.0.in_layers.2.weight"][0]
        depth = len(numbers(shapes, f"{block}.1.transformer_blocks"))
        if fresh:
            levels.append(_Level(width, depth))
        else:
            levels[-1].layers += 1
        fresh = any(f"{block}.{place}.conv.weight" in shapes for place in (1, 2))
    return levels


def clip(shapes: Shapes) -> dict[str, Any]:
    """Of `CLIPTextConfig`, from the names of transformers."""
    layers = "text_model.encoder.layers"
    vocabulary, width = shapes["text_model.embeddings.token_embedding.weight"]
    return _clip(shapes, layers, vocabulary, width, "text_model.embeddings.position_embedding.weight", "mlp.fc1")


def open_clip(shapes: Shapes) -> dict[str, Any]:
    """Of `CLIPTextConfig`, from the names of OpenCLIP."""
    vocabulary, width = shapes["token_embedding.weight"]
    found = _clip(shapes, "transformer.resblocks", vocabulary, width, "positional_embedding", "mlp.c_fc")
    return {**found, "projection_dim": shapes["text_projection"][1] if "text_projection" in shapes else width}


def _clip(shapes: Shapes, layers: str, vocabulary: int, width: int, positions: str, first: str) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": len(numbers(shapes, layers)),
        "num_attention_heads": 1,
        "max_position_embeddings": shapes[positions][0],
        "intermediate_size": shapes[f"{layers}.0.{first}.weight"][0],
        "projection_dim": width,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


def flux(shapes: Shapes) -> dict[str, Any]:
    """Of `FluxTransformer2DModel`."""
    inner, channels = shapes["img_in.weight"]
    head = shapes["double_blocks.0.img_attn.norm.query_norm.scale"][0]
    return {
        "in_channels": channels,
        "out_channels": shapes["final_layer.linear.weight"][0],
        "num_layers": len(numbers(shapes, "double_blocks")),
        "num_single_layers": len(numbers(shapes, "single_blocks")),
        "attention_head_dim": head,
        "num_attention_heads": inner // head,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "pooled_projection_dim": shapes["vector_in.in_layer.weight"][1],
        "guidance_embeds": "guidance_in.in_layer.weight" in shapes,
        "axes_dims_rope": (head, 0, 0),
    }
