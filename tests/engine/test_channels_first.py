"""Sublayers whose features are at dimension 1: adapters are given them last, as everywhere, and give them back so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adapterkit as ak
from adapterkit.points import OutputPoint
from adapterkit.testing.proof import prove

WIDTH, HEADS, SIDE = 6, 2, 4


class PlaneAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv, self.proj = nn.Conv2d(WIDTH, 3 * WIDTH, 1), nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = self.qkv(x).reshape(b, 3, self.num_heads, -1, h * w).mT.unbind(1)
        return self.proj(F.scaled_dot_product_attention(q, k, v).mT.reshape(b, c, h, w))


class PlaneForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(WIDTH, 2 * WIDTH, 1), nn.Conv2d(2 * WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class PlaneBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn = nn.BatchNorm2d(WIDTH), PlaneAttention()
        self.norm2, self.mlp = nn.BatchNorm2d(WIDTH), PlaneForward()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Planes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(PlaneBlock() for _ in range(2))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class MixModule(ak.AdapterModule):
    """A matrix over features, of the normed stream: wrong in every other order of dimensions."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.eye(features).roll(1, 0) * 0.7)
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, x: Tensor, base: Any) -> Tensor:
        self.shapes += [tuple(x.shape), tuple(base(x).shape)]
        return base(x) + base.norm_in(x) @ self.matrix


@dataclass(frozen=True)
class Mix(ak.AdapterConfig):
    kinds = frozenset({"output"})
    targets: str = "attn mlp"

    def build(self, point: ak.InjectionPoint) -> MixModule:
        return MixModule(point.out_features)


@pytest.fixture
def model() -> Planes:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = Planes().double().eval().requires_grad_(False)
        for parameter in made.parameters():
            nn.init.normal_(parameter, std=0.5)
    return made


IMAGES = torch.randn(2, WIDTH, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def by_hand(model: Planes, x: Tensor, matrix: Tensor) -> Tensor:
    blocks: Any = model.blocks
    for block in blocks:
        for norm, sublayer in ((block.norm1, block.attn), (block.norm2, block.mlp)):
            normed = norm(x)
            x = x + sublayer(normed) + torch.einsum("bchw,cd->bdhw", normed, matrix)
    return model.head(x.mean((2, 3)))


def test_such_sublayers_are_points_and_their_blocks_are_not(model: Planes) -> None:
    outputs = [point for point in ak.points(model) if isinstance(point, OutputPoint)]
    assert [point.role for point in outputs] == ["attn", "mlp"] * 2
    assert all(point.channels_first and point.out_features == WIDTH for point in outputs)


def test_adapters_are_given_features_last_and_norms_with_them(model: Planes) -> None:
    base = model(IMAGES)
    adapters = ak.Adapters(model)
    adapters.add("a", Mix(), dtype=torch.float64)
    found = model(IMAGES)
    first: Any = next(iter(adapters.modules("a").values()))
    assert first.shapes == [(2, SIDE, SIDE, WIDTH)] * 2
    with adapters.disabled():
        expected = by_hand(model, IMAGES, first.matrix)
        assert torch.equal(model(IMAGES), base)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    adapters.detach()
    assert torch.equal(model(IMAGES), base)


@pytest.mark.parametrize("config", [ak.Bottleneck(reduction=2), ak.LoRA(rank=2), ak.Prefix(length=2)])
def test_built_in_types_act_there(model: Planes, config: ak.AdapterConfig) -> None:
    base = model(IMAGES)
    adapters = ak.Adapters(model)
    adapters.add("a", config)
    with torch.no_grad():
        for parameter in adapters.parameters("a"):
            parameter.normal_(std=0.3)
    assert not torch.allclose(model(IMAGES), base)
    model(IMAGES).sum().backward()
    assert all(parameter.grad is not None for parameter in adapters.parameters("a"))


def test_what_is_claimed_of_them_is_proven(model: Planes) -> None:
    proof = prove(model, {"images": lambda: model(IMAGES)})
    assert not proof.false
    assert {verdict.point.role for verdict in proof.proven} >= {"attn", "mlp", "attn.q", "attn.kv"}


def test_a_sum_with_something_else_would_be_seen(model: Planes) -> None:
    """The proof can fail."""

    class Crossed(PlaneBlock):
        def forward(self, x: Tensor) -> Tensor:
            kept = self.norm1(x)
            x = x.tanh() + self.attn(kept)
            return x + self.mlp(self.norm2(x))

    for block in model.blocks:
        block.__class__ = Crossed
    proof = prove(model, {"images": lambda: model(IMAGES)})
    assert {verdict.point.role for verdict in proof.false if verdict.point.kind == "output"} == {"attn"}
