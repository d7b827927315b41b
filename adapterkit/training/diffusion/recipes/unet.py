"""Stable Diffusion 1.x, 2.x and XL: a UNet and CLIP's text encoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from adapterkit.errors import UnsupportedModelError
from adapterkit.training.diffusion.conditioning import Conditioning
from adapterkit.training.diffusion.recipe import Recipe
from adapterkit.training.diffusion.recipes.chunks import chunks_of, side_by_side


class StableDiffusion(Recipe):
    """1.x and 2.x."""

    denoiser: ClassVar[str] = "unet"

    def check(self) -> None:
        channels = (self.model.config.in_channels, self.pipe.vae.config.latent_channels)
        if channels[0] != channels[1]:
            raise UnsupportedModelError(
                f"the UNet takes {channels[0]} channels and the VAE makes {channels[1]}: an inpainting or "
                "image-conditioned model, which this recipe does not train"
            )

    def token_limits(self) -> list[tuple[Any, int]]:
        """As many tokens as the chunks hold."""
        more = self.options.caption_chunks - 1
        return [
            (tokenizer, limit + more * (limit - tokenizer.num_special_tokens_to_add()))
            for tokenizer, limit in super().token_limits()
        ]

    def encode_text(self, texts: Sequence[str], device: torch.device) -> Conditioning:
        states, _ = self.pipe.encode_prompt(self.chunked(texts), device, 1, do_classifier_free_guidance=False)
        return {"states": side_by_side(states, self.options.caption_chunks)}

    def chunked(self, texts: Sequence[str]) -> list[str]:
        """The chunks of the texts, one after the other."""
        count = self.options.caption_chunks
        if count == 1:
            return list(texts)
        tokenizer = self.token_limits()[0][0]
        return [chunk for text in texts for chunk in chunks_of(text, tokenizer, count)]

    def predict(self, noisy: Tensor, times: Tensor, text: Conditioning, batch: Mapping[str, Any]) -> Tensor:
        return self.model(self.inputs(noisy, batch), times, text["states"]).sample

    def inputs(self, noisy: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """What the UNet sees, [batch, channels, height, width]."""
        return noisy

    def prompt_arguments(self, prompt: str, negative: str | None) -> dict[str, Any]:
        """As text, or as the embeddings of its chunks."""
        if self.options.caption_chunks == 1:
            return super().prompt_arguments(prompt, negative)
        device = self.pipe._execution_device
        told, against = self.encode_text([prompt], device), self.encode_text([negative or ""], device)
        return {"prompt_embeds": told["states"], "negative_prompt_embeds": against["states"]}


class StableDiffusionXL(StableDiffusion):
    """XL: two text encoders, and the size and place of what was cut out (Podell et al. 2023, arXiv:2307.01952, 2.2)."""

    encoders: ClassVar[Sequence[str]] = ("text_encoder", "text_encoder_2")
    tokenizers: ClassVar[Sequence[str]] = ("tokenizer", "tokenizer_2")

    def encode_text(self, texts: Sequence[str], device: torch.device) -> Conditioning:
        """No caption is all zeros where the pipeline's guidance steers away from those."""
        count = self.options.caption_chunks
        given = {"device": device, "do_classifier_free_guidance": False}
        states, _, pooled, _ = self.pipe.encode_prompt(self.chunked(texts), **given)
        nothing = torch.tensor([not text and self.pipe.config.force_zeros_for_empty_prompt for text in texts])
        nothing = nothing.to(states.device).view(-1, 1)
        states = side_by_side(states, count).masked_fill(nothing[..., None], 0)
        return {"states": states, "pooled": pooled[::count].masked_fill(nothing, 0)}

    def predict(self, noisy: Tensor, times: Tensor, text: Conditioning, batch: Mapping[str, Any]) -> Tensor:
        added = {"text_embeds": text["pooled"], "time_ids": self.time_ids(batch["sizes"]).to(noisy.dtype)}
        return self.model(self.inputs(noisy, batch), times, text["states"], added_cond_kwargs=added).sample

    def time_ids(self, sizes: Tensor) -> Tensor:
        """What the UNet is told of sizes, [batch, numbers]."""
        return sizes

    def prompt_arguments(self, prompt: str, negative: str | None) -> dict[str, Any]:
        """As text, or as the embeddings of its chunks."""
        if self.options.caption_chunks == 1:
            return Recipe.prompt_arguments(self, prompt, negative)
        device = self.pipe._execution_device
        told, against = self.encode_text([prompt], device), self.encode_text([negative or ""], device)
        return {
            "prompt_embeds": told["states"],
            "pooled_prompt_embeds": told["pooled"],
            "negative_prompt_embeds": against["states"],
            "negative_pooled_prompt_embeds": against["pooled"],
        }
