"""The task `diffusion`: a style or a subject, learnt from a folder of captioned images."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from adapterkit.errors import ConfigError, UnsupportedModelError
from adapterkit.training.config import Section, Seed
from adapterkit.training.data import Captioned, captioned_images, cover, examine, open_image
from adapterkit.training.data_files import Notes, content_key, gather, listed, name_of
from adapterkit.training.data_record import DataRecord
from adapterkit.training.denoising import BATCH, Conditioning, encode, latents_of, target_of, text_parts
from adapterkit.training.grid import write_grid
from adapterkit.training.loading import checkpoint_activations, dtype_of, load_pipeline
from adapterkit.training.order import Draw
from adapterkit.training.sizes import Resolution, size_of
from adapterkit.training.task import Setting, Task, sample_name

_KEPT = 1024  # captions whose embeddings are in memory: of a long text up to a megabyte each


class Options(Section):
    """The keys under `options`.

    Attributes:
        resolution: Side of the square that images are cut to, or `[height, width]`, in pixels; by default what the UNet
            was made for.
        flip: Mirror half of the images.
        caption: For images that have no text file.
        caption_dropout: Share of the steps' captions that are emptied, so that guidance keeps working.
        prompts: What samples are made from; by default the first four captions.
        sample_seeds: The seeds of those samples: one image for each prompt and seed.
        sample_steps: Denoising steps of a sample.
        guidance_scale: Guidance of a sample.
    """

    resolution: Resolution = None
    flip: bool = False
    caption: str | None = None
    caption_dropout: float = Field(0.1, ge=0, le=1)
    prompts: list[str] = Field([])
    sample_seeds: list[Seed] = Field([42], min_length=1)
    sample_steps: int = Field(25, gt=0)
    guidance_scale: float = Field(7.5, ge=0)


class Images:
    """Latents of every image, mirrored too where that is asked for, with the seed that decides the rest of an example.

    Args:
        means, spreads: Of the latents' distributions, [images, 1 or 2, channels, height, width].
        times: Length of the noise schedule.
        dropout: Probability of an empty caption.
    """

    def __init__(self, means: Tensor, spreads: Tensor, times: int, dropout: float) -> None:
        self.means, self.spreads, self.times, self.dropout = means, spreads, times, dropout

    def __len__(self) -> int:
        return len(self.means)

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        """Latents, their noise, the place in the noise schedule, and the caption's number, -1 for none."""
        generator = draw.generator()
        variant = int(torch.randint(self.means.shape[1], (), generator=generator))
        mean, spread = self.means[draw.index, variant], self.spreads[draw.index, variant]
        latents = mean + spread * torch.randn(mean.shape, generator=generator)
        dropped = float(torch.rand((), generator=generator)) < self.dropout
        return {
            "latents": latents,
            "noise": torch.randn(mean.shape, generator=generator),
            "time": torch.randint(self.times, (), generator=generator),
            "caption": -1 if dropped else draw.index,
        }


