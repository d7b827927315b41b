"""A style end to end: `adapterkit train` beside the plain loop of diffusers' scripts, with PEFT or LyCORIS in it.

    python -m tests.benchmarks.style [--steps 400] [--output results.json] [SIDE ...]

Every side is a process of its own, one after the other, on the shipped pipeline and pictures: rank 16 on the same
layers, the same batch, optimizer, rate and schedule. The plain loop does what those scripts do: each step reads
pictures, encodes them and their captions, adds noise, predicts it, clips and steps; `cached` encodes once before.
Parity first: all sides train equally many numbers, and begin from the same loss within its noise.
What is compared: the median step, the highest memory of the process, and how far the style is from the set's after
the same steps. `lycoris` takes part where it can be imported (pip install lycoris_lora).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

import adapterkit as ak
from examples.digits.classifier import read_digits
from examples.digits.data import WORDS
from examples.digits.models import load_pipeline
from examples.digits.style_distance import read_folder, style_distance

DIGITS = Path(__file__).parents[2] / "examples" / "digits"
CONFIG = DIGITS.parent / "configs" / "digits-style.yaml"
TARGETS = "{attn,cross,proj,res}.*@component=unet {mlp.down,fused.mlp,embed.patch,head}@component=unet"
RANK, BATCH, RATE, WARM_UP = 16, 16, 2e-3, 20
PER_DIGIT, SAMPLE_STEPS, GUIDANCE = 6, 20, 4.0
Losses = tuple[list[float], list[float]]
"""Seconds and loss of every step."""
SIDES = ("adapterkit", "plain", "plain cached", "lycoris")


def ours(steps: int, folder: Path) -> dict[str, Any]:
    """The command that the README shows, without samples on the way."""
    from adapterkit.training.loop import train
    from adapterkit.training.run import load_run

    overrides = [
        f"steps={steps}",
        f"adapter.targets={TARGETS!r}",
        f"output={folder / 'run'}",
        "checkpoint_every=null",
        "sample_every=null",
    ]
    train(load_run(CONFIG, overrides), silent=True, overwrite=True)
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    rows = [record for record in records if "seconds" in record]
    pipe = load_pipeline(DIGITS / "base")
    adapters = ak.Adapters(pipe)
    loaded = adapters.load(folder / "run" / "adapter.safetensors", "style")
    adapters.activate("style")
    return measured(pipe, [row["seconds"] for row in rows], [row["loss"] for row in rows], loaded.parameters)


def plain(steps: int, folder: Path, *, cached: bool = False) -> dict[str, Any]:
    """`add_adapter` of diffusers, which is PEFT's LoRA."""
    from peft import LoraConfig

    pipe = load_pipeline(DIGITS / "base")
    pipe.unet.requires_grad_(False)
    pipe.unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=layers(pipe)))
    parameters = [p for p in pipe.unet.parameters() if p.requires_grad]
    seconds, losses = loop(pipe, parameters, steps, cached=cached)
    return measured(pipe, seconds, losses, sum(p.numel() for p in parameters))


def lycoris(steps: int, folder: Path) -> dict[str, Any]:
    """LyCORIS' network around the same layers."""
    from lycoris import LycorisNetwork, create_lycoris  # pyright: ignore[reportMissingImports]

    pipe = load_pipeline(DIGITS / "base")
    pipe.unet.requires_grad_(False)
    LycorisNetwork.apply_preset({"target_module": [], "target_name": layers(pipe), "enable_conv": True})
    network = create_lycoris(
        pipe.unet, 1.0, linear_dim=RANK, linear_alpha=RANK, conv_dim=RANK, conv_alpha=RANK, algo="lora"
    )
    network.apply_to()
    parameters = [p for p in network.parameters() if p.requires_grad]
    seconds, losses = loop(pipe, parameters, steps, cached=False)
    return measured(pipe, seconds, losses, sum(p.numel() for p in parameters))


def layers(pipe: Any) -> list[str]:
    """The paths of the layers in the UNet that the run adapts; a fused one's parts have one path."""
    points = ak.points(pipe, adapter=ak.LoRA(rank=RANK, targets=TARGETS))
    return list(dict.fromkeys(point.path for point in points))


def loop(pipe: Any, parameters: Sequence[torch.nn.Parameter], steps: int, *, cached: bool) -> Losses:
    """The plain loop."""
    scheduler: Any = DDPMScheduler.from_config(pipe.scheduler.config)
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, WARM_UP, steps)
    pictures, captions = read_set()
    encoded = encodings(pipe, pictures, captions) if cached else None
    pipe.unet.train()
    seconds, losses = [], []
    for chosen in batches(len(captions), steps):
        began = time.perf_counter()
        if encoded is not None:
            latents, states = (part[chosen] for part in encoded)
        else:
            latents, states = encodings(pipe, pictures[chosen], [captions[number] for number in chosen])
        noise = torch.randn_like(latents)
        times = torch.randint(scheduler.config.num_train_timesteps, (BATCH,))
        predicted = pipe.unet(scheduler.add_noise(latents, noise, times), times, states).sample
        loss = F.mse_loss(predicted.float(), noise.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - began)
    pipe.unet.eval()
    return seconds, losses


