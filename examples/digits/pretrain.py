"""Pretrains the embedded pipeline from nothing: the autoencoder, then the text encoder, then the UNet.

    python -m examples.digits.pretrain --out examples/digits/base

Every step draws its batch from a generator seeded by the run's seed, the stage and the step, so a run that is stopped
and started again goes on from its last checkpoint exactly as if it had not stopped. What is saved are the moving
averages of the weights, in half precision.
"""

from __future__ import annotations

import argparse
import copy
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from examples.digits import data, models

Loss = Callable[[torch.Generator], Tensor]
POOL = 12_288


@dataclass(frozen=True)
class Plan:
    """How one stage is trained.

    Attributes:
        steps: Optimiser steps in all.
        batch: Pictures a step.
        rate: Highest learning rate; it falls along a cosine that would end at `horizon`.
        horizon: Length of the cosine in steps; apart from `steps`, so that a run can be ended sooner or later.
        warmup: Steps of the rise at the beginning.
        cooldown: Steps at the end in which the rate falls to zero along a line.
        decay: Decay of the moving average of the weights.
        save_every: Steps between checkpoints.
        log_every: Steps between printed lines.
    """

    steps: int
    batch: int
    rate: float
    horizon: int
    warmup: int = 100
    cooldown: int = 250
    decay: float = 0.998
    save_every: int = 250
    log_every: int = 50

    def rate_at(self, step: int) -> float:
        """Learning rate of step `step`, counted from 0."""
        ends = min(1.0, (step + 1) / self.warmup, (self.steps - step) / self.cooldown)
        return self.rate * ends * 0.5 * (1 + math.cos(math.pi * step / self.horizon))


class Stage:
    """Trains `model` by `plan` and keeps a moving average of it; goes on from its checkpoint where there is one."""

    def __init__(self, name: str, model: nn.Module, plan: Plan, folder: Path, seed: int) -> None:
        self.name, self.plan, self.seed = name, plan, seed
        self.model = model.to(memory_format=torch.channels_last)  # convolutions on a CPU are twice as fast this way
        self.average = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=plan.rate, betas=(0.9, 0.99))
        self.file = folder / f"{name}.pt"
        self.step = 0
        if self.file.exists():
            self._restore()

    def run(self, loss: Loss) -> None:
        """Takes the steps that are left; `loss` gets the generator of the step."""
        started, total = time.perf_counter(), 0.0
        while self.step < self.plan.steps:
            total += self._take_step(loss)
            if self.step % self.plan.log_every == 0:
                pace = (time.perf_counter() - started) / self.plan.log_every
                print(f"{self.name} {self.step}/{self.plan.steps} loss {total / self.plan.log_every:.4f} "
                      f"{pace:.3f} s/step", flush=True)  # fmt: skip
                started, total = time.perf_counter(), 0.0
            if self.step % self.plan.save_every == 0 or self.step == self.plan.steps:
                self._save()

    def _take_step(self, loss: Loss) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.rate_at(self.step)
        value = loss(step_generator(self.seed, self.name, self.step))
        self.optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        self._follow()
        return float(value.detach())

    @torch.no_grad()
    def _follow(self) -> None:
        decay = min(self.plan.decay, self.step / (self.step + 10))
        for slow, fast in zip(self.average.parameters(), self.model.parameters(), strict=True):
            slow.lerp_(fast, 1 - decay)

    def _save(self) -> None:
        parts = {name: getattr(self, name).state_dict() for name in ("model", "average", "optimizer")}
        temporary = self.file.with_suffix(".tmp")
        torch.save(parts | {"step": self.step}, temporary)
        temporary.replace(self.file)

    def _restore(self) -> None:
        saved = torch.load(self.file, weights_only=True)
        for name in ("model", "average", "optimizer"):
            getattr(self, name).load_state_dict(saved[name])
        self.step = saved["step"]
        print(f"{self.name}: going on from step {self.step}", flush=True)


def step_generator(seed: int, stage: str, step: int) -> torch.Generator:
    """The generator from which a step of a stage draws everything."""
    offset = {"vae": 1, "unet": 2, "text": 3}[stage] * 10_000_000
    return torch.Generator().manual_seed(seed * 100_000_000 + offset + step)


def signed(pictures: Tensor) -> Tensor:
    """Pictures in [0, 1] as the autoencoder wants them: in [-1, 1]."""
    return (2 * pictures - 1).contiguous(memory_format=torch.channels_last)


def vae_loss(vae: AutoencoderKL, digits: data.Digits, batch: int) -> Loss:
    """Squared error of the reconstruction plus 0.0001 times the divergence from N(0, 1) per latent number.

    Absolute error learns colours far more slowly: it still draws white as yellow when squared error is long done.
    """

    def loss(generator: torch.Generator) -> Tensor:
        pictures = signed(data.varied_batch(digits, batch, generator))
        latents = vae.encode(pictures).latent_dist
        error = F.mse_loss(vae.decode(latents.sample(generator)).sample, pictures)
        return error + 1e-4 * latents.kl().mean() / latents.mean[0].numel()

    return loss


@torch.no_grad()
def centre(vae: AutoencoderKL, digits: data.Digits, seed: int) -> None:
    """Gives the latents mean 0 and standard deviation 1 over plain and varied pictures together."""
    generator = torch.Generator().manual_seed(seed)
    plain, _ = data.plain_batch(digits, 512, generator)
    pictures = signed(torch.cat([plain, data.varied_batch(digits, 512, generator)]))
    latents = vae.encode(pictures).latent_dist.sample(generator)
    models.standardise_latents(vae, latents.mean((0, 2, 3)), latents.std((0, 2, 3)))


