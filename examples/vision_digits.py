"""A timm vision transformer that knows the digits 0 to 4 is adapted to 5 to 9, in five ways.

    python examples/vision_digits.py

The transformer is pretrained here on scikit-learn's handwritten digits 0-4. Its head is then replaced, and the body is
kept (linear probe), adapted (LoRA, Bottleneck, Prefix) or trained itself (full fine-tuning). Every row starts from the
same body and the same head, and sees the same 200 images in the same order. Each learning rate was chosen on other
images than those the table counts (`--tune` repeats that). About a minute on two cores.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.torchvision_ops import ensure_torchvision_ops

ensure_torchvision_ops()
from timm.models.vision_transformer import VisionTransformer  # noqa: E402 - only after the line above

SIDE = 16
CLASSES = 5
BATCH = 40
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Images:
    """Images [n, 1, SIDE, SIDE] from -1 to 1 and their classes [n], counted from 0."""

    pixels: Tensor
    labels: Tensor

    def __getitem__(self, rows: slice | Tensor) -> Images:
        return Images(self.pixels[rows], self.labels[rows])

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Method:
    """A row of the table: what is added to the frozen body (None: nothing), or that the body itself trains."""

    name: str
    rate: float
    adapter: ak.AdapterConfig | None = None
    full: bool = False


METHODS = (
    Method("linear probe", 1e-1),
    Method("LoRA", 1e-2, ak.LoRA(rank=8, targets="linear")),
    Method("Bottleneck", 1e-2, ak.Bottleneck(targets="attn mlp", reduction=4)),
    Method("Prefix", 1e-1, ak.Prefix(length=8)),
    Method("full fine-tuning", 3e-3, full=True),
)


def digits(first: int) -> Images:
    """The digits `first` to `first + 4`, enlarged from 8x8, in random but fixed order."""
    data = load_digits()
    labels = torch.tensor(data.target) - first
    chosen = ((labels >= 0) & (labels < CLASSES)).nonzero().squeeze(1)
    chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))]
    pixels = torch.tensor(data.images, dtype=torch.float32)[chosen, None] / 8 - 1
    return Images(F.interpolate(pixels, size=SIDE, mode="bilinear"), labels[chosen])


def batches(data: Images, epochs: int, seed: int) -> Iterator[Images]:
    """Shuffled batches, each shifted by up to one pixel."""
    generator = torch.Generator().manual_seed(seed)
    padded = F.pad(data.pixels, (1, 1, 1, 1), value=-1.0)
    for _ in range(epochs):
        for rows in torch.randperm(len(data), generator=generator).split(BATCH):
            top, left = torch.randint(0, 3, (2,), generator=generator).tolist()
            yield Images(padded[rows, :, top : top + SIDE, left : left + SIDE], data.labels[rows])


def fit(
    model: nn.Module, parameters: Iterable[nn.Parameter], data: Images, *, rate: float, epochs: int, seed: int
) -> None:
    """AdamW with a rate that falls to zero along a cosine."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * math.ceil(len(data) / BATCH))
    for batch in batches(data, epochs, seed):
        optimizer.zero_grad()
        F.cross_entropy(model(batch.pixels), batch.labels).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, data: Images) -> float:
    """Share of images whose class is found."""
    return (model(data.pixels).argmax(1) == data.labels).float().mean().item()


def pretrained() -> VisionTransformer:
    """A vision transformer that has learnt 0 to 4."""
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=SIDE, patch_size=4, in_chans=1, embed_dim=64, depth=4, num_heads=4, num_classes=CLASSES
    )
    data = digits(0)
    fit(model, model.parameters(), data[200:], rate=2e-3, epochs=40, seed=0)
    print(f"pretrained on 0-4: {accuracy(model.eval(), data[:200]):.1%} of 200 held-out images read")
    return model


def adapt(base: VisionTransformer, method: Method, data: Images, seed: int) -> tuple[nn.Module, int]:
    """The base with a new head, trained as the method says; and how many numbers were trained."""
    model = copy.deepcopy(base)
    torch.manual_seed(seed)
    model.reset_classifier(CLASSES)
    if method.adapter is not None:
        ak.Adapters(model).add("digits", method.adapter, seed=seed)  # freezes the model, and trains the adapter
    elif not method.full:
        model.requires_grad_(False)
    model.head.requires_grad_(True)  # after `add`: the new head is a part of the model, and was frozen with it
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fit(model, trained, data, rate=method.rate, epochs=30, seed=seed)
    return model, sum(parameter.numel() for parameter in trained)


def compare(base: VisionTransformer, train: Images, held_out: Images) -> Table:
    """A row for each method."""
    title = f"from 0-4 to 5-9: {len(train)} images, {len(held_out)} held out, mean of {len(SEEDS)} seeds"
    table = Table("method", "accuracy", "from - to", "trained", "seconds", title=title)
    for method in METHODS:
        found, count, start = [], 0, time.perf_counter()
        for seed in SEEDS:
            model, count = adapt(base, method, train, seed)
            found.append(accuracy(model, held_out))
        seconds = (time.perf_counter() - start) / len(SEEDS)
        spread = f"{min(found):.1%} - {max(found):.1%}"
        table.add_row(method.name, f"{sum(found) / len(found):.1%}", spread, f"{count:,}", f"{seconds:.1f}")
    return table


def tune(base: VisionTransformer, train: Images, other: Images) -> Table:
    """How the rates of `METHODS` were chosen: on images that `compare` never counts."""
    rates = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
    table = Table("method", *(f"{rate:g}" for rate in rates), title="accuracy by learning rate")
    for method in METHODS:
        models = (adapt(base, replace(method, rate=rate), train, seed=9)[0] for rate in rates)
        table.add_row(method.name, *(f"{accuracy(model, other):.1%}" for model in models))
    return table


def main() -> None:
    """Prints the table."""
    base, data = pretrained(), digits(5)
    train, other, held_out = data[:200], data[200:400], data[400:]
    Console().print(tune(base, train, other) if "--tune" in sys.argv else compare(base, train, held_out))


if __name__ == "__main__":
    main()
