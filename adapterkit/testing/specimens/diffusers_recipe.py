"""What a class of diffusers' models wants beside the rules of `diffusers_configs.py` and `diffusers_inputs.py`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from adapterkit.testing.specimens.diffusers_inputs import (
    FRAMES,
    ROWS,
    SIDE,
    TEXT,
    TEXT_WIDTH,
    Input,
    noise,
    value,
)


@dataclass(frozen=True)
class Recipe:
    """What a class wants.

    Attributes:
        config: Arguments of the small copy.
        inputs: Arguments of its forward.
        layout: What its latents look like; empty where any of `LAYOUTS` that runs is right.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Input] = field(default_factory=dict)
    layout: str = ""


TOKENS = 6


def listed(make: Input, times: int = ROWS) -> Input:
    """A list of several."""
    return lambda config, generator: [make(config, generator) for _ in range(times)]


def made(module: str, cls: str, *given: Any) -> Any:
    """An object of a class in a module of diffusers' transformers."""
    return getattr(importlib.import_module(f"diffusers.models.transformers.{module}"), cls)(*given)


def turned(length: int, width: int, *, batch: bool = True) -> Input:
    """Cosines and sines of a rotary embedding, two numbers each."""
    angles = torch.outer(torch.arange(length), torch.linspace(1, 0.1, width // 2)).repeat_interleave(2, dim=-1)
    both = angles.cos().double(), angles.sin().double()
    return value(tuple(one[None] for one in both) if batch else both)


PLACES = value(torch.stack([torch.zeros(ROWS, 7).long(), *[torch.arange(7).expand(ROWS, 7)] * 2], -1))
SHAPES = value([[(1, 2, 3)]] * ROWS)
TIMES = value(torch.tensor([0.3, 0.7], dtype=torch.float64))
EACH_FRAME = value(torch.tensor([[3.0] * FRAMES] * ROWS, dtype=torch.float64))
SEEN = value(torch.ones(ROWS, TEXT, dtype=torch.bool))
TEXTS = noise(ROWS, TEXT, TEXT_WIDTH)

HUNYUAN_INPUTS = {
    "encoder_hidden_states": noise(ROWS, TEXT, "cross_attention_dim"),
    "text_embedding_mask": value(torch.ones(ROWS, TEXT, dtype=torch.bool)),
    "text_embedding_mask_t5": value(torch.ones(ROWS, TEXT, dtype=torch.bool)),
    "image_meta_size": value(torch.tensor([[8.0] * 6] * ROWS)),
    "style": value(torch.zeros(ROWS, dtype=torch.long)),
    "image_rotary_emb": turned(SIDE * SIDE // 4, 16, batch=False),
}
HUNYUAN_CONFIG = {"text_len": TEXT, "text_len_t5": TEXT}
