"""PixArt-alpha and PixArt-Sigma: T5 reads the text, and a transformer predicts noise, and its variance beside it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from adapterkit.training.diffusion.conditioning import Conditioning
from adapterkit.training.diffusion.recipe import Recipe
from adapterkit.training.sizes import Size


class PixArt(Recipe):
    """Alpha (Chen et al. 2023, arXiv:2310.00426), which at 1024 pixels knows the picture's size and ratio."""

    patch: ClassVar[int] = 2
    _limit: ClassVar[int] = 120

    def token_limits(self) -> list[tuple[Any, int]]:
        return [(self.pipe.tokenizer, self._limit)]

    def encode_text(self, texts: Sequence[str], device: torch.device) -> Conditioning:
        """Cleaned, as when the pipeline is called, where there is what it cleans with."""
        utils: Any = importlib.import_module("diffusers.utils")
        clean = utils.is_bs4_available() and utils.is_ftfy_available()
        given = {"do_classifier_free_guidance": False, "device": device, "clean_caption": clean}
        states, mask, _, _ = self.pipe.encode_prompt(list(texts), **given)
        return {"states": states, "mask": mask}

    def predict(self, noisy: Tensor, times: Tensor, text: Conditioning, batch: Mapping[str, Any]) -> Tensor:
        added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.model.use_additional_conditions:
            size = batch["sizes"][:, 4:].to(noisy.dtype)
            added = {"resolution": size, "aspect_ratio": size[:, :1] / size[:, 1:]}
        found = self.model(noisy, text["states"], times, added, encoder_attention_mask=text["mask"]).sample
        return found[:, : noisy.shape[1]]

    def size_arguments(self, size: Size) -> dict[str, Any]:
        """That very size, which the pipeline would otherwise bring to one that it knows."""
        return {**super().size_arguments(size), "use_resolution_binning": False}


class PixArtSigma(PixArt):
    """Sigma reads longer captions (Chen et al. 2024, arXiv:2403.04692)."""

    _limit: ClassVar[int] = 300
