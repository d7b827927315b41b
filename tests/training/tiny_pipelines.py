"""Tiny pipelines of every family that has a recipe, tokenizers included, built from configs: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from tests.backends import diffusion_models, vision_models

TEXT = diffusion_models.TEXT
WORDS = ("<pad>", "</s>", "<unk>", *vision_models.WORDS)


def words(limit: int = 16, **options: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words."""
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=limit, **special, **options)


def clip(cls: Any, width: int) -> Any:
    last = len(vision_models._vocabulary())
    sizes = {"hidden_size": width, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 1}
    special = {"vocab_size": last, "max_position_embeddings": 16, "bos_token_id": last - 2, "eos_token_id": last - 1}
    return cls(CLIPTextConfig(**sizes, **special, projection_dim=width))


def t5() -> T5EncoderModel:
    sizes = {"d_model": TEXT, "d_kv": 6, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": len(WORDS)}
    return T5EncoderModel(T5Config(**sizes))


def vae(**options: Any) -> diffusers.AutoencoderKL:
    sizes = {"block_out_channels": (4, 8), "norm_num_groups": 4, "latent_channels": 4, "sample_size": 16}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return diffusers.AutoencoderKL(**{**sizes, **blocks, "shift_factor": 0.1, "scaling_factor": 0.7, **options})


def sd3(folder: Path) -> Any:
    tokenizer = vision_models._tokenizer(folder)
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusion_models.sd3(pos_embed_max_size=16),
        vae=vae(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=clip(CLIPTextModelWithProjection, 4),
        text_encoder_2=clip(CLIPTextModelWithProjection, 6),
        text_encoder_3=t5(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=words(),
    )


def flux(folder: Path) -> Any:
    return diffusers.FluxPipeline(
        transformer=diffusion_models.flux(in_channels=16),
        vae=vae(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        text_encoder=clip(CLIPTextModel, diffusion_models.POOLED),
        text_encoder_2=t5(),
        tokenizer=vision_models._tokenizer(folder),
        tokenizer_2=words(),
    )


CHAT = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }} {% else %}{{ m.content[0].text }} {% endif %}"
    "{% endfor %}"
)
FLOW: Any = diffusers.FlowMatchEulerDiscreteScheduler
DECODER = {
    "vocab_size": len(WORDS), "intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip


def language(name: str, width: int, layers: int = 2, **options: Any) -> Any:
    """A language model of transformers by the name of its class."""
    cls: Any = getattr(transformers, name)
    sizes = {**DECODER, "hidden_size": width, "head_dim": width, "num_hidden_layers": layers}
    return cls(cls.config_class(**sizes, **options))


def flux2_parts(**options: Any) -> dict[str, Any]:
    sizes = {"block_out_channels": (4, 8), "norm_num_groups": 4, "latent_channels": 4, "sample_size": 16}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = diffusers.AutoencoderKLFlux2(**sizes, **blocks)
    vae.bn.running_mean.copy_(torch.linspace(-0.3, 0.4, 16))
    vae.bn.running_var.copy_(torch.linspace(0.5, 2, 16))
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, timestep_guidance_channels=8, axes_dims_rope=(2, 2, 2, 2), **options,
    )  # fmt: skip
    return {"transformer": transformer, "vae": vae, "scheduler": FLOW(use_dynamic_shifting=True)}


def flux2(folder: Path) -> Any:
    text = {**DECODER, "hidden_size": 4, "head_dim": 4, "num_hidden_layers": 30, "model_type": "mistral"}
    vision = {
        "hidden_size": 4, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 8,
        "patch_size": 4, "model_type": "pixtral",
    }  # fmt: skip
    encoder = transformers.Mistral3ForConditionalGeneration(
        transformers.Mistral3Config(text_config=text, vision_config=vision, image_token_index=2)
    )
    tokenizer = words(chat_template=CHAT)
    return diffusers.Flux2Pipeline(**flux2_parts(), text_encoder=encoder, tokenizer=tokenizer)


