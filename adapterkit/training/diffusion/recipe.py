"""The contract of a recipe: how pipelines of one class are trained. Recipes are plug-ins; the task knows none by name.

Everything is done by the pipeline's own parts: its encoders, its autoencoder, its denoiser, its scheduler's settings.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from adapterkit.errors import ConfigError
from adapterkit.training.diffusion.conditioning import Conditioning
from adapterkit.training.diffusion.objectives.choice import ending_in_noise, is_flow, objective_of, scheduled_shift
from adapterkit.training.diffusion.objectives.objective import Objective
from adapterkit.training.diffusion.options import Options
from adapterkit.training.diffusion.vae import kl_latents
from adapterkit.training.sizes import Size, size_of


class Recipe(ABC):
    """Subclasses override the abstract methods, and what else they need.

    Args:
        pipe: The pipeline.
        options: Of the run.

    Attributes:
        denoiser: The component that takes noise away.
        encoders: The components that read captions; some may be absent.
        tokenizers: The components that cut captions into tokens.
        unused: Components that are neither loaded nor needed.
        paints_holes: Whether examples need a `hole` and its `surroundings`.
        patch: Side of what the denoiser makes one token of, in the latents' pixels.
    """

    denoiser: ClassVar[str] = "transformer"
    encoders: ClassVar[Sequence[str]] = ("text_encoder",)
    tokenizers: ClassVar[Sequence[str]] = ("tokenizer",)
    unused: ClassVar[Sequence[str]] = ("safety_checker", "feature_extractor", "image_encoder")
    paints_holes: ClassVar[bool] = False
    patch: ClassVar[int] = 1

    def __init__(self, pipe: Any, options: Options) -> None:
        self.pipe, self.options = pipe, options
        if options.zero_terminal_snr and not is_flow(pipe.scheduler):
            pipe.scheduler = ending_in_noise(pipe.scheduler)

    @classmethod
    def needed(cls) -> Sequence[str]:
        """The components without which nothing can be trained."""
        return (cls.denoiser, "vae", cls.encoders[0], cls.tokenizers[0], "scheduler")

    @property
    def model(self) -> Any:
        """The denoiser itself."""
        return getattr(self.pipe, self.denoiser)

    def text_parts(self) -> dict[str, nn.Module]:
        """The text encoders that there are, by component."""
        found = {name: self.pipe.components.get(name) for name in self.encoders}
        return {name: part for name, part in found.items() if part is not None}

    def readers(self) -> dict[str, Any]:
        """By text encoder the tokenizer that writes for it."""
        pairs = zip(self.encoders, self.tokenizers, strict=True)
        found = {encoder: self.pipe.components.get(tokenizer) for encoder, tokenizer in pairs}
        return {encoder: tokenizer for encoder, tokenizer in found.items() if tokenizer is not None}

    def token_limits(self) -> list[tuple[Any, int]]:
        """Tokenizers that cut captions, and how many tokens are read."""
        found = [self.pipe.components.get(name) for name in self.tokenizers]
        return [(tokenizer, tokenizer.model_max_length) for tokenizer in found if tokenizer is not None]

    def check(self) -> None:
        """Looks whether this very model can be trained.

        Raises:
            UnsupportedModelError: It cannot.
        """

    def objective(self) -> Objective:
        """What the denoiser learns to predict, as the scheduler's settings and the options say.

        Raises:
            UnsupportedModelError: There is no objective for that scheduler.
            ConfigError: The options do not fit it.
        """
        return objective_of(self.pipe.scheduler, self.options, self.shift)

    def shift(self, tokens: int) -> float:
        """How far flow matching moves times for pictures of so many tokens; by default as the scheduler does."""
        return scheduled_shift(self.pipe.scheduler.config, tokens)

    def tokens(self, latents: Tensor) -> int:
        """How many tokens the denoiser makes of one of these latents."""
        return latents[0, 0].numel() // self.patch**2

    @property
    def multiple(self) -> int:
        """Pixels that the sides of a picture must be a multiple of."""
        return self.factor * self.patch

    @property
    def factor(self) -> int:
        """Pixels of a picture's side to one of its latents'."""
        return self.pipe.vae_scale_factor

    @property
    def longest(self) -> int | None:
        """Pixels of the longest side that the denoiser takes; None where there is no limit."""
        return None

    def size(self) -> Size | None:
        """Height and width in pixels that the model was made for; None where it does not say."""
        told = self.model.config.get("sample_size", getattr(self.pipe, "default_sample_size", None))
        sides = size_of(told)
        return None if sides is None else (sides[0] * self.factor, sides[1] * self.factor)

    @abstractmethod
    def encode_text(self, texts: Sequence[str], device: torch.device) -> Conditioning:
        """The captions as the pipeline itself would encode prompts, without guidance."""

    def encode_pictures(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Means and standard deviations of latents, in float32 on the CPU.

        Args:
            pictures: [n, 3, height, width], 0 to 1.

        Returns:
            Twice [n, channels, ...], scaled as the denoiser sees them.
        """
        return kl_latents(self.pipe.vae, pictures)

    @abstractmethod
    def predict(self, noisy: Tensor, times: Tensor, text: Conditioning, batch: Mapping[str, Any]) -> Tensor:
        """Calls the denoiser.

        Args:
            noisy: [batch, channels, ...], in the denoiser's dtype.
            times: [batch], the objective's.
            text: Of these examples.
            batch: The items, such as `sizes`, [batch, 6]: the original height and width, what was cut off at the top
                and on the left, and the height and width that are left.

        Returns:
            Like `noisy`, in the objective's terms.
        """

    def draw(
        self,
        prompt: str,
        size: Size,
        steps: int,
        guidance: float | None,
        generator: torch.Generator,
        negative: str | None = None,
        kind: str = "pil",
    ) -> Any:
        """One picture, made by the pipeline.

        Args:
            prompt: What it shows.
            size: Height and width in pixels.
            steps: Denoising steps.
            guidance: How strongly the prompt is followed; None for the pipeline's own default.
            generator: Of the noise.
            negative: What it should not show.
            kind: The pipeline's name for what it gives: "pil" for one of Pillow's, "np" for an array of floats.

        Raises:
            ConfigError: The pipeline takes no negative prompt.
        """
        guided = {} if guidance is None else self.guidance_arguments(guidance)
        given = {
            "num_inference_steps": steps,
            "generator": generator,
            "output_type": kind,
            **self.size_arguments(size),
            **guided,
        }
        made = self.pipe(**self.prompt_arguments(prompt, negative), **given)
        return self.picture(made)

    def prompt_arguments(self, prompt: str, negative: str | None) -> dict[str, Any]:
        """What the pipeline is told of a picture's content."""
        if negative is None:
            return {"prompt": prompt}
        if "negative_prompt" not in inspect.signature(type(self.pipe).__call__).parameters:
            told = f"{type(self.pipe).__name__} takes no negative prompt; leave out {negative!r}"
            raise ConfigError([told], "prompts")
        return {"prompt": prompt, "negative_prompt": negative}

    def size_arguments(self, size: Size) -> dict[str, Any]:
        """What the pipeline is told of its size, and of what it begins from."""
        return {"height": size[0], "width": size[1]}

    def guidance_arguments(self, guidance: float) -> dict[str, Any]:
        """How the pipeline is told its guidance."""
        return {"guidance_scale": guidance}

    def picture(self, made: Any) -> Any:
        """The picture in what the pipeline returns."""
        return made.images[0]
