"""Tiny pipelines of diffusion transformers, each with one evaluation of its transformer on fixed inputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor

from tests.backends import diffusion_models as models
from tests.backends.diffusion_models import frozen
from tests.formats import test_original_checkpoints as tiny
from tests.formats.pipelines import clip


def _pipe(name: str, transformer: Any, **parts: Any) -> Any:
    """A pipeline of the class, with this transformer and nothing else that is not given."""
    cls = getattr(diffusers, name)
    given = {"transformer": transformer, "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(), **parts}
    parameters = list(inspect.signature(cls.__init__).parameters.items())[1:]
    return cls(**{key: given.get(key) for key, one in parameters if key in given or one.default is inspect._empty})


def sd3() -> Any:
    from transformers import CLIPTextModelWithProjection

    two = {
        "text_encoder": clip(8, CLIPTextModelWithProjection),
        "text_encoder_2": clip(12, CLIPTextModelWithProjection),
    }
    return _pipe("StableDiffusion3Pipeline", models.sd3(), **two)


def flux() -> Any:
    return _pipe("FluxPipeline", models.flux(), text_encoder=clip(8))


def qwen_image() -> Any:
    model = diffusers.QwenImageTransformer2DModel(
        in_channels=4, out_channels=1, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    return _pipe("QwenImagePipeline", frozen(model))


def lumina2() -> Any:
    model = diffusers.Lumina2Transformer2DModel(
        sample_size=8, in_channels=4, hidden_size=24, num_layers=2, num_refiner_layers=1, num_attention_heads=2,
        num_kv_heads=1, multiple_of=4, axes_dim_rope=(4, 4, 4), axes_lens=(16, 16, 16), cap_feat_dim=12,
    )  # fmt: skip
    return _pipe("Lumina2Pipeline", frozen(model))


def z_image() -> Any:
    model = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=16, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=8,
        axes_dims=[2, 2, 4], axes_lens=[64, 64, 64],
    )  # fmt: skip
    return _pipe("ZImagePipeline", frozen(model))


def flux2() -> Any:
    return _pipe("Flux2Pipeline", frozen(tiny.flux2()))


def wan() -> Any:
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=12, freq_dim=8,
        ffn_dim=16, num_layers=2,
    )  # fmt: skip
    return _pipe("WanPipeline", frozen(model))


PIPELINES: dict[str, Callable[[], Any]] = {
    "sd3": sd3,
    "flux": flux,
    "qwen_image": qwen_image,
    "lumina2": lumina2,
    "z_image": z_image,
    "flux2": flux2,
    "wan": wan,
}


@torch.no_grad()
def run(pipe: Any) -> dict[str, Tensor]:
    """What each model makes of fixed inputs."""
    noise = torch.Generator().manual_seed(5)
    ids = torch.tensor([[18, 3, 4, 5, 6, 19]])
    found: dict[str, Tensor] = {}
    for name in ("text_encoder", "text_encoder_2"):
        if (encoder := pipe.components.get(name)) is not None:
            found[name] = encoder(ids)[0]
            found[f"{name} hidden"] = encoder(ids, output_hidden_states=True).hidden_states[-1]
    out = _INPUTS[type(pipe.transformer).__name__](
        pipe.transformer, lambda *shape: torch.randn(*shape, generator=noise)
    )
    found["transformer"] = out[0][0] if isinstance(out[0], list) else out[0]
    return found


_Draw = Callable[..., Tensor]


def _sd3(model: Any, draw: _Draw) -> Any:
    text, pooled = draw(1, 5, models.TEXT), draw(1, models.POOLED)
    return model(draw(1, models.CHANNELS, 8, 8), text, pooled, torch.tensor([3.0]), return_dict=False)


def _flux(model: Any, draw: _Draw) -> Any:
    given = {"txt_ids": torch.zeros(5, 3), "img_ids": torch.zeros(4, 3), "guidance": torch.tensor([2.0])}
    pooled = draw(1, models.POOLED)
    return model(draw(1, 4, 4), draw(1, 5, models.TEXT), pooled, torch.tensor([0.3]), **given, return_dict=False)


def _qwen_image(model: Any, draw: _Draw) -> Any:
    given = {"encoder_hidden_states_mask": torch.ones(1, 5), "img_shapes": [[(1, 2, 2)]]}
    return model(draw(1, 4, 4), draw(1, 5, 12), timestep=torch.tensor([0.3]), **given, return_dict=False)


def _lumina2(model: Any, draw: _Draw) -> Any:
    mask = torch.ones(1, 5, dtype=torch.bool)
    return model(draw(1, 4, 8, 8), torch.tensor([0.3]), draw(1, 5, 12), mask, return_dict=False)


def _z_image(model: Any, draw: _Draw) -> Any:
    return model([draw(4, 1, 4, 4)], torch.tensor([0.3]), [draw(5, 8)], return_dict=False)


def _flux2(model: Any, draw: _Draw) -> Any:
    given = {"txt_ids": torch.zeros(1, 5, 4), "img_ids": torch.zeros(1, 4, 4), "guidance": torch.tensor([2.0])}
    return model(draw(1, 4, 4), draw(1, 5, 12), torch.tensor([0.3]), **given, return_dict=False)


def _wan(model: Any, draw: _Draw) -> Any:
    return model(draw(1, 4, 2, 4, 4), torch.tensor([3]), draw(1, 5, 12), return_dict=False)


_INPUTS: dict[str, Callable[[Any, _Draw], Any]] = {
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "QwenImageTransformer2DModel": _qwen_image,
    "Lumina2Transformer2DModel": _lumina2,
    "ZImageTransformer2DModel": _z_image,
    "Flux2Transformer2DModel": _flux2,
    "WanTransformer3DModel": _wan,
}