def flux2_klein(folder: Path) -> Any:
    encoder = language("Qwen3ForCausalLM", 4, 27)
    parts = flux2_parts(guidance_embeds=False)
    return diffusers.Flux2KleinPipeline(**parts, text_encoder=encoder, tokenizer=words(chat_template=CHAT))


def video_vae(name: str) -> Any:
    return getattr(diffusers, name)(
        base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.5, 1.0, 2.0, 1.5],
    )  # fmt: skip


def qwen_image(folder: Path) -> Any:
    text = {**DECODER, "hidden_size": 12, "num_hidden_layers": 1, "model_type": "qwen2_5_vl_text"}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}
    vision = {"depth": 1, "hidden_size": 4, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": 12}
    encoder = transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    )
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    return diffusers.QwenImagePipeline(
        transformer=transformer,
        vae=video_vae("AutoencoderKLQwenImage"),
        scheduler=FLOW(use_dynamic_shifting=True, max_shift=0.9),
        text_encoder=encoder,
        tokenizer=words(),
    )


def z_image(folder: Path) -> Any:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=16, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=8,
        axes_dims=[2, 2, 4], axes_lens=[64, 64, 64],
    )  # fmt: skip
    return diffusers.ZImagePipeline(
        transformer=transformer,
        vae=vae(),
        scheduler=FLOW(shift=3.0),
        text_encoder=language("Qwen3Model", 8),
        tokenizer=words(chat_template=CHAT),
    )


def lumina2(folder: Path) -> Any:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1, num_attention_heads=2,
        num_kv_heads=1, multiple_of=4, axes_dim_rope=(4, 4, 4), axes_lens=(300, 16, 16), cap_feat_dim=8,
    )  # fmt: skip
    return diffusers.Lumina2Pipeline(
        transformer=transformer,
        vae=vae(block_out_channels=(4, 4, 4, 4), down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4),
        scheduler=FLOW(shift=6.0),
        text_encoder=language("Gemma2Model", 8),
        tokenizer=words(),
    )  # fmt: skip


def pixart(folder: Path) -> Any:
    return diffusers.PixArtAlphaPipeline(
        transformer=diffusion_models.pixart(out_channels=8, sample_size=128),
        vae=vae(shift_factor=None),
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
        text_encoder=t5(),
        tokenizer=words(),
    )


def pixart_sigma(folder: Path) -> Any:
    return diffusers.PixArtSigmaPipeline(
        transformer=diffusion_models.pixart(out_channels=8, use_additional_conditions=False),
        vae=vae(shift_factor=None),
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
        text_encoder=t5(),
        tokenizer=words(),
    )


def sana(folder: Path) -> Any:
    vae = diffusers.AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_out_channels=(4, 4), decoder_block_out_channels=(4, 4),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()), scaling_factor=0.4,
    )  # fmt: skip
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return diffusers.SanaPipeline(
        transformer=diffusion_models.sana(caption_channels=8),
        vae=vae,
        scheduler=scheduler,
        text_encoder=language("Gemma2Model", 8),
        tokenizer=words(),
    )


def wan(folder: Path) -> Any:
    text = {"d_model": TEXT, "d_kv": 6, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": len(WORDS)}
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=12, freq_dim=8,
        ffn_dim=16, num_layers=1,
    )  # fmt: skip
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    vae = video_vae("AutoencoderKLWan")
    vae.register_to_config(scale_factor_spatial=2, scale_factor_temporal=1)
    return diffusers.WanPipeline(
        transformer=transformer,
        vae=vae,
        scheduler=scheduler,
        text_encoder=transformers.UMT5EncoderModel(transformers.UMT5Config(**text)),
        tokenizer=words(),
    )


MAKERS = (sd3, flux, flux2, flux2_klein, qwen_image, z_image, lumina2, pixart, pixart_sigma, sana, wan)
PIPELINES: dict[str, Callable[[Path], Any]] = {make.__name__: make for make in MAKERS}


def saved(name: str, folder: Path) -> Path:
    """A pipeline with fixed weights in a folder, as `from_pretrained` takes it."""
    (folder / "words").mkdir(parents=True)
    torch.manual_seed(0)
    PIPELINES[name](folder / "words").save_pretrained(folder / "model")
    return folder / "model"