def text_loss(parts: nn.ModuleDict, tokenizer: CLIPTokenizer, batch: int) -> Loss:
    """Cross entropy of the digit and of the look, as a linear head reads them off every state from the end token on.

    This stands in for CLIP's contrastive pretraining. Trained along with the UNet instead, the text encoder taught it
    the looks, but after 750 steps it still drew any digit for any word.
    """

    def loss(generator: torch.Generator) -> Tensor:
        captions, digits, looks = data.caption_batch(batch, generator)
        tokens = models.tokenize(tokenizer, captions)
        scores = parts["head"](parts["text_encoder"](tokens).last_hidden_state)
        row, place = torch.nonzero(tokens == tokenizer.eos_token_id, as_tuple=True)
        digit_scores, look_scores = scores[row, place].split([11, len(data.LOOKS) + 1], dim=1)
        return F.cross_entropy(digit_scores, digits[row]) + F.cross_entropy(look_scores, looks[row])

    return loss


@dataclass(frozen=True)
class Pool:
    """Latents of n pictures as `mean` and `std` [n, 4, 8, 8], and states `text` [n, length, width] of captions."""

    mean: Tensor
    std: Tensor
    text: Tensor

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Latents [count, 4, 8, 8] drawn from the encoder's posterior, and their text."""
        index = torch.randint(len(self.mean), (count,), generator=generator)
        noise = torch.randn(count, *self.mean.shape[1:], generator=generator)
        return self.mean[index] + self.std[index] * noise, self.text[index]


@torch.no_grad()
def encode_pool(
    vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, digits: data.Digits, seed: int
) -> Pool:
    """Draws and encodes `POOL` plain pictures once, since encoding each batch anew would cost a fifth of the time."""
    generator = torch.Generator().manual_seed(seed)
    mean, std, text = [], [], []
    for _ in range(POOL // 64):
        pictures, captions = data.plain_batch(digits, 64, generator)
        latents = vae.encode(signed(pictures)).latent_dist
        mean.append(latents.mean)
        std.append(latents.std)
        text.append(text_encoder(models.tokenize(tokenizer, captions)).last_hidden_state)
    return Pool(torch.cat(mean), torch.cat(std), torch.cat(text))


def unet_loss(unet: UNet2DConditionModel, scheduler: DDIMScheduler, pool: Pool, batch: int) -> Loss:
    """Mean squared error of the predicted noise (Ho et al. 2020, equation 14) in the plain looks."""

    def loss(generator: torch.Generator) -> Tensor:
        latents, text = pool.sample(batch, generator)
        noise = torch.randn(latents.shape, generator=generator)
        times = torch.randint(scheduler.config["num_train_timesteps"], (batch,), generator=generator)
        noisy = scheduler.add_noise(latents, noise, times)
        return F.mse_loss(unet(noisy, times, text).sample, noise)

    return loss


def pretrain(work_dir: Path, out: Path, seed: int, plans: dict[str, Plan]) -> None:
    """Runs the three stages and saves the pipeline in half precision.

    Args:
        work_dir: Folder of the checkpoints; made where it is missing.
        out: Folder of the pipeline.
        seed: Seed of initial weights and of every step.
        plans: The plan of each stage: `vae`, `text` and `unet`.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    digits = data.base_digits()
    tokenizer, scheduler = models.build_tokenizer(data.caption_words()), models.build_scheduler()
    autoencoder = Stage("vae", models.build_vae(), plans["vae"], work_dir, seed)
    autoencoder.run(vae_loss(autoencoder.model, digits, plans["vae"].batch))
    vae = autoencoder.average
    centre(vae, digits, seed)

    parts = nn.ModuleDict({"text_encoder": models.build_text_encoder(tokenizer), "head": models.build_text_head()})
    reader = Stage("text", parts, plans["text"], work_dir, seed)
    reader.run(text_loss(parts, tokenizer, plans["text"].batch))
    text_encoder = reader.average["text_encoder"]

    denoiser = Stage("unet", models.build_unet(), plans["unet"], work_dir, seed)
    pool = encode_pool(vae, text_encoder, tokenizer, digits, seed)
    denoiser.run(unet_loss(denoiser.model, scheduler, pool, plans["unet"].batch))
    networks = {"vae": vae, "text_encoder": text_encoder, "unet": denoiser.average}
    save(out, {"tokenizer": tokenizer, "scheduler": scheduler, **networks})
    print(f"saved {out}", flush=True)


def save(out: Path, parts: dict[str, Any]) -> None:
    """Writes the pipeline in half precision, with the tokenizer's files for older versions of transformers too."""
    for name in ("vae", "text_encoder", "unet"):
        parts[name].to(memory_format=torch.contiguous_format, dtype=torch.float16)
    backend = parts["tokenizer"].backend_tokenizer
    backend.no_padding()  # else the padding of the last batch would be saved as the tokenizer's own
    backend.no_truncation()
    models.build_pipeline(parts).save_pretrained(out, safe_serialization=True)
    backend.model.save(str(out / "tokenizer"))


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Pretrain the embedded digits pipeline.")
    parser.add_argument("--work-dir", type=Path, default=Path(tempfile.gettempdir()) / "digits-pretraining")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "base")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--vae-steps", type=int, default=1000)
    parser.add_argument("--text-steps", type=int, default=400)
    parser.add_argument("--unet-steps", type=int, default=2000)
    args = parser.parse_args()
    plans = {
        "vae": Plan(args.vae_steps, batch=64, rate=2e-3, horizon=2500),
        "text": Plan(args.text_steps, batch=64, rate=2e-3, horizon=1000, cooldown=100, decay=0.98),
        "unet": Plan(args.unet_steps, batch=32, rate=1e-3, horizon=8000, cooldown=500),
    }
    pretrain(args.work_dir, args.out, args.seed, plans)


if __name__ == "__main__":
    main()
