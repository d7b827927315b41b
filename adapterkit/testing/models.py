"""Tiny models of every modality, in torch alone: what the checks run on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapterkit.testing.toys import VOCABULARY, WIDTH, ToyAttention, ToyModel

EXPERTS, IMAGE, STEPS = 2, 6, 10


class ToyCross(nn.Module):
    """Queries from x [batch, n, width], keys and values from a context [batch, m, width]."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """The sublayer's output."""
        return self.out(F.scaled_dot_product_attention(self.q(x), self.k(context), self.v(context)))


class ToyVisionBlock(nn.Module):
    """Post-norm: `y = norm(x + sublayer(x))`."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.attn = ToyAttention(width, causal=False)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, n, width] to the same."""
        x = self.norm1(x + self.attn(x)[0])
        return self.norm2(x + self.mlp(x))


class ToyVision(nn.Module):
    """Images [batch, 3, 6, 6] -> logits [batch, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 2, stride=2)
        self.blocks = nn.ModuleList(ToyVisionBlock() for _ in range(2))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, images: Tensor) -> Tensor:
        """Mean pooling over the patches."""
        x = self.patch(images).flatten(2).mT
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class ToyResidual(nn.Module):
    """A convolutional block that a time embedding [batch, width] moves; its second convolution is grouped."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, padding_mode="circular")
        self.conv2 = nn.Conv2d(width, width, 3, padding=2, dilation=2, groups=2, bias=False)
        self.time = nn.Linear(width, width)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """[batch, width, h, w] to the same."""
        h = self.conv1(F.silu(self.norm(x))) + self.time(time)[:, :, None, None]
        return x + self.conv2(F.silu(h))


class ToyDiffusion(nn.Module):
    """Noisy images [batch, 3, 6, 6], steps [batch] and a context [batch, m, width] -> noise."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in, self.conv_out = nn.Conv2d(3, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, 3, 1)
        self.time = nn.Embedding(STEPS, WIDTH)
        self.down, self.up = ToyResidual(), ToyResidual()
        self.norm, self.cross = nn.LayerNorm(WIDTH), ToyCross()

    def forward(self, images: Tensor, steps: Tensor, *, context: Tensor) -> Tensor:
        """A residual block, cross attention on its pixels, and another residual block."""
        time = self.time(steps)
        x = self.down(self.conv_in(images), time)
        tokens = x.flatten(2).mT
        tokens = tokens + self.cross(self.norm(tokens), context)
        return self.conv_out(self.up(tokens.mT.view_as(x), time))


class ToyExperts(nn.Module):
    """Every token through every expert, weighted by a router; the experts' weights are stacks that are read."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.router = nn.Linear(width, EXPERTS, bias=False)
        self.gate_up = nn.Parameter(torch.randn(EXPERTS, 4 * width, width) * 0.3)
        self.down = nn.Parameter(torch.randn(EXPERTS, width, 2 * width) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, n, width] to the same."""
        share, total = self.router(x).softmax(-1), torch.zeros_like(x)
        for expert in range(EXPERTS):
            gate, up = F.linear(x, self.gate_up[expert]).chunk(2, dim=-1)
            total = total + share[..., expert, None] * F.linear(F.silu(gate) * up, self.down[expert])
        return total


class ToyMixture(nn.Module):
    """Indices [batch, n] -> logits; two layers that are one module, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(VOCABULARY, WIDTH), nn.LayerNorm(WIDTH)
        self.experts, self.head = ToyExperts(), nn.Linear(WIDTH, VOCABULARY)
        self.twice = nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        """An embedding, the shared layer, the experts, and the shared layer again."""
        x = torch.tanh(self.twice(self.embed(ids)))
        x = x + self.experts(self.norm(x))
        return self.head(self.twice(x))


@dataclass(frozen=True)
class Example:
    """A model to check on.

    Attributes:
        name: Of the modality.
        make: A new model, always with the same weights.
        inputs: Positional and keyword arguments for a batch of this size; floating-point ones in this dtype.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int, torch.dtype], tuple[tuple[Any, ...], dict[str, Any]]]


def _seeded(cls: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            return cls()

    return make


def _ids(batch: int, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.randint(0, VOCABULARY, (batch, 5), generator=torch.Generator().manual_seed(1)),), {}


def _images(batch: int, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.randn(batch, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(1)).to(dtype),), {}


def _noisy(batch: int, dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
    context = torch.randn(batch, 4, WIDTH, generator=torch.Generator().manual_seed(2)).to(dtype)
    return (*_images(batch, dtype)[0], torch.arange(batch) % STEPS), {"context": context}


EXAMPLES = (
    Example("language", _seeded(ToyModel), _ids),
    Example("vision", _seeded(ToyVision), _images),
    Example("diffusion", _seeded(ToyDiffusion), _noisy),
    Example("mixture", _seeded(ToyMixture), _ids),
)
