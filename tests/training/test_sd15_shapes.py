"""The public command on a folder with the very shapes of Stable Diffusion 1.5; only the weights are random."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

from adapterkit.cli.main import main
from adapterkit.training.run_folder import read_metrics
from tests.backends import vision_models


def pipeline(folder: Path) -> Any:
    """Stable Diffusion 1.5 as its published configuration files describe it, in half precision."""
    folder.mkdir()
    tokenizer = vision_models._tokenizer(folder)
    tokenizer.model_max_length = 77
    text = CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        max_position_embeddings=77, hidden_act="quick_gelu", projection_dim=768,
        bos_token_id=0, eos_token_id=2, pad_token_id=1,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=64, cross_attention_dim=768, attention_head_dim=8, block_out_channels=(320, 640, 1280, 1280),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=512,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1,
        set_alpha_to_one=False,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=vae.half(), text_encoder=CLIPTextModel(text).half(), tokenizer=tokenizer, unet=unet.half(),
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_one_step_on_the_true_shapes(tmp_path: Path):
    model, data, run = tmp_path / "stable-diffusion-v1-5", tmp_path / "data", tmp_path / "run"
    made = pipeline(tmp_path / "words")
    made.save_pretrained(model)
    del made
    index = model / "model_index.json"  # the published one lists a safety checker, which training does not load
    listed = json.loads(index.read_text())
    listed["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    listed["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    listed["requires_safety_checker"] = True
    index.write_text(json.dumps(listed))
    data.mkdir()
    Image.effect_noise((600, 520), 80).convert("RGB").save(data / "a.png")
    (data / "a.txt").write_text("a red circle in ink")
    config = tmp_path / "run.yaml"
    config.write_text(
        f"task: diffusion\nmodel: {model}\ndata: {data}\noutput: {run}\n"
        'adapter: {type: lora, rank: 8, targets: "{attn,cross,mlp,proj}.*@component=unet"}\n'
        "steps: 1\ngradient_checkpointing: true\noptions: {sample_steps: 1}\n"
    )
    result = CliRunner().invoke(main, ["train", str(config)])
    assert result.exit_code == 0, result.output
    losses = [record["loss"] for record in read_metrics(run / "metrics.jsonl") if "loss" in record]
    assert len(losses) == 1
    assert 0.5 < losses[0] < 20  # white noise against what an untrained network says
    weights = load_file(run / "adapter.safetensors")
    # 16 transformers, each with 8 projections of attention, 3 of the feed-forward and 2 around them.
    assert len(weights) == 2 * 16 * (8 + 3 + 2)
    assert all(bool(weights[key].any()) for key in weights if key.endswith("/B"))
    with Image.open(run / "samples/step_000000_p0_s42.png") as image:
        assert image.size == (512, 512)
    assert (run / "samples/grid.png").exists()
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
