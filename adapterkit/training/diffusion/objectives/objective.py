"""The contract of an objective: from pictures and noise to what a denoiser is given and what it should answer."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class Objective(ABC):
    """One manner of adding noise, and of learning to take it away.

    Latents and noise are [batch, channels, ...] in float32; what is said of each example is [batch].
    """

    @abstractmethod
    def times(self, u: Tensor, tokens: int) -> Tensor:
        """Times of examples, as `noisy`, `target` and the recipe's `predict` take them.

        Args:
            u: Uniform in [0, 1).
            tokens: That the denoiser makes of one picture.
        """

    @abstractmethod
    def noisy(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """What the denoiser sees."""

    @abstractmethod
    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """What the denoiser should predict."""

    @abstractmethod
    def weights(self, times: Tensor) -> Tensor:
        """How much an error at these times counts, [batch]."""
