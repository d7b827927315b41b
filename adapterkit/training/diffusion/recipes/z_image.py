"""Z-Image: one stream of text and picture, where time runs from noise to picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from adapterkit.training.diffusion.conditioning import Conditioning, joined
from adapterkit.training.diffusion.recipe import Recipe
from adapterkit.training.sizes import Size


class ZImage(Recipe):
    """The base and turbo; of captions only the tokens that they have are seen."""

    patch: ClassVar[int] = 2

    def size(self) -> Size:
        """The pipeline's default."""
        return 1024, 1024

    def token_limits(self) -> list[tuple[Any, int]]:
        return [(self.pipe.tokenizer, 512)]

    def encode_text(self, texts: Sequence[str], device: torch.device) -> Conditioning:
        found, _ = self.pipe.encode_prompt(list(texts), device, do_classifier_free_guidance=False)
        return joined([{"states": one[None], "mask": one.new_ones(1, len(one), dtype=torch.bool)} for one in found])

    def predict(self, noisy: Tensor, times: Tensor, text: Conditioning, batch: Mapping[str, Any]) -> Tensor:
        captions = [states[mask] for states, mask in zip(text["states"], text["mask"], strict=True)]
        found = self.model(list(noisy[:, :, None].unbind(0)), 1 - times, captions, return_dict=False)[0]
        return -torch.stack(found)[:, :, 0]
