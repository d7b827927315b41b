"""What is written for diffusion transformers, through diffusers' own conversion: the same change of the weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapterkit.checkpoint import Checkpoint
from adapterkit.contract.codec import Said
from adapterkit.formats.cards import CardOptions
from adapterkit.formats.modules import Modules
from adapterkit.formats.parts import Collected
from adapterkit.formats.registry import named_format
from adapterkit.handle.view import seen
from adapterkit.mapping.model import map_model
from tests.formats import test_original_checkpoints as models


def qwen_image() -> nn.Module:
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(
        in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=12,
        axes_dims_rope=(2, 2, 4),
    )  # fmt: skip


BLOCKS = r"transformer_blocks\.\d+\."
CASES: dict[str, tuple[Callable[[], nn.Module], str, str, str]] = {
    "flux": (models.flux, "FluxPipeline", "kohya", rf".*{BLOCKS}.*(attn|ff|proj|linear)"),
    "flux comfy": (models.flux, "FluxPipeline", "comfy", rf"{BLOCKS}.*(attn|ff|proj|linear)"),
    "flux2": (models.flux2, "Flux2Pipeline", "kohya", rf".*{BLOCKS}.*(attn|ff)"),
    "flux2 comfy": (models.flux2, "Flux2Pipeline", "comfy", rf".*{BLOCKS}.*(attn|ff)|.*(embedder|proj_out)"),
    "wan": (models.wan, "WanPipeline", "kohya", r"blocks\.\d+\.(attn|ffn)"),
    "wan comfy": (models.wan, "WanPipeline", "comfy", r"blocks\.\d+\.(attn|ffn)|condition_embedder\.time_"),
    "z_image": (models.z_image, "ZImagePipeline", "kohya", r"(layers|.*refiner)\.\d+\.(attention|feed_forward)"),
    "z_image comfy": (models.z_image, "ZImagePipeline", "comfy", r"(layers|.*refiner)\.\d+\.(attention|feed_forward)"),
    "qwen_image": (qwen_image, "QwenImagePipeline", "kohya", rf"{BLOCKS}|img_in|txt_in|proj_out|.*linear"),
    "qwen_image comfy": (qwen_image, "QwenImagePipeline", "comfy", BLOCKS),
    "lumina2 comfy": (models.lumina2, "Lumina2Pipeline", "comfy", r"(layers|.*refiner)\.\d+\.(attn|feed_|norm1\.lin)"),
    "hunyuan comfy": (models.hunyuan_video, "HunyuanVideoPipeline", "comfy", rf"{BLOCKS}.*(attn|ff|proj)"),
    "ltx comfy": (models.ltx, "LTXPipeline", "comfy", rf"{BLOCKS}(attn|ff)"),
}


def adapted(model: nn.Module, chosen: str) -> tuple[Any, Checkpoint, dict[str, Tensor]]:
    """Points, LoRA with ranks and alphas of several sizes, and what each module's makes of `probe`."""
    points = seen(map_model(model))
    noise, into, made = torch.Generator().manual_seed(0), Collected(), dict[str, Tensor]()
    for place, module in enumerate(Modules(points)):
        if not re.match(chosen, module.path) or len(module.shape) != 2:
            continue
        for own in module.places:
            rank, alpha, shape = 1 + place % 3, 1.0 + place % 2, own.point.shape
            a, b = torch.randn(rank, shape[1], generator=noise), torch.randn(shape[0], rank, generator=noise)
            into.add(own.point.id, Said("lora", {"rank": rank, "alpha": alpha}, {"A": a, "B": b}))
            y = made.setdefault(module.path, torch.zeros(module.shape[0], dtype=torch.double))
            x = own.of_columns(probe(module.shape[1]), axis=0)
            rows = slice(None) if own.rows is None else own.rows
            y[rows if isinstance(rows, slice) else list(rows)] += alpha / rank * b.double() @ (a.double() @ x)
    return points, Checkpoint(into.parts()), made


def probe(width: int) -> Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(1), dtype=torch.double)


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed`:FutureWarning")
@pytest.mark.parametrize("case", CASES)
def test_diffusers_converts_what_is_written_to_the_same_change(case: str, tmp_path: Path) -> None:
    import diffusers

    make, pipeline, name, chosen = CASES[case]
    with torch.device("meta"):
        model = make()
    points, checkpoint, made = adapted(model, chosen)
    assert len(made) > 5
    file = tmp_path / "it.safetensors"
    named_format(name).write({"": checkpoint}, file, points, CardOptions())
    found: Any = getattr(diffusers, pipeline).lora_state_dict(str(tmp_path), weight_name=file.name)
    for path, y in made.items():
        key = f"transformer.{path}"
        down, up = found.pop(f"{key}.lora_A.weight"), found.pop(f"{key}.lora_B.weight")
        got = up.double() @ (down.double() @ probe(down.shape[1]))
        assert float((got - y).abs().max() / y.abs().max()) < 1e-5, path
    assert not found
