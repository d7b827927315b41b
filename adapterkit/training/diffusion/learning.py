"""From a batch to a loss: what the denoiser sees, what it should answer, and how far it is off."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adapterkit.handle.adapters import Adapters
from adapterkit.training.diffusion.conditioning import Conditioning
from adapterkit.training.diffusion.losses import per_example, squared
from adapterkit.training.diffusion.options import ObjectiveOptions
from adapterkit.training.diffusion.recipe import Recipe

Batch = Mapping[str, Any]
"""`latents` and `noise` [batch, channels, ...]; `u` [batch], uniform in [0, 1), which the objective makes a time of;
`caption`, strings, "" for none; `sizes` [batch, 6], see `Recipe.predict`; `weight` [batch] of each error; `prior`
[batch], whether it shows what is not to be lost; `mask` [batch, 1, height, width], where parts count less."""


class Learning:
    """What a denoiser learns.

    Args:
        recipe: How it is called.
        options: What it learns.
        dtype: Of its inputs.
        texts: Captions to what it is told about them.

    Raises:
        ConfigError, UnsupportedModelError: There is no objective for this model and these options.
    """

    def __init__(
        self,
        recipe: Recipe,
        options: ObjectiveOptions,
        dtype: torch.dtype,
        texts: Callable[[Sequence[str]], Conditioning],
    ) -> None:
        self.recipe, self.options, self.dtype, self.texts = recipe, options, dtype, texts
        self.objective = recipe.objective()

    def loss(self, batch: Batch) -> Tensor:
        """The weighted mean error of a batch, in float32."""
        latents, noise = batch["latents"], self._offset(batch["noise"])
        times = self.objective.times(batch["u"], self.recipe.tokens(latents))
        noisy = self.objective.noisy(latents, self._perturbed(noise), times)
        target = self.objective.target(latents, noise, times).float()
        if self.options.teacher and batch["prior"].any():
            target = self._taught(noisy, times, batch, target)
        delta = self.options.huber_delta if self.options.loss == "huber" else None
        error = squared(self._predicted(noisy, times, batch["caption"], batch), target, delta)
        weights = self.objective.weights(times)
        loss = (weights * batch["weight"].float() * per_example(error, self._mask(batch))).mean()
        if self.options.preserve_weight:
            kept = squared(*self._kept(noisy, times, batch), delta)
            loss = loss + self.options.preserve_weight * (weights * per_example(kept)).mean()
        return loss

    def error(self, batch: Batch) -> Tensor:
        """The mean squared error of each example, [batch], without what makes training easier: offsets, weights."""
        latents, noise = batch["latents"], batch["noise"]
        times = self.objective.times(batch["u"], self.recipe.tokens(latents))
        predicted = self._predicted(self.objective.noisy(latents, noise, times), times, batch["caption"], batch)
        return per_example(squared(predicted, self.objective.target(latents, noise, times)), self._mask(batch))

    def _mask(self, batch: Batch) -> Tensor | None:
        """What counts; for a model that paints holes masks say where those are, and all counts."""
        return None if self.recipe.paints_holes else batch.get("mask")

    def _predicted(self, noisy: Tensor, times: Tensor, captions: Sequence[str], batch: Batch) -> Tensor:
        return self.recipe.predict(noisy.to(self.dtype), times, self.texts(captions), batch).float()

    @functools.cached_property
    def _adapters(self) -> Adapters:
        return Adapters(self.recipe.pipe)

    @torch.no_grad()
    def _by_base(self, noisy: Tensor, times: Tensor, captions: Sequence[str], batch: Batch) -> Tensor:
        with self._adapters.disabled():
            return self._predicted(noisy, times, captions, batch)

    def _taught(self, noisy: Tensor, times: Tensor, batch: Batch, target: Tensor) -> Tensor:
        """The targets with what the base says for those of the examples that show what is not to be lost."""
        chosen = batch["prior"].nonzero()[:, 0]
        captions = [batch["caption"][row] for row in chosen.tolist()]
        part = {key: value[chosen] for key, value in batch.items() if isinstance(value, Tensor)}
        return target.index_copy(0, chosen, self._by_base(noisy[chosen], times[chosen], captions, part))

    def _kept(self, noisy: Tensor, times: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """What is said, and what the base says, of the same pictures under the caption that is to stay as it was."""
        captions = [self.options.preserve_caption] * len(noisy)
        by_base = self._by_base(noisy, times, captions, batch)
        return self._predicted(noisy, times, captions, batch), by_base

    def _offset(self, noise: Tensor) -> Tensor:
        """With a part that is the same all over the picture, of each channel its own."""
        if not self.options.noise_offset:
            return noise
        ones = noise.shape[:2] + (1,) * (noise.ndim - 2)
        return noise + self.options.noise_offset * torch.randn(ones, device=noise.device)

    def _perturbed(self, noise: Tensor) -> Tensor:
        """With more noise than should be predicted (Ning et al. 2023, arXiv:2301.11706, algorithm 1)."""
        if not self.options.input_perturbation:
            return noise
        return noise + self.options.input_perturbation * torch.randn_like(noise)