class DiffusionTask(Task):
    """Noise or velocity prediction on a Stable Diffusion pipeline (1.x, 2.x, XL)."""

    Options = Options
    suffixes = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
    options: Options

    def survey(self, before: DataRecord | None) -> DataRecord:
        """Finds the images and their captions, and decodes every image once."""
        folder = Path(self.config.data)
        notes = Notes(folder)
        images = captioned_images(folder, self.options.caption, notes)
        keys = gather([image.path for image in images], lambda path: examine(path, notes))
        files = {name_of(image.path, folder): key for image, key in zip(images, keys, strict=True)}
        sources = {image.source for image in images if image.source is not None}
        files |= {name_of(path, folder): content_key(path) for path in sorted(sources)}
        return DataRecord(files, notes=notes.sentences())

    def load_model(self) -> Any:
        """The pipeline, in evaluation mode."""
        self.pipe = load_pipeline(self.config.model, self.config.dtype)
        self.pipe.set_progress_bar_config(disable=True)
        return self.pipe

    def prepare(self, setting: Setting) -> Images:
        """Computes the latents; the captions' embeddings are kept where the adapter leaves them alone."""
        self._set_up(setting.device)
        images = captioned_images(Path(self.config.data), self.options.caption)
        self.captions = [image.caption for image in images]
        self._check_prediction()
        self._tell_what_is_cut(images, setting.tell)
        means, spreads = self._latents([image.path for image in images])
        self.live = bool(setting.components & text_parts(self.pipe))
        self.cache = None if self.live else functools.lru_cache(_KEPT)(self._embedding)
        return Images(means, spreads, self.scheduler.config.num_train_timesteps, self.options.caption_dropout)

    def prepare_generation(self, model: Any, device: torch.device) -> None:
        """Only the size of the images is needed."""
        self._set_up(device)
        self.captions = []

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Mean squared error of the predicted noise or velocity, in float32."""
        latents, noise, times = batch["latents"], batch["noise"], batch["time"]
        noisy = self.scheduler.add_noise(latents, noise, times)
        conditioning = self._conditioning(batch["caption"].tolist())
        prediction = self.pipe.unet(noisy.to(self.dtype), times, **conditioning.arguments(self.size)).sample
        return F.mse_loss(prediction.float(), target_of(self.scheduler, latents, noise, times).float())

    def checkpoint_activations(self) -> None:
        """On the UNet and, for adapters that act there, the text encoders."""
        self.pipe.unet.enable_gradient_checkpointing()
        for name in text_parts(self.pipe):
            checkpoint_activations(getattr(self.pipe, name))

    def prompts(self) -> Sequence[str]:
        """Those of the options, or the first four different captions."""
        return self.options.prompts or list(dict.fromkeys(self.captions))[:4]

    def seeds(self) -> Sequence[int]:
        """Those of the options."""
        return self.options.sample_seeds

    def generate(self, prompt: str, seed: int, path: Path) -> None:
        """One image, from noise that depends on the seed alone."""
        image = self.pipe(
            prompt,
            height=self.size[0],
            width=self.size[1],
            num_inference_steps=self.options.sample_steps,
            guidance_scale=self.options.guidance_scale,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]
        image.save(path)

    def finish(self, samples: Path) -> Mapping[str, Any]:
        """`grid.png`: the base beside the adapter."""
        rows = []
        for number, prompt in enumerate(self.prompts()):
            for seed in self.seeds():
                files = [samples / sample_name(s, number, seed, self.suffixes[0]) for s in (0, self.config.steps)]
                rows.append((f"{prompt} (seed {seed})", files))
        columns = ("base", f"adapter, step {self.config.steps}")
        return {"grid": str(write_grid(samples / "grid.png", columns, rows))}

    # -- set-up -----------------------------------------------------------------------------------------------------

    def _set_up(self, device: torch.device) -> None:
        diffusers: Any = importlib.import_module("diffusers")
        self.device, self.dtype = device, dtype_of(self.config.dtype)
        self.scheduler: Any = diffusers.DDPMScheduler.from_config(self.pipe.scheduler.config)
        factor = self.pipe.vae_scale_factor
        told, latents = self.options.resolution, size_of(self.pipe.unet.config.sample_size)
        if told is None and latents is None:
            raise ConfigError(["options.resolution: give one, for the UNet does not say what it was made for"], "run")
        height, width = size_of(told) or tuple(side * factor for side in latents or ())
        if height % factor or width % factor:
            raise ConfigError([f"options.resolution: must be a multiple of {factor}, not {told}"], "run")
        self.size = height, width

    def _check_prediction(self) -> None:
        kind = self.scheduler.config.prediction_type
        if kind not in ("epsilon", "v_prediction", "sample"):
            raise UnsupportedModelError(
                f"the pipeline's scheduler predicts {kind!r}; this task trains 'epsilon', 'v_prediction' and 'sample'"
            )
        channels = (self.pipe.unet.config.in_channels, self.pipe.vae.config.latent_channels)
        if channels[0] != channels[1]:
            raise UnsupportedModelError(
                f"the UNet takes {channels[0]} channels and the VAE makes {channels[1]}: an inpainting or "
                "image-conditioned pipeline, which this task does not train"
            )

    def _tell_what_is_cut(self, images: Sequence[Captioned], tell: Callable[[str], object]) -> None:
        """Text encoders read so many tokens of a caption, and no more."""
        tokenizers: list[Any] = [self.pipe.components.get(name) for name in ("tokenizer", "tokenizer_2")]
        for tokenizer in (one for one in tokenizers if one is not None):
            limit = tokenizer.model_max_length
            long = [
                f"{image.path.name}, {count} tokens"
                for image in images
                if (count := len(tokenizer(image.caption, verbose=False)["input_ids"])) > limit
            ]
            if long:
                tell(f"data: captions cut to the {limit} tokens that the text encoder reads: {listed(long)}")
                return

    def _latents(self, paths: Sequence[Path]) -> tuple[Tensor, Tensor]:
        """Means and deviations of all images, of which only a few are in memory at a time."""
        parts = [self._encoded(paths[start : start + BATCH]) for start in range(0, len(paths), BATCH)]
        means, spreads = (torch.cat(halves) for halves in zip(*parts, strict=True))
        return means, spreads

    def _encoded(self, paths: Sequence[Path]) -> tuple[Tensor, Tensor]:
        pictures = torch.stack([cover(open_image(path), self.size[1], self.size[0]) for path in paths])
        variants = [pictures, pictures.flip(-1)] if self.options.flip else [pictures]
        encoded = [latents_of(self.pipe.vae, variant, self.device) for variant in variants]
        means, spreads = (torch.stack(parts, dim=1) for parts in zip(*encoded, strict=True))
        return means, spreads

    def _embedding(self, text: str) -> Conditioning:
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return encode(self.pipe, [text], self.device)

    def _conditioning(self, numbers: Sequence[int]) -> Conditioning:
        texts = ["" if number < 0 else self.captions[number] for number in numbers]
        if self.cache is None:
            return encode(self.pipe, texts, self.device)
        return Conditioning.joined([self.cache(text) for text in texts])
