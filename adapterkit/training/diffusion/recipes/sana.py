"""Sana: Gemma reads the text behind an instruction, and the autoencoder makes one pixel of 32 by 32."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adapterkit.training.diffusion.conditioning import Conditioning, joined
from adapterkit.training.diffusion.recipe import Recipe
from adapterkit.training.diffusion.vae import certain_latents
from adapterkit.training.sizes import Size


class Sana(Recipe):
    """Flow matching with linear attention (Xie et al. 2024, arXiv:2410.10629)."""

    def token_limits(self) -> list[tuple[Any, int]]:
        return [(self.pipe.tokenizer, 300)]

    def encode_text(self, texts: Sequence[str], device: torch.device) -> Conditioning:
        return joined([self._encoded(text, device) for text in texts])

    def _encoded(self, text: str, device: torch.device) -> Conditioning:
        """No caption is the bare "" that guidance steers away from, without the instruction."""
        told = inspect.signature(type(self.pipe).__call__).parameters["complex_human_instruction"].default
        states, mask, _, _ = self.pipe.encode_prompt(
            [text], False, device=device, complex_human_instruction=told if text else None
        )
        return {"states": states, "mask": mask}

    def encode_pictures(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        return certain_latents(self.pipe.vae, pictures)

    def predict(self, noisy: Tensor, times: Tensor, text: Conditioning, batch: Mapping[str, Any]) -> Tensor:
        clock = times * 1000 * self.model.config.timestep_scale
        found = self.model(noisy, text["states"], clock, encoder_attention_mask=text["mask"]).sample
        return found[:, : noisy.shape[1]]

    def size_arguments(self, size: Size) -> dict[str, Any]:
        """That very size, which the pipeline would otherwise bring to one that it knows."""
        return {**super().size_arguments(size), "use_resolution_binning": False}
