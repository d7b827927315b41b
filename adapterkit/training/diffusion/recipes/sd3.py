"""Stable Diffusion 3 and 3.5: two of CLIP's text encoders and T5, which may be absent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from adapterkit.training.diffusion.conditioning import Conditioning
from adapterkit.training.diffusion.recipe import Recipe


class StableDiffusion3(Recipe):
    """Flow matching with a transformer of two streams (Esser et al. 2024, arXiv:2403.03206)."""

    encoders: ClassVar[Sequence[str]] = ("text_encoder", "text_encoder_2", "text_encoder_3")
    tokenizers: ClassVar[Sequence[str]] = ("tokenizer", "tokenizer_2", "tokenizer_3")
    patch: ClassVar[int] = 2

    @property
    def longest(self) -> int | None:
        """As many positions as it has."""
        return self.model.config.pos_embed_max_size * self.multiple

    def token_limits(self) -> list[tuple[Any, int]]:
        """CLIP's 77 only where there is no T5, which reads more."""
        if self.pipe.text_encoder_3 is not None:
            return [(self.pipe.tokenizer_3, 256)]
        return [(self.pipe.tokenizer, self.pipe.tokenizer_max_length)]

    def encode_text(self, texts: Sequence[str], device: torch.device) -> Conditioning:
        given = {"prompt": list(texts), "prompt_2": None, "prompt_3": None, "device": device}
        states, _, pooled, _ = self.pipe.encode_prompt(**given, do_classifier_free_guidance=False)
        return {"states": states, "pooled": pooled}

    def predict(self, noisy: Tensor, times: Tensor, text: Conditioning, batch: Mapping[str, Any]) -> Tensor:
        return self.model(noisy, text["states"], text["pooled"], times * 1000).sample
