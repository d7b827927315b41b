"""Inputs of diffusers' models by the names of what their forwards take."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

ROWS, TEXT, SIDE, FRAMES = 2, 5, 8, 3
"""Samples, tokens of text, height and width of latents, frames of them."""

Config = Mapping[str, Any]
Input = Callable[[Config, torch.Generator], Any]
"""Makes one input of a model of this config."""


def noise(*shape: int | str) -> Input:
    """Random numbers; a name in the shape is that of an argument in the config, or several, the first that is there."""
    return lambda config, generator: torch.randn(
        [_size(config, size) for size in shape], generator=generator, dtype=torch.float64
    )


def whole(below: int | str, *shape: int | str) -> Input:
    """Random ids."""
    return lambda config, generator: torch.randint(
        _size(config, below), [_size(config, size) for size in shape], generator=generator
    )


def value(made: Any) -> Input:
    """The same for every model."""
    return lambda config, generator: made


def _size(config: Config, size: int | str) -> int:
    if isinstance(size, int):
        return size
    for name in size.split("|"):
        found = config.get(name)
        if found is not None:
            return int(found[0] if isinstance(found, (list, tuple)) else found)
    raise KeyError(size)


TEXT_WIDTH = (
    "joint_attention_dim|text_embed_dim|text_dim|caption_channels|context_in_dim|cap_feat_dim|text_in_dim|in_text_dim|"
    "encoder_hid_dim|cross_attention_input_dim|cond_token_dim|dit_text_dim|text_hidden_dim|llm_features_dim|"
    "encoder_hidden_size|encoder_hidden_states_channels|cross_attention_dim|condition_dim|embedding_dim|hidden_size"
)
_POOLED = "pooled_projection_dim|in_text_dim2|global_cond_dim|cond_embed_dim"
_CHANNELS = "in_channels|in_visual_dim|latent_channel|io_channels|latent_dim|in_dim"


def _places(length: int) -> Input:
    """Positions of tokens on the axes of the rotary embedding."""

    def make(config: Config, generator: torch.Generator) -> Tensor:
        axes = next((config[name] for name in ("axes_dims_rope", "rope_axes_dim") if config.get(name)), (1, 1, 1))
        places = torch.zeros(length, len(axes), dtype=torch.float64)
        places[:, -1] = torch.arange(length)
        places[:, -2] = torch.arange(length) // 2
        return places

    return make


def _if(name: str, made: Input) -> Input:
    return lambda config, generator: made(config, generator) if config.get(name) else None


LAYOUTS: Mapping[str, Input] = {
    "tokens": noise(ROWS, 6, _CHANNELS),
    "image": noise(ROWS, _CHANNELS, SIDE, SIDE),
    "video": noise(ROWS, _CHANNELS, FRAMES, SIDE, SIDE),
    "frames": noise(ROWS, FRAMES, _CHANNELS, SIDE, SIDE),
    "sound": noise(ROWS, _CHANNELS, SIDE),
}
"""What latents look like: packed into tokens, of images, of videos, of sound."""

_STEPS_BEHIND = torch.tensor([2.0, 300.0], dtype=torch.float64)
_SEEN = torch.ones(ROWS, TEXT, dtype=torch.bool)

COMMON: Mapping[str, Input] = {
    "encoder_hidden_states": noise(ROWS, TEXT, TEXT_WIDTH),
    "encoder_hidden_states_2": noise(ROWS, TEXT, "text_embed_2_dim"),
    "encoder_hidden_states_t5": noise(ROWS, TEXT, "cross_attention_dim_t5|text_embed_dim_t5"),
    "encoder_attention_mask_2": value(_SEEN),
    "pooled_projections": noise(ROWS, _POOLED),
    "global_hidden_states": noise(ROWS, "global_cond_dim|global_states_input_dim"),
    "timestep": value(torch.tensor([3.0, 400.0], dtype=torch.float64)),
    "timestep_r": _if("use_meanflow", value(_STEPS_BEHIND)),
    "r_timestep": value(_STEPS_BEHIND),
    "guidance": _if("guidance_embeds", value(torch.tensor([3.5, 1.0], dtype=torch.float64))),
    "img_ids": _places(6),
    "txt_ids": _places(TEXT),
    "original_size": value(torch.tensor([[8.0, 8.0]] * ROWS, dtype=torch.float64)),
    "target_size": value(torch.tensor([[8.0, 8.0]] * ROWS, dtype=torch.float64)),
    "crop_coords": value(torch.tensor([[0.0, 0.0]] * ROWS, dtype=torch.float64)),
    "num_frames": value(FRAMES),
    "height": value(1),
    "width": value(2),
    "fps": value(8),
    "image_embeds": noise(ROWS, 4, "image_embed_dim|image_proj_dim"),
    "added_time_ids": noise(ROWS, 3),
}
"""By parameter. What a class takes otherwise is in its recipe."""


REQUIRED: Mapping[str, Input] = {**COMMON, "encoder_attention_mask": value(_SEEN), "timestep_r": value(_STEPS_BEHIND)}
"""By parameter without a default."""


def inputs_of(model: nn.Module, special: Mapping[str, Input], layout: str) -> dict[str, Any]:
    """Inputs for every parameter of the forward that has no default, and for those that a recipe names.

    Raises:
        KeyError: There is a parameter that nothing here knows.
    """
    config: Config = model.config  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(4)
    made: dict[str, Any] = {}
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if name in special:
            made[name] = special[name](config, generator)
        elif name in ("hidden_states", "sample"):
            made[name] = LAYOUTS[layout](config, generator)
        elif parameter.default is inspect.Parameter.empty:
            made[name] = REQUIRED[name](config, generator)
        elif name in COMMON:
            made[name] = _possible(COMMON[name], config, generator)
    return {name: given for name, given in made.items() if given is not None}


def _possible(make: Input, config: Config, generator: torch.Generator) -> Any:
    """None where the config tells no size of it."""
    try:
        return make(config, generator)
    except KeyError:
        return None
