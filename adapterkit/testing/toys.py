"""A tiny language model with every layout in it, and the backend that maps it, registered like a third party's."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.backend import AttentionSeam, Backend, Reach, extension_of
from adapterkit.mapping.family import Attention, Fused, Group, Output, Tokens, Weight, resolve
from adapterkit.points import AttentionPoint, InjectionPoint
from adapterkit.specs import BackendSpec

WIDTH, HEADS, LAYERS, VOCABULARY = 8, 2, 2, 11


class ToyAttention(nn.Module):
    """Self-attention with a fused projection; it asks for its extension itself."""

    def __init__(self, width: int = WIDTH, heads: int = HEADS, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """[batch, n, width] to the same, and None as attention modules do."""
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        extension, mask, keys, values = extension_of(self), None, k, v
        if extension is not None:
            keys, values, mask = extension.extend(k, v, mask, queries=n, causal=self.causal)
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, is_causal=self.causal and mask is None)
        if extension is not None:
            y = extension.attend(q, k, v, y)
        return self.proj(y.transpose(1, 2).reshape(b, n, d)), None


class ToyBlock(nn.Module):
    """Pre-norm; attention with a fused projection, a gated feed-forward, a convolution over the sequence."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = ToyAttention(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width, bias=False)
        self.conv = nn.Conv1d(width, width, 3, padding=1, groups=2)
        self.mlp = ToyFeedForward(self.up, self.down)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, n, width] to the same."""
        x = x + self.attn(self.norm1(x))[0]
        x = x + self.mlp(self.norm2(x))
        return x + self.conv(x.mT).mT


class ToyFeedForward(nn.Module):
    """Two layers that belong to the block."""

    def __init__(self, up: nn.Linear, down: nn.Linear) -> None:
        super().__init__()
        self.up, self.down = up, down

    def forward(self, x: Tensor) -> Tensor:
        """[batch, n, width] to the same."""
        return self.down(F.gelu(self.up(x)))


class ToyModel(nn.Module):
    """Indices [batch, length] -> logits [batch, length, vocabulary]; the head is tied to the embedding."""

    def __init__(self, layers: int = LAYERS, width: int = WIDTH, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.embed = nn.Embedding(VOCABULARY, width)
            self.blocks = nn.ModuleList(ToyBlock(width) for _ in range(layers))
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def heads_of(module: Any) -> tuple[int, int]:
    """Heads of a `ToyAttention`, and the width of one."""
    return module.heads, module.proj.out_features // module.heads


class ToySeam(AttentionSeam):
    """ToyAttention asks for its extension itself."""

    def attend_refusal(self, module: nn.Module) -> str | None:
        return None


class ToyBackend(Backend):
    """Maps `ToyModel`."""

    component = "toy"
    whole_blocks = True
    groups = (
        Group(
            "",
            "",
            (Weight("embed.tokens", "embed"), Tokens("tokens", "embed"), Weight("head", "head")),
        ),
        Group(
            "blocks.{layer}",
            "{layer}",
            (
                Fused(("attn.q", "attn.k", "attn.v"), "attn.qkv"),
                Weight("attn.o", "attn.proj"),
                Weight("mlp.up", "up"),
                Weight("mlp.down", "down"),
                Weight("conv", "conv"),
                Output("attn", "attn", "norm1", norm_in="norm1"),
                Output("mlp", "mlp", "norm2", norm_in="norm2"),
                Attention("attn.kv", "attn", heads_of),
            ),
        ),
    )

    def points(self, model: nn.Module, component: str) -> list[InjectionPoint]:
        return resolve(model, self.groups, component)

    def reach(self, model: nn.Module, point: InjectionPoint) -> Reach:
        return Reach(seam=ToySeam()) if isinstance(point, AttentionPoint) else Reach()


@ak.hookimpl
def adapterkit_register_backends() -> Iterable[BackendSpec]:
    """Adds `toy`."""
    root = __name__.partition(".")[0]
    return [BackendSpec("toy", f"{__name__}:ToyBackend", models=(f"{root}:ToyModel",), summary="toy models")]


def register() -> None:
    """Registers this module's backend with the process's manager, once."""
    manager = ak.get_plugin_manager()
    if "toy" not in manager.backends():
        manager.register(sys.modules[__name__], name="toys")


def ids(batch: int = 3, length: int = 5, seed: int = 1) -> Tensor:
    """Indices for a ToyModel."""
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
