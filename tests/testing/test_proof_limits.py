"""Prefixes of attentions that no equation can be put in the place of: what must hold in the limits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from adapterkit.testing import prove
from adapterkit.testing.proofs.attentions import BY_LIMITS
from adapterkit.testing.specimens import strengthened
from adapterkit.testing.specimens.specimen import normalise

WIDTH, HEADS = 8, 2


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = HEADS, WIDTH // HEADS
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        weights = torch.softmax(torch.matmul(query, key.transpose(-1, -2)) / 2.0, dim=-1)
        return self.o_proj(torch.matmul(weights, value).transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, loudness: float, *, centred: bool) -> None:
        super().__init__()
        self.attn, self.loudness, self.centred = Attention(), loudness, centred

    def forward(self, x: Tensor) -> Tensor:
        y = self.attn(x)
        y = y - y.mean(1, keepdim=True) if self.centred else y
        return x + self.loudness * y


def told(model: nn.Module) -> list[tuple[str, str]]:
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    proof = prove(model, {"run": lambda: model(x)})
    return [(one.result, one.why) for one in proof if one.point.kind == "attention"]


@pytest.mark.parametrize("loudness", [1.0, 1e-8])
def test_an_attention_is_proven_however_little_of_it_is_heard(loudness: float) -> None:
    assert told(strengthened(Model(loudness, centred=False))) == [("proven", BY_LIMITS)]


def test_what_loses_the_values_of_a_prefix_is_false() -> None:
    reason = "a prefix that has all of the mass does not depend on its values"
    assert told(strengthened(Model(1.0, centred=True))) == [("false", reason)]


def test_batch_norms_have_the_statistics_of_the_run() -> None:
    norm = nn.BatchNorm2d(3).double().eval()
    images = 5 + 0.01 * torch.randn(2, 3, 4, 4, dtype=torch.float64)
    normalise(norm, lambda: norm(images))
    assert torch.allclose(norm(images).mean((0, 2, 3)), torch.zeros(3, dtype=torch.float64), atol=1e-12)
    assert not norm.training
    assert norm.momentum == 0.1
