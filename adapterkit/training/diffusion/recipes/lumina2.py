"""Lumina Image 2: Gemma reads the text behind a sentence that says what to do; time runs from noise to picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from adapterkit.training.diffusion.conditioning import Conditioning
from adapterkit.training.diffusion.recipe import Recipe


class Lumina2(Recipe):
    """Flow matching with one stream of text and picture (Qin et al. 2025, arXiv:2503.21758)."""

    patch: ClassVar[int] = 2

    def token_limits(self) -> list[tuple[Any, int]]:
        return [(self.pipe.tokenizer, 256)]

    def encode_text(self, texts: Sequence[str], device: torch.device) -> Conditioning:
        """No caption is the bare "" that guidance steers away from, without the sentence."""
        told = [f"{self.pipe.system_prompt} <Prompt Start> {text}" if text else "" for text in texts]
        states, mask = self.pipe._get_gemma_prompt_embeds(told, device)
        return {"states": states, "mask": mask}

    def predict(self, noisy: Tensor, times: Tensor, text: Conditioning, batch: Mapping[str, Any]) -> Tensor:
        return -self.model(noisy, 1 - times, text["states"], text["mask"]).sample
