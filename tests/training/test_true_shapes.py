"""Recipes on denoisers of their true size, on the meta device: every shape fits, and no weight is there."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import pytest
import torch

from adapterkit.plugins.manager import class_of
from adapterkit.training.diffusion.loading import recipe_of
from adapterkit.training.diffusion.options import Options
from adapterkit.training.diffusion.recipe import Recipe

# Pipeline: denoiser, what its published config has beside the defaults, latents of its usual size, text, parameters in
# thousand millions. (Lumina 2 and Z-Image look into masks, which have no values on the meta device.)
CASES: dict[str, tuple[str, dict[str, Any], tuple[int, ...], dict[str, tuple[int, ...]], float]] = {
    "StableDiffusion3Pipeline": (
        "SD3Transformer2DModel",
        {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192},
        (16, 128, 128),
        {"states": (333, 4096), "pooled": (2048,)},
        2.0,
    ),
    "FluxPipeline": (
        "FluxTransformer2DModel",
        {"guidance_embeds": True},
        (16, 128, 128),
        {"states": (512, 4096), "pooled": (768,)},
        11.9,
    ),
    "Flux2Pipeline": ("Flux2Transformer2DModel", {}, (128, 64, 64), {"states": (512, 15360)}, 32.2),
    "QwenImagePipeline": (
        "QwenImageTransformer2DModel",
        {},
        (16, 128, 128),
        {"states": (40, 3584), "mask": (40,)},
        20.4,
    ),
    "PixArtAlphaPipeline": (
        "PixArtTransformer2DModel",
        {"caption_channels": 4096},
        (4, 128, 128),
        {"states": (120, 4096), "mask": (120,)},
        0.6,
    ),
    "SanaPipeline": ("SanaTransformer2DModel", {}, (32, 32, 32), {"states": (300, 2304), "mask": (300,)}, 1.6),
    "WanPipeline": ("WanTransformer3DModel", {}, (16, 60, 104), {"states": (226, 4096)}, 14.3),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_denoiser_of_true_size_is_called_as_it_wants(name: str):
    model, config, latents, text, size = CASES[name]
    with torch.device("meta"):
        denoiser = getattr(diffusers, model)(**config)
    assert sum(p.numel() for p in denoiser.parameters()) / 1e9 == pytest.approx(size, abs=0.1)
    cls: Any = getattr(diffusers, name)
    wanted = list(inspect.signature(cls.__init__).parameters.items())[1:]
    given = {"transformer": denoiser}
    pipe = cls(**{key: given.get(key) for key, one in wanted if key in given or one.default is inspect._empty})
    recipe = class_of(recipe_of(cls), Recipe)(pipe, Options())
    with torch.device("meta"):
        told = {
            key: torch.ones(1, *shape, dtype=torch.bool) if key == "mask" else torch.empty(1, *shape)
            for key, shape in text.items()
        }
        found = recipe.predict(torch.empty(1, *latents), torch.empty(1), told, {"sizes": torch.empty(1, 6)})
    assert found.shape == (1, *latents)