def read_set() -> tuple[torch.Tensor, list[str]]:
    """The pictures [n, 3, 32, 32], -1 to 1, and their captions."""
    pixels = [
        torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) for image in read_folder(DIGITS / "style")
    ]
    pictures = torch.stack([one.view(32, 32, 3).permute(2, 0, 1).float() / 127.5 - 1 for one in pixels])
    return pictures, [path.read_text().strip() for path in sorted((DIGITS / "style").glob("*.txt"))]


@torch.no_grad()
def encodings(pipe: Any, pictures: torch.Tensor, captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents, and text states with one caption in ten emptied, as the run has it."""
    told = [caption if torch.rand(()) > 0.1 else "" for caption in captions]
    tokens = pipe.tokenizer(
        told, padding="max_length", truncation=True, max_length=pipe.tokenizer.model_max_length, return_tensors="pt"
    )
    latents = pipe.vae.encode(pictures).latent_dist.sample() * pipe.vae.config.scaling_factor
    return latents, pipe.text_encoder(tokens.input_ids)[0]


def batches(size: int, steps: int) -> Iterator[list[int]]:
    """Numbers of examples, each epoch in another order."""
    waiting: list[int] = []
    for _ in range(steps):
        while len(waiting) < BATCH:
            waiting += torch.randperm(size).tolist()
        yield waiting[:BATCH]
        waiting = waiting[BATCH:]


def measured(pipe: Any, seconds: Sequence[float], losses: Sequence[float], trained: int) -> dict[str, Any]:
    """What a side came to; the memory is the highest of the process until here."""
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    pipe.set_progress_bar_config(disable=True)
    pictures = []
    for digit, word in enumerate(WORDS):
        pictures += pipe(
            [f"a handwritten {word} in neonchalk style"] * PER_DIGIT,
            num_inference_steps=SAMPLE_STEPS,
            guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(7000 + digit),
        ).images
    wanted = [digit for digit in range(10) for _ in range(PER_DIGIT)]
    read = sum(found == digit for found, digit in zip(read_digits(pictures), wanted, strict=True))
    return {
        "milliseconds a step": 1e3 * statistics.median(seconds[WARM_UP:]),
        "steps a second": 1 / statistics.mean(seconds[WARM_UP:]),
        "memory in MiB": memory,
        "trained": trained,
        "first losses": statistics.mean(losses[:5]),
        "last losses": statistics.mean(losses[-50:]),
        "style distance": style_distance(pictures, read_folder(DIGITS / "style")),
        "digits read": read / len(wanted),
    }


FUNCTIONS: Mapping[str, Callable[[int, Path], dict[str, Any]]] = {
    "adapterkit": ours,
    "plain": plain,
    "plain cached": lambda steps, folder: plain(steps, folder, cached=True),
    "lycoris": lycoris,
}


def apart(side: str, steps: int, folder: Path) -> dict[str, Any]:
    """A side in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.style", "--alone", side, "--steps", str(steps)]
    result = subprocess.run([*command, "--folder", str(folder)], check=False, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{side} ended with {result.returncode}:\n{result.stderr[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def require_parity(found: Mapping[str, Mapping[str, Any]]) -> None:
    """All train as many numbers, and begin from the same loss."""
    first = next(iter(found.values()))
    for side, figures in found.items():
        assert figures["trained"] == first["trained"], f"{side} trains {figures['trained']}, not {first['trained']}"
        assert abs(figures["first losses"] / first["first losses"] - 1) < 0.5, f"{side} begins elsewhere"


def as_markdown(found: Mapping[str, Mapping[str, Any]]) -> str:
    names = list(next(iter(found.values())))
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    lines += [f"| {side} | " + " | ".join(f"{row[name]:.4g}" for name in names) + " |" for side, row in found.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.style", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--output", type=Path, help="a JSON file")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--alone", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("sides", nargs="*", help=f"of {', '.join(SIDES)}; by default those that can be imported")
    chosen = parser.parse_args()
    if chosen.alone:
        torch.manual_seed(0)
        print(json.dumps(FUNCTIONS[chosen.alone](chosen.steps, chosen.folder)))
        return
    import tempfile

    there = [side for side in SIDES if side != "lycoris" or importlib.util.find_spec("lycoris")]
    with tempfile.TemporaryDirectory() as folder:
        found = {side: apart(side, chosen.steps, Path(folder)) for side in chosen.sides or there}
    require_parity(found)
    print(as_markdown(found))
    if chosen.output is not None:
        chosen.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
