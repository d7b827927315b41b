"""The keys of the task `diffusion`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from adapterkit.training.config import Section, Seed
from adapterkit.training.diffusion.pipeline_options import PlaceOptions, StartOptions, TextOptions, ValidationOptions
from adapterkit.training.pictures.options import PictureOptions
from adapterkit.training.samples.prompts import Prompts


def _rising(value: tuple[float, float]) -> tuple[float, float]:
    if not 0 <= value[0] < value[1] <= 1:
        raise ValueError("must be two numbers from 0 to 1, the smaller one first")
    return value


Range = Annotated[tuple[float, float], Field(strict=False), AfterValidator(_rising)]


class ObjectiveOptions(Section):
    """What the denoiser learns.

    Attributes:
        time_sampling: How often which amount of noise is drawn: by default `logit_normal` for flow matching, else
            `uniform`.
        logit_mean: Of `logit_normal`; above 0 draws more noise.
        logit_std: Of `logit_normal`.
        mode_scale: How much `mode` prefers the middle.
        time_shift: How far flow matching moves times towards the noise; by default as the pipeline's scheduler does for
            a picture of this size. 1 leaves them.
        time_range: The part of all times that is trained, from 0, no noise, to 1.
        guidance_embedding: What a model that was distilled from guidance, such as Flux dev, is told while it trains.
        loss: The squared error, or one that outliers pull less.
        huber_delta: Where `huber` turns from a square to a line.
        loss_weighting: What times count more: for schedules of noise `min_snr`, `debiased`; for flow matching
            `cosmap`, `sigma_sqrt`.
        min_snr_gamma: The bound of `min_snr`.
        noise_offset: How strong a noise that is the same all over the picture is added, such as 0.05: darker darks.
        input_perturbation: How much noise the denoiser sees beside the noise that it should predict, such as 0.1.
        teacher: Whether prior pictures should be taken for what the base takes them for, whatever they show.
        preserve_weight: Weight of an error beside that of the pictures: how much what the model says of them under
            another caption differs from what the base says. Needs no pictures of what is to be kept.
        preserve_caption: That caption, such as what the thing is without its trigger: `a dog`.
        zero_terminal_snr: Let the schedule end in noise alone; for models that predict velocities.
    """

    time_sampling: Literal["uniform", "logit_normal", "mode"] | None = None
    logit_mean: float = 0.0
    logit_std: float = Field(1.0, gt=0)
    mode_scale: float = Field(1.29, ge=-1, le=1.75)
    time_shift: float | None = Field(None, gt=0)
    time_range: Range = (0.0, 1.0)
    guidance_embedding: float = Field(1.0, ge=0)
    loss: Literal["mse", "huber"] = "mse"
    huber_delta: float = Field(0.1, gt=0)
    loss_weighting: Literal["none", "min_snr", "debiased", "cosmap", "sigma_sqrt"] = "none"
    min_snr_gamma: float = Field(5.0, gt=0)
    noise_offset: float = Field(0.0, ge=0)
    input_perturbation: float = Field(0.0, ge=0)
    zero_terminal_snr: bool = False
    teacher: bool = False
    preserve_weight: float = Field(0.0, ge=0)
    preserve_caption: str = ""


class SampleOptions(Section):
    """How samples are drawn.

    Attributes:
        prompts: What samples are made from, a list, or a file that holds one (.txt, .jsonl, .yaml), each a text or with
            settings of its own (`{prompt, seed, negative, size, steps, guidance, weight}`); by default the first four
            captions.
        sample_seeds: The seeds of those samples: one image for each prompt and seed.
        sample_steps: Denoising steps of a sample.
        guidance_scale: Guidance of a sample; by default the pipeline's own.
    """

    prompts: Prompts = Field([])
    sample_seeds: list[Seed] = Field([42], min_length=1)
    sample_steps: int = Field(25, gt=0)
    guidance_scale: float | None = Field(None, ge=0)


class Options(
    ObjectiveOptions, PictureOptions, TextOptions, ValidationOptions, SampleOptions, StartOptions, PlaceOptions
):
    """The keys under `options`."""
